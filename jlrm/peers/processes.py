"""A library's process: started in its own Python, asked for one turn at a time.

The malloc of glibc gives large blocks back to the system and gets them anew, page by page, in every
step. Told to keep its memory it spares these page faults, and needs more of it: both are measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent
OURS = "jlrm"
KEEPS = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
MALLOCS = {"as it is": {}, "keeps memory": {"GLIBC_TUNABLES": KEEPS}}
# A GPU's memory is taken as it is needed, since two processes share it.
DEVICES = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "gpu": {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
GRACE = 2.0  # seconds that a process has to end in
ENDING = 30.0  # the same, of one that has closed its output and so is ending
TAIL = 20  # lines of its stderr that are shown


@dataclass(frozen=True)
class Library:
    """The folder with a library's Python, below that of all (empty: ours), and its adapter."""

    environment: str
    adapter: pathlib.Path
    flags: tuple[str, ...] = ()


LIBRARIES = {
    OURS: Library("", HERE / "ours.py"),
    "hf": Library("torch", HERE / "hf_torch.py"),
    "trl": Library("torch", HERE / "trl_torch.py"),
    "trl-checkpointing": Library("torch", HERE / "trl_torch.py", ("checkpointing",)),
    "tunix": Library("jax", HERE / "tunix_jax.py"),
}


class FailedLibrary(Exception):
    """A library's process ended, did not answer, or did not do its work."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class MissingLibrary(FailedLibrary):
    """A library is not installed."""


def mallocs(device: str = "cpu") -> list[str]:
    """Return the settings of malloc that this machine knows and that matter to the device."""
    is_known = device == "cpu" and platform.libc_ver()[0] == "glibc"
    return list(MALLOCS) if is_known else ["as it is"]


@dataclass(frozen=True)
class Site:
    """Where the workload and the libraries' Pythons are, and how long an answer may take."""

    workload: pathlib.Path
    peers: pathlib.Path
    patience: int  # seconds
    device: str = "cpu"


class Process:
    """One phase of a library, kept ready for its next turn. A context that ends the process."""

    def __init__(self, site: Site, name: str, phase: str, malloc: str) -> None:
        library = LIBRARIES[name]
        python, path = sys.executable, str(HERE.parent.parent)
        if library.environment:
            python, path = str(site.peers / library.environment / "bin" / "python"), ""
        self.name, self.patience, self.answer = name, site.patience, b""
        self.log = site.workload / f"{name}.log"
        # -P keeps this folder off the path: its files are not to hide modules of the library.
        command = [python, "-P", str(HERE / "worker.py"), str(library.adapter)]
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    [*command, str(site.workload), phase, *library.flags],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={
                        **os.environ,
                        **ENVIRONMENT,
                        **DEVICES[site.device],
                        **MALLOCS[malloc],
                        "PYTHONPATH": path,
                    },
                    start_new_session=True,  # so that what it has started ends with it
                )
            except OSError as error:
                raise MissingLibrary(name, f"there is no {python} ({error.strerror})") from error

    def turn(self) -> dict[str, Any]:
        """Let it work once, and return what it tells.

        Raises:
          MissingLibrary: it is not installed.
          FailedLibrary: it ended, or did not answer in time.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading tells how
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        told = json.loads(self._line())
        if "missing" in told:
            raise MissingLibrary(self.name, told["missing"])
        return told

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        file, end = self.process.stdout.fileno(), time.monotonic() + self.patience
        while b"\n" not in self.answer:
            if not select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
                raise FailedLibrary(self.name, f"no answer within {self.patience} s")
            if not (part := os.read(file, 1 << 16)):
                raise FailedLibrary(self.name, self._ending())
            self.answer += part
        line, _, self.answer = self.answer.partition(b"\n")
        return line

    def _ending(self) -> str:
        """Say how the process ended; the last lines of its stderr go to ours."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING)
        code = self.process.poll()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        print("\n".join(f"{self.name}: {line}" for line in lines[-TAIL:]), file=sys.stderr)
        if code == -signal.SIGKILL:
            return "it was killed; has memory run out?"
        if code is None:
            return "it has closed its output, and did not end"
        last = f": {lines[-1]}" if lines else ""
        return f"it ended with exit code {code}{last}"

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # which ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
