"""Does a run fit a TPU slice: `python -m jlrm.plan --config FILE --topology v5e:4x4`.

Every program of the run is compiled for the slice, on this machine and without weights or data:
`libtpu` compiles for chips that are not here. Beside each program's own memory stands what train.py
keeps alive while it runs (phases.py), and the sum is held against the chip's limit as the compiler
enforces it. FLOPs, bytes and collectives are counted in the compiled programs (counting.py).

    load        weights born or read, the optimiser's state; a run that goes on after a stop
    rollout     weights laid out for decoding, prefill and decoding
    logprobs    log-probabilities of the reference, and of the policy where they are needed
    update      the optimiser step
    evaluation  held-out rollouts
    checkpoint  a save, and a rollout that is under way then

Nothing here is a speed. Lower bounds are FLOPs and bytes over data-sheet rates: no program is
faster, and how much slower it is only a run can tell.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from jlrm.config import Config, RunError, UsageError, stages_of
from jlrm.model.qwen import QwenConfig
from jlrm.planning import memory, phases, slices
from jlrm.planning.counting import Counts
from jlrm.planning.figures import DecodeStep, Moved, PhasePlan, ProgramPlan, SlicePlan, Work
from jlrm.planning.memory import KINDS, Point
from jlrm.planning.page import describe, verdict, write
from jlrm.planning.phases import Plan, PlannedProgram
from jlrm.planning.slices import GIB, Compiled, Generation
from jlrm.reports import contracts
from jlrm.runtime import commands
from jlrm.runtime.mesh import create_mesh
from jlrm.runtime.settings import load
from jlrm.runtime.settings_help import add_settings
from jlrm.weights import hf, hf_config
from jlrm.weights.source import read_model
from jlrm.weights.steps import split

NOT_AHEAD = "grpo.ahead=none"  # changes what is held, and no program


def make_plan(
    config: Config,
    topology: str,
    num_slices: int = 1,
    only: Sequence[str] = (),
    known: dict[str, Compiled] | None = None,
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
    compiled = {} if known is None else known
    if plan.resident <= generation.hbm_gib * GIB:  # else nothing need be compiled to know
        wanted = [name for name in plan.programs if not only or name in only]
        _compile_all(plan, wanted, compiled, mesh.size // num_slices if num_slices > 1 else 0)
    by_phase = {
        name: _phase(points, plan, compiled)
        for name, points in plan.phases.items()
        if any(not point.program or point.program in compiled for point in points)
    }
    peaks = [phase.peak_gib for phase in by_phase.values()]
    peak = max(*peaks, *(program.peak / GIB for program in compiled.values()))
    is_refused = any(program.needed for program in compiled.values())
    return SlicePlan(
        fits=peak <= generation.hbm_gib and not is_refused,
        peak_gib=peak,
        limit_gib=generation.hbm_gib,
        topology=topology,
        slices=num_slices,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        model=source,
        programs={
            name: _program(planned, compiled[name], generation)
            for name, planned in plan.programs.items()
            if name in compiled
        },
        phases=by_phase,
        not_compiled=tuple(name for name in plan.programs if name not in compiled),
    )


def open_model(config: Config) -> tuple[QwenConfig, str]:
    """Return the architecture, and where it was read; of a hub model, its config.json alone."""
    source = config.model
    try:
        model = read_model(config)
    except UsageError:
        if not source.path:
            raise
        numerics = {n: getattr(source, n) for n in ("param_dtype", "compute_dtype", "remat")}
        directory = hf.resolve(source.path, ("config.json",))
        return hf_config.read_config(directory, **numerics), f"config.json of {source.path}"
    if source.path and not pathlib.Path(split(source.path)[0]).expanduser().exists():
        return model, f"{source.path}, as the built-in shape of that name (nothing is downloaded)"
    return model, source.path or f"preset {source.preset}"


# --- Compiling and adding up ---


def _compile_all(
    plan: Plan, wanted: Sequence[str], compiled: dict[str, Compiled], slice_devices: int
) -> None:
    """Compile what is wanted and not yet compiled; a bar shows which program it is at."""
    names = [name for name in wanted if name not in compiled]
    form = "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}]"
    with tqdm(total=len(names), file=sys.stderr, bar_format=form, dynamic_ncols=True) as bar:
        for name in names:
            weights = plan.programs[name].call.weights
            if not weights or (weights in compiled and not compiled[weights].needed):
                bar.set_description_str(f"{name}: compiling")
                compiled[name] = commands.abandonable(
                    partial(_compile, plan, name, compiled, slice_devices), bar.refresh
                )
                is_refused, seconds = compiled[name].needed, compiled[name].seconds
                size = "does not fit" if is_refused else f"{compiled[name].peak / GIB:.2f} GiB"
                bar.write(f"{name}: {size}, compiled in {seconds:.0f} s", file=sys.stderr)
            bar.update()


def _compile(plan: Plan, name: str, compiled: dict[str, Compiled], slice_devices: int) -> Compiled:
    planned, arguments = plan.programs[name], plan.arguments(name, compiled)
    return slices.compile_program(planned.call.program, arguments, planned.assumed, slice_devices)


def _phase(points: list[Point], plan: Plan, compiled: dict[str, Compiled]) -> PhasePlan:
    """Return the moment of a phase at which most memory is held, by kind, in GiB of a device."""
    moments = [
        _moment(point, plan, compiled)
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
    point: Point, plan: Plan, compiled: dict[str, Compiled]
) -> tuple[str, dict[str, int], int]:
    """Return a program, all that is held while it runs, and how much of that is its own."""
    if not point.program:
        return "", dict(point.beside), 0
    planned, program = plan.programs[point.program], compiled[point.program]
    own = max(program.peak - sum(planned.kinds.values()), 0)
    caches = min(planned.caches, own)
    extra = {memory.CACHES: caches, memory.TEMPORARY: own - caches}
    return point.program, memory.total(point.beside, planned.kinds, extra), own


def _program(planned: PlannedProgram, program: Compiled, generation: Generation) -> ProgramPlan:
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


# --- Searching ---


def search(
    config: Config, path: str, overrides: Sequence[str], kind: str, num_slices: int
) -> SlicePlan:
    """Return the plan of the smallest slice that fits, with the settings to add to the config.

    Raises:
      RunError: no slice of this generation is large enough.
    """
    for name in slices.GENERATIONS[kind].slices:
        topology = f"{kind}:{name}"
        compiled: dict[tuple[str, ...], dict[str, Compiled]] = {}
        for added in _settings(config, topology, num_slices):
            changed = load(path, [*overrides, *added])
            label = f"{topology} {' '.join(added)}"
            programs = tuple(setting for setting in added if setting != NOT_AHEAD)
            known = compiled.setdefault(programs, {})
            try:
                plan = _attempt(changed, topology, num_slices, label, known)
            except UsageError as error:
                print(f"{label}: {error}", file=sys.stderr)
                continue
            if plan is not None:
                return replace(plan, overrides=tuple(added))
    raise RunError(f"No slice of {kind} that is known here is large enough for {path}.")


def _attempt(
    config: Config, topology: str, num_slices: int, label: str, known: dict[str, Compiled]
) -> SlicePlan | None:
    """Check what needs no compiling, then what most often does not fit, then the rest."""
    mesh = create_mesh(config.mesh, slices.devices(topology, num_slices))
    model, _ = open_model(config)
    limit, plan = slices.find(topology).hbm_gib, phases.plan(config, model, mesh)
    held = _held(plan) / GIB
    if held > limit:
        print(f"{label}: no, {held:.2f} GiB are held without what programs need", file=sys.stderr)
        return None
    # Updates first: they are what most often does not fit.
    result: SlicePlan | None = None
    for only in (plan.updates(), ()):
        result = make_plan(config, topology, num_slices, only, known)
        outcome = "fits" if result.fits else "no"
        part = "/".join(only) or "all"
        print(f"{label}: {outcome} ({part}: {result.peak_gib:.2f} GiB)", file=sys.stderr)
        if not result.fits:
            return None
    return result


def _held(plan: Plan) -> int:
    """Return the most that is held at any moment, apart from programs' temporaries."""
    return max(
        sum(point.beside.values())
        + (sum(plan.programs[point.program].kinds.values()) if point.program else 0)
        for points in plan.phases.values()
        for point in points
    )


def _settings(config: Config, topology: str, num_slices: int) -> Iterator[list[str]]:
    """Yield settings to try on a slice: meshes near a square first, then what saves memory."""
    size = slices.find(topology).slices[topology.partition(":")[2]]
    pairs = [(size // n, n) for n in range(1, size + 1) if size % n == 0]
    pairs.sort(key=lambda pair: (abs(math.log(pair[0] / pair[1])), pair[1]))
    model, _ = open_model(config)
    divides = [
        (fsdp, tensor)
        for fsdp, tensor in pairs
        if model.num_key_value_heads % tensor == 0 and model.head_dim % fsdp == 0
    ]
    savings: list[list[str]] = [[]]
    if config.model.remat != "full":
        savings.append(["model.remat=full"])
    stages = stages_of(config)
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    shorter = savings[-1] + [f"{stage}.pack_tokens={longest}" for stage in stages]
    savings.append(shorter)
    if "grpo" in stages and config.grpo.ahead == "next":
        savings.append([*savings[-1], NOT_AHEAD])
    savings.append([*savings[-1], *(f"{s}.optimizer.mu_dtype=bfloat16" for s in stages)])
    for saving in savings:
        for fsdp, tensor in divides[:2]:
            yield [f"mesh.data={num_slices}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", *saving]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compile, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.plan",
        description="Compile every program of a config for a TPU slice that need not be here, and "
        "say whether the run fits its memory. Needs no weights, no data and no TPU.",
        epilog="Exit code: 0 fits, 1 does not fit, 2 wrong input.",
    )
    add_settings(parser)
    parser.add_argument("--topology", metavar="SLICE", help="e.g. v5e:4x4, v5p:2x2x2, v6e:2x4")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="equal slices (1)")
    parser.add_argument(
        "--search",
        nargs="?",
        const="",
        metavar="GENERATION",
        help="find the smallest slice that fits, and a mesh for it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--out", metavar="DIR", help="write plan.json, .md, .html and .png there")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change a setting"
    )
    args = parser.parse_intermixed_args(argv)
    kind = None if args.search is None else args.search or (args.topology or "").partition(":")[0]
    if kind and "=" in kind:  # a setting that stood after a bare --search
        args.overrides, kind = [kind, *args.overrides], (args.topology or "").partition(":")[0]
    if kind is not None and kind not in slices.GENERATIONS:
        raise UsageError(f"--search {kind}: name one of {', '.join(slices.GENERATIONS)}.")
    if kind is None and not args.topology:
        raise UsageError("Name a slice, e.g. --topology v5e:4x4, or --search v5e.")
    config = load(args.config, args.overrides)
    slices.prepare()
    if kind is None:
        result = make_plan(config, args.topology, args.slices)
    else:
        result = search(config, args.config, args.overrides, kind, args.slices)
    text = json.dumps(contracts.encode(result)) if args.json else describe(result)
    print(text, flush=True)
    if args.out:
        write(result, pathlib.Path(args.out))
    if not result.fits:
        raise RunError(verdict(result))


if __name__ == "__main__":
    sys.exit(commands.run(main))
