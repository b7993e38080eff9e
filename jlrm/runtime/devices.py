"""The devices that a command computes on, and what is compiled for them.

Devices are found and said in one line. Programs are kept on disk, counted and timed by name.

JAX is imported where it is needed, since most commands' help and errors need no device.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
from typing import TYPE_CHECKING, Any

import jlrm
from jlrm.config import UsageError
from jlrm.runtime import google, storage

if TYPE_CHECKING:
    from jax.sharding import Mesh

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
MOST_BYTES = 8 * 2**30  # of compiled programs on the local disk; the ones used longest ago go first


def tpu_files() -> list[str]:
    """Return the files by which Linux shows the chips of a TPU; empty: there is none."""
    return sorted(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def ready(url: str = "") -> None:
    """Prepare JAX before its first program.

    Args:
      url: of the run directory, if that is in a store: programs are kept there, for all hosts.

    Raises:
      UsageError: a TPU is here, and JAX has only found the CPU.
    """
    _keep_programs(url)
    _refuse_cpu()


def tell(mesh: Mesh) -> None:
    """Print, once for all processes, what a command computes on."""
    import jax

    if jax.process_index() == 0:
        print(described(mesh), file=sys.stderr)


def described(mesh: Mesh) -> str:
    """Return the devices, their mesh and the versions that decide what runs, in one line."""
    import jax

    kind = mesh.devices.flat[0].device_kind
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    packages = ["jax", *(["libtpu"] if jax.default_backend() == "tpu" else [])]
    versions = [f"jlrm {jlrm.__version__}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    kept = jax.config.values["jax_compilation_cache_dir"]
    where = f"compiled programs are kept in {kept}" if kept else "compiled programs are not kept"
    return f"{mesh.size} x {kind}{hosts} (mesh: {axes}); {', '.join(versions)}; {where}"


def _keep_programs(url: str) -> None:
    """Let JAX keep compiled programs where the next start finds them, unless the user has said so.

    Each start of a run on a pod would compile for minutes otherwise. `JAX_COMPILATION_CACHE_DIR`
    names another place, `JAX_ENABLE_COMPILATION_CACHE=false` none.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if url:
        jax.config.update("jax_compilation_cache_dir", f"{url.rstrip('/')}/compiled")
        return
    directory = storage.cache() / "compiled" / _processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that can't be written; `described` says that nothing is kept
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _processor() -> str:
    """Return a name for what this processor can do: programs for a CPU run on no lesser one.

    Hosts may share a home.
    """
    flags = ""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"


def _refuse_cpu() -> None:
    import jax

    asked = jax.config.values["jax_platforms"] or ""
    files = tpu_files()
    # A file of vfio may be another device's, elsewhere than at Google.
    is_tpu = bool(files) and (files[0].startswith("/dev/accel") or google.is_here())
    if not is_tpu or "cpu" in asked.split(",") or jax.default_backend() != "cpu":
        return
    raise UsageError(
        f"A TPU is here ({files[0]}), and JAX has found the CPU alone: {_why_not(files)} To "
        "compute on the CPU all the same, set JAX_PLATFORMS=cpu."
    )


def _why_not(files: list[str]) -> str:
    """Return what keeps JAX from a TPU that is there."""
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "libtpu is not installed (pip install 'jlrm[tpu]')."
    for directory in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held = {os.readlink(each) for each in (directory / "fd").iterdir()}
            if directory.name != str(os.getpid()) and not held.isdisjoint(files):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                return f"process {directory.name} holds it ({command.strip()[:80]}). End that one."
    return "another process may hold it, or the VM's libtpu is too old for this JAX."


class Compilations:
    """Programs compiled since the process began to watch, and seconds by name."""

    def __init__(self) -> None:
        self.count = 0
        self._seconds = collections.defaultdict[str, float](float)

    def take(self) -> dict[str, float]:
        """Return the seconds of each program that was compiled since the last call, by its name."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def listen(self, event: str, duration_secs: float, **about: Any) -> None:
        if event != COMPILE_EVENT:
            return
        self.count += 1
        name = str(about.get("fun_name", "a program"))  # jit(NAME)
        self._seconds[name.removeprefix("jit(").removesuffix(")")] += duration_secs


@functools.cache  # one listener per process
def watch_compiling() -> Compilations:
    """Begin to note what is compiled."""
    import jax

    noted = Compilations()
    jax.monitoring.register_event_duration_secs_listener(noted.listen)
    return noted
