"""TPU slices: their names, what one of their devices has, and compiling for them on any machine.

`libtpu` compiles for a named topology; no TPU need be present. It enforces its own limit of HBM. It
refuses a program beyond that limit, and names the size that the program needs. Here that is a
result, not an error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from jlrm.config import RunError, UsageError, nearest
from jlrm.planning import counting, machine, remembered
from jlrm.planning.counting import Assumed

GIB = 2**30
HERE = "here"  # in place of a slice's name: the devices of this machine
CHIPS_PER_HOST = 4  # at least, of slices of several chips


@dataclass(frozen=True)
class Generation:
    """A kind of TPU; figures are of one device as JAX counts them, a chip or one of its cores."""

    hbm_gib: float  # as the compiler enforces it, found by compiling what is too big
    flops: float  # bfloat16 products a second, data sheet
    bandwidth: float  # HBM bytes a second, data sheet
    slices: dict[str, int]  # name: devices, ascending
    host_gb: float  # of a VM's own memory for each chip, by Google's table of machine types
    kinds: tuple[str, ...] = ()  # what JAX calls such a device
    is_megacore: bool = False  # a chip's two cores are one device, if the compiler is told so
    devices_per_chip: int = 1


FLAT = {"1x1": 1, "2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "8x16": 128, "16x16": 256}
CUBES = {
    "1x1x1": 1,
    "2x1x1": 2,
    "2x2x1": 4,
    "2x2x2": 8,
    "2x2x4": 16,
    "2x4x4": 32,
    "4x4x4": 64,
    "4x4x8": 128,
}
TWO_CORES = {name: 2 * number for name, number in CUBES.items()}
GENERATIONS = {
    "v4": Generation(30.75, 275e12, 1228e9, CUBES, 101, ("TPU v4",), is_megacore=True),
    "v5e": Generation(15.75, 197e12, 819e9, FLAT, 48, ("TPU v5 lite", "TPU v5e")),
    "v5p": Generation(95.73, 459e12, 2765e9, CUBES, 112, ("TPU v5", "TPU v5p")),
    "v6e": Generation(31.24, 918e12, 1640e9, FLAT, 180, ("TPU v6 lite", "TPU v6e")),
    "tpu7x": Generation(
        94.74, 1153.5e12, 3690e9, TWO_CORES, 240, ("TPU7x", "TPU v7x"), devices_per_chip=2
    ),
}


def versions(is_tpu: bool) -> dict[str, str]:
    """Return the versions of what compiles here."""
    names = ("jax", "libtpu") if is_tpu else ("jax",)
    return {name: importlib.metadata.version(name) for name in names}


def pinned() -> str:
    """Return the version of libtpu that this JAX runs with on a TPU, e.g. "0.0.42"; "": unknown."""
    for requirement in importlib.metadata.requires("jax") or ():
        match = re.match(r"libtpu==([0-9.]+?)\.\*;.*extra", requirement)
        if match:
            return match[1]
    return ""


class Compiled(NamedTuple):
    """What is known of a program once it is compiled; bytes are those of one device."""

    argument: int
    output: int
    alias: int  # of the output, what takes over an argument's memory
    temp: int
    code: int  # the program itself, which stays in HBM as long as it may run again
    needed: int  # 0, or what a program wanted that the compiler refused
    counts: counting.Program | None  # None: refused, or its text can't be had
    seconds: float
    output_shardings: Any
    note: str = ""

    @property
    def peak(self) -> int:
        """The most memory held while it runs, its arguments and results included."""
        return self.needed or self.argument + self.output - self.alias + self.temp


def prepare() -> None:
    """Set up this process, before its first use of a device, to compile for TPUs on the host.

    Raises:
      UsageError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("Compiling for a TPU needs libtpu: pip install 'jlrm[plan]'.")
    installed = importlib.metadata.version("libtpu")
    if pinned() and not f"{installed}.".startswith(f"{pinned()}."):
        print(
            f"libtpu {installed} is installed, and this JAX runs with "
            f"libtpu {pinned()}, which may need more memory: pip install 'jlrm[plan]'.",
            file=sys.stderr,
        )
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
    )
    jax.config.update("jax_platforms", "cpu")


def find(topology: str) -> Generation:
    """Return the generation of a named slice such as "v5e:4x4", or of this machine's devices.

    Raises:
      UsageError: no such slice.
    """
    if topology == HERE:
        return _here()
    generation, _, name = topology.partition(":")
    if generation in GENERATIONS and name in GENERATIONS[generation].slices:
        return GENERATIONS[generation]
    known = [f"{kind}:{name}" for kind in GENERATIONS for name in GENERATIONS[kind].slices]
    close = nearest(topology, known)
    listed = "; ".join(f"{kind}:{{{','.join(GENERATIONS[kind].slices)}}}" for kind in GENERATIONS)
    suggestion = f"{close} " if close.startswith("Did") else ""
    raise UsageError(f"--topology {topology}: no such slice. {suggestion}Known: {listed}.")


def _here() -> Generation:
    device = jax.devices()[0]
    for known in GENERATIONS.values():
        if device.device_kind in known.kinds:
            return replace(known, hbm_gib=machine.device_limit(device) / GIB)
    return Generation(machine.device_limit(device) / GIB, math.nan, math.nan, {}, math.inf)


def devices(topology: str, num_slices: int = 1) -> Sequence[Any]:
    """Return the devices of one or more equal slices, which need not be here.

    Raises:
      UsageError: no such slice, or no slices at all.
    """
    generation = find(topology)
    if topology == HERE:
        return jax.devices()
    if num_slices < 1:
        raise UsageError(f"--slices {num_slices} is too small: at least 1.")
    from jax.experimental import topologies

    more: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    chips = [int(size) for size in topology.partition(":")[2].split("x")]
    if math.prod(chips) < CHIPS_PER_HOST:  # a host of its own kind; else the compiler wants four
        more["chips_per_host_bounds"] = [*chips, 1, 1][:3]
    if generation.is_megacore:
        more["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"libtpu does not describe {topology}: {_first_line(error)}") from None
    return described.devices


def compile_program(
    program: Any,
    arguments: Sequence[Any],
    assumed: Assumed,
    slice_devices: int = 0,
    is_tpu: bool = True,
    num_experts: int = 0,
    about: str = "",
) -> Compiled:
    """Compile a jitted program for its abstract arguments' devices, and count what it does on TPUs.

    Args:
      assumed, slice_devices, num_experts: as of `counting.analyse`.
      about: the devices. What they and their compiler have compiled before is remembered, without
        where its outputs lie (remembered.py); "": it is compiled.

    Raises:
      RunError: the compiler failed for another reason than memory.
    """
    lowered = program.lower(*arguments)
    counted_by = assumed, slice_devices, num_experts
    own_code = inspect.getsource(sys.modules[__name__])
    decided_by = about, counted_by, versions(is_tpu), own_code
    file = remembered.place(lowered, *decided_by) if about else None
    known = remembered.recall(file) if file else None
    if known and {*known, "output_shardings"} == {*Compiled._fields}:
        return Compiled(**known, output_shardings=None)
    found = _compile(lowered, arguments, *counted_by, is_tpu)
    if file:
        remembered.keep(file, {k: v for k, v in found._asdict().items() if k != "output_shardings"})
    return found


def _compile(
    lowered: Any,
    arguments: Sequence[Any],
    assumed: Assumed,
    slice_devices: int,
    num_experts: int,
    is_tpu: bool,
) -> Compiled:
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = overflow(str(error))
        if needed is None:
            raise RunError(f"The compiler failed: {_first_line(error)}") from error
        seconds, note = time.monotonic() - began, _first_line(error)
        argument = shard_bytes(arguments)
        return Compiled(argument, 0, 0, 0, 0, max(needed, 1), None, seconds, None, note)
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    counts, note = None, ""
    try:
        if is_tpu:
            counts = counting.analyse(compiled.as_text(), assumed, slice_devices, num_experts)
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        note = "libtpu can't print this program: FLOPs, bytes and collectives are not known"
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        0,
        counts,
        seconds,
        compiled.output_shardings,
        note,
    )


def overflow(message: str) -> int | None:
    """Return the bytes that a program needs, by the compiler's message that memory ran out.

    None: the message is not about memory. 0: the message names no size, or on-chip memory ran out
    and not HBM. A larger slice has no more on-chip memory.
    """
    is_memory = re.search(
        r"CompileTime\w*Oom|exceeds available HBM|[Rr]an out of memory|Out of memory"
        r"|Exceeded \w+ capacity|exceeded (?:its )?\w*mem(?:ory)? (?:limit|capacity)",
        message,
    )
    if not is_memory:
        return None
    size = r"([0-9.]+)\s*([KMGT]?)i?B?"
    for pattern in (
        rf"\({size}\) exceeds available HBM",
        rf"Used {size} of {size}\w* hbm",
        rf"Total hbm usage >= {size}",
        rf"(?:allocate|allocating|requires?|required) {size}",
    ):
        match = re.search(pattern, message)
        if match:
            return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
    return 0


def shard_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of abstract arrays."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = 1
        for length in shape:
            size *= length
        total += size * _itemsize(leaf.dtype)
    return total


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:500]
