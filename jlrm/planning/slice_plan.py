"""A run's plan for one slice: programs compiled, and what is held with each of them added up."""

from __future__ import annotations

import math
import pathlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jlrm.config import Config
from jlrm.model.qwen import QwenConfig
from jlrm.planning import duration, machine, memory, phases, slices
from jlrm.planning.counting import Counts
from jlrm.planning.figures import (
    DecodeStep,
    HostPlan,
    Moved,
    PhasePlan,
    ProgramPlan,
    SlicePlan,
    Work,
)
from jlrm.planning.memory import KINDS, Held, Point
from jlrm.planning.phases import Plan, PlannedProgram
from jlrm.planning.slices import GIB, Compiled, Generation
from jlrm.reports.tracking import progress_bar
from jlrm.runtime import commands
from jlrm.runtime.mesh import create_mesh
from jlrm.weights.source import NotHere, read_description, read_model
from jlrm.weights.steps import split


class Wishes(NamedTuple):
    """What a user asks of a plan beside its config."""

    headroom: float = 0.08  # share of the limit that is to stay free
    num_steps: int | None = None
    dollars_per_chip_hour: float | None = None


NO_WISHES = Wishes()


def make_plan(
    config: Config,
    topology: str,
    num_slices: int = 1,
    only: Sequence[str] = (),
    known: dict[str, Compiled] | None = None,
    wishes: Wishes = NO_WISHES,
) -> SlicePlan:
    """Compile a run's programs for a slice, and add up what they hold.

    Args:
      only: names of the programs to compile; empty: all.
      known: programs that were compiled before, for the same slice; others are added.

    Raises:
      UsageError: no such slice, or a model that the mesh can't divide.
    """
    generation = slices.find(topology)
    mesh = create_mesh(config.mesh, slices.devices(topology, num_slices))
    model, source = open_model(config)
    plan = phases.plan(config, model, mesh)
    compiled, usable = {} if known is None else known, generation.hbm_gib * (1 - wishes.headroom)
    if plan.resident <= usable * GIB:  # else nothing need be compiled to know
        wanted = [name for name in plan.programs if not only or name in only]
        slice_devices = mesh.size // num_slices if num_slices > 1 else 0
        is_described = topology != slices.HERE  # processors differ more than their names say
        devices = f"{num_slices} x {topology}" if is_described else ""
        _compile_all(plan, wanted, compiled, slice_devices, devices)
    code = {memory.CODE: sum(_code(plan, name, each) for name, each in compiled.items())}
    by_phase = {
        name: _phase(points, plan, compiled, code)
        for name, points in plan.phases.items()
        if any(not point.program or point.program in compiled for point in points)
    }
    peaks = [phase.peak_gib for phase in by_phase.values()]
    peak = max(*peaks, *(program.peak / GIB for program in compiled.values()))
    is_refused = any(program.needed for program in compiled.values())
    host = _host(plan, mesh, generation)
    programs = {
        name: _program(planned, compiled[name], _code(plan, name, compiled[name]), generation)
        for name, planned in plan.programs.items()
        if name in compiled
    }
    not_compiled = tuple(name for name in plan.programs if name not in compiled)
    host_fits = host is None or max(host.phases_gib.values()) <= host.limit_gib * (
        1 - wishes.headroom
    )
    return SlicePlan(
        fits=peak <= usable and not is_refused and host_fits,
        peak_gib=peak,
        limit_gib=generation.hbm_gib,
        topology=topology,
        slices=num_slices,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        model=source,
        programs=programs,
        phases=by_phase,
        not_compiled=not_compiled,
        usable_gib=usable,
        versions=slices.versions(plan.is_tpu),
        host=host,
        duration=None
        if not_compiled
        else duration.estimate(
            config,
            programs,
            model.num_hidden_layers,
            mesh.size // generation.devices_per_chip,
            wishes.num_steps,
            wishes.dollars_per_chip_hour,
        ),
    )


def doubt(config: Config, model: QwenConfig, mesh: Mesh) -> str:
    """Return a sentence if a run can't but run out of the memory of the devices at hand, else "".

    Counted is what needs no compiling: what is held all the time, and one gradient beside it.
    """
    plan = phases.plan(config, model, mesh)
    gradient = max(
        (plan.programs[name].kinds[memory.WEIGHTS] for name in plan.updates()), default=0
    )
    device = mesh.local_devices[0]
    needed, free = max(held(plan), plan.resident + gradient), machine.device_free(device)
    if needed <= free:
        return ""
    return (
        f"This run holds {needed / GIB:.1f} GiB at least on each device, and {free / GIB:.1f} are "
        "free: it is going to run out of memory. `jlrm plan --topology here` with the same "
        "config and settings says what each phase needs."
    )


def held(plan: Plan) -> int:
    """Return the most that is held at any moment, apart from programs' temporaries."""
    return max(
        sum(point.beside.values())
        + (sum(plan.programs[point.program].kinds.values()) if point.program else 0)
        for points in plan.phases.values()
        for point in points
    )


def open_model(config: Config) -> tuple[QwenConfig, str]:
    """Return the architecture, and where it was read; of a hub model, its config.json alone."""
    source = config.model
    try:
        model = read_model(config)
    except NotHere:
        return read_description(config), f"config.json of {source.path}"
    if source.path and not pathlib.Path(split(source.path)[0]).expanduser().exists():
        return model, f"{source.path}, as the built-in shape of that name (nothing is downloaded)"
    return model, source.path or f"preset {source.preset}"


# --- Compiling and adding up ---


def _compile_all(
    plan: Plan,
    wanted: Sequence[str],
    compiled: dict[str, Compiled],
    slice_devices: int,
    about: str,
) -> None:
    """Compile what is wanted and not yet compiled; a bar shows which program it is at."""
    names = [name for name in wanted if name not in compiled]
    with progress_bar("planning", len(names), "program") as bar:

        def tick() -> None:
            if sys.stderr.isatty():  # a log file gets a line a program, not one a second
                bar.refresh()

        for name in names:
            weights = plan.programs[name].call.weights
            if not weights or (weights in compiled and not compiled[weights].needed):
                bar.set_description_str(f"{name}: compiling")
                began = time.monotonic()
                compiled[name] = commands.abandonable(
                    partial(_compile, plan, name, compiled, slice_devices, about), tick
                )
                is_refused, seconds = compiled[name].needed, compiled[name].seconds
                size = "does not fit" if is_refused else f"{compiled[name].peak / GIB:.2f} GiB"
                is_known = time.monotonic() - began < seconds
                how = "compiled before" if is_known else "compiled"
                bar.write(f"{name}: {size}, {how} in {seconds:.0f} s", file=sys.stderr)
            bar.update()


def _compile(
    plan: Plan, name: str, compiled: dict[str, Compiled], slice_devices: int, about: str
) -> Compiled:
    planned, arguments = plan.programs[name], plan.arguments(name, compiled)
    # Others need to know where the outputs of these lie.
    is_laid_out = name in {each.call.weights for each in plan.programs.values()}
    return slices.compile_program(
        planned.call.program,
        arguments,
        planned.assumed,
        slice_devices,
        plan.is_tpu,
        plan.num_experts,
        "" if is_laid_out else about,
    )


def _code(plan: Plan, name: str, program: Compiled) -> int:
    """Return the bytes of a program as it is compiled for every shape of rows."""
    longest = plan.programs[name].call.longest
    return program.code * (len(longest.shapes) if longest else 1)


def _host(plan: Plan, mesh: Mesh, generation: Generation) -> HostPlan | None:
    """Return what the VM of the first device holds in its own memory, where that is known."""
    if not math.isfinite(generation.host_gb):
        return None
    num_devices = sum(device.process_index == 0 for device in mesh.devices.flat)
    num_chips = num_devices // generation.devices_per_chip
    sizes = {phase: num_devices * held / GIB for phase, held in plan.host.items()}
    return HostPlan(num_chips, num_chips * generation.host_gb * 1e9 / GIB, sizes)


def _phase(points: list[Point], plan: Plan, compiled: dict[str, Compiled], code: Held) -> PhasePlan:
    """Return the moment of a phase at which most memory is held, by kind, in GiB of a device."""
    moments = [
        _moment(point, plan, compiled, code)
        for point in points
        if not point.program or point.program in compiled
    ]
    program, kinds, own = max(moments, key=lambda moment: sum(moment[1].values()))
    total = sum(kinds.values())
    return PhasePlan(
        program=program or None,
        resident_gib=(total - own) / GIB,
        peak_gib=total / GIB,
        kinds_gib={kind: kinds[kind] / GIB for kind in KINDS if kinds.get(kind)},
    )


def _moment(
    point: Point, plan: Plan, compiled: dict[str, Compiled], code: Held
) -> tuple[str, dict[str, int], int]:
    """Return a program, all that is held while it runs, and how much of that is its own."""
    if not point.program:
        return "", memory.total(point.beside, code), 0
    planned, program = plan.programs[point.program], compiled[point.program]
    own = max(program.peak - sum(planned.kinds.values()), 0)
    caches = min(planned.caches, own)
    extra = {memory.CACHES: caches, memory.TEMPORARY: own - caches}
    return point.program, memory.total(point.beside, planned.kinds, extra, code), own


def _program(
    planned: PlannedProgram, program: Compiled, code: int, generation: Generation
) -> ProgramPlan:
    counts, is_refused = program.counts, bool(program.needed)
    plan = ProgramPlan(
        argument_gib=program.argument / GIB,
        temp_gib=None if is_refused else program.temp / GIB,
        output_gib=None if is_refused else (program.output - program.alias) / GIB,
        peak_gib=program.peak / GIB,
        flops=None,
        bytes=None,
        collectives=None,
        compile_s=round(program.seconds, 1),
        assumed=planned.note,
        note=program.note,
        code_gib=code / GIB,
    )
    if counts is None:
        return plan
    plan = replace(
        plan,
        **_work(counts.total, generation),
        pallas_kernels=counts.total.kernels,
        unknown_loops=counts.total.unknown_loops,
    )
    if not counts.loops or not planned.caches:
        return plan
    # A program that decodes: what is not in its loops is prefill, and a step is a turn of the last.
    prefill, steps = Counts(), 0
    prefill.add(counts.total)
    for turns, one in counts.loops:
        prefill.add(one, -turns)
        steps += turns
    last = counts.loops[-1][1]
    return replace(
        plan,
        prefill=Work(**_work(prefill, generation)),
        decode_step=DecodeStep(**_work(last, generation), steps=steps),
    )


def _work(counts: Counts, generation: Generation) -> dict[str, Any]:
    """Return the fields of `Work`."""
    bounds = {
        "flops": counts.flops / generation.flops,
        "bytes": counts.bytes / generation.bandwidth,
    }
    return {
        "flops": counts.flops,
        "bytes": counts.bytes,
        "collectives": {kind: Moved(**moved) for kind, moved in counts.collectives.items()},
        "lower_bound_s": bounds,
        "compiler_estimate_cycles": counts.cycles,
    }
