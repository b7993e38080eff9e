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

Compiled programs lie in HBM too, one for each shape of rows. A run fits if 8 % of the limit is left
over (`--headroom`), since temporary memory must be in one piece. What a VM's own memory holds is
counted beside that.

Nothing here is a speed. Lower bounds are FLOPs and bytes over data-sheet rates: no program is
faster, and how much slower it is only a run can tell. `planning/duration.py` estimates that.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jlrm.config import Config, RunError, UsageError, stages_of
from jlrm.planning import phases, slices
from jlrm.planning.figures import SlicePlan
from jlrm.planning.page import describe, verdict, write
from jlrm.planning.slice_plan import NO_WISHES, Wishes, held, make_plan, open_model
from jlrm.planning.slices import GIB, Compiled
from jlrm.reports import contracts
from jlrm.runtime import commands
from jlrm.runtime.mesh import create_mesh
from jlrm.runtime.settings import load
from jlrm.runtime.settings_help import add_settings

NOT_AHEAD = "grpo.ahead=none"  # changes what is held, and no program


MORE_SLICES = 2  # after the smallest that fits, when hours and cost are asked for


def search(
    path: str, overrides: Sequence[str], kind: str, num_slices: int, wishes: Wishes
) -> Iterator[SlicePlan]:
    """Yield the plan of the smallest slice that fits, with the settings to add to the config.

    Where hours are asked for, the next slices follow, each with its own.

    Raises:
      RunError: no slice of this generation is large enough.
    """
    num_found, wanted = 0, 1 if wishes.num_steps is None else 1 + MORE_SLICES
    for name in slices.GENERATIONS[kind].slices:
        plan = _smallest(path, overrides, f"{kind}:{name}", num_slices, wishes)
        if plan is not None:
            yield plan
            num_found += 1
        if num_found == wanted:
            return
    if not num_found:
        raise RunError(f"No slice of {kind} that is known here is large enough for {path}.")


def _smallest(
    path: str, overrides: Sequence[str], topology: str, num_slices: int, wishes: Wishes
) -> SlicePlan | None:
    """Return the plan with the first settings with which a run fits a slice; None: with none."""
    compiled: dict[tuple[str, ...], dict[str, Compiled]] = {}
    for added in _settings(load(path, overrides), topology, num_slices):
        changed = load(path, [*overrides, *added])
        label = f"{topology} {' '.join(added)}"
        programs = tuple(setting for setting in added if setting != NOT_AHEAD)
        known = compiled.setdefault(programs, {})
        try:
            plan = _attempt(changed, topology, num_slices, label, known, wishes)
        except UsageError as error:
            print(f"{label}: {error}", file=sys.stderr)
            continue
        if plan is not None:
            return replace(plan, overrides=tuple(added))
    return None


def _attempt(
    config: Config,
    topology: str,
    num_slices: int,
    label: str,
    known: dict[str, Compiled],
    wishes: Wishes,
) -> SlicePlan | None:
    """Check what needs no compiling, then what most often does not fit, then the rest."""
    mesh = create_mesh(config.mesh, slices.devices(topology, num_slices))
    model, _ = open_model(config)
    plan = phases.plan(config, model, mesh)
    needed = held(plan) / GIB
    if needed > slices.find(topology).hbm_gib * (1 - wishes.headroom):
        print(f"{label}: no, {needed:.2f} GiB are held without what programs need", file=sys.stderr)
        return None
    # Updates first: they are what most often does not fit.
    result: SlicePlan | None = None
    for only in (plan.updates(), ()):
        result = make_plan(config, topology, num_slices, only, known, wishes)
        outcome = "fits" if result.fits else "no"
        part = "/".join(only) or "all"
        print(f"{label}: {outcome} ({part}: {result.peak_gib:.2f} GiB)", file=sys.stderr)
        if not result.fits:
            return None
    return result


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
    parser.add_argument(
        "--topology", metavar="SLICE", help="e.g. v5e:4x4, v5p:2x2x2, v6e:2x4; here: this machine"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="equal slices (1)")
    parser.add_argument(
        "--search",
        nargs="?",
        const="",
        metavar="GENERATION",
        help="find the smallest slice that fits, and a mesh for it",
    )
    parser.add_argument(
        "--headroom",
        type=_share,
        default=NO_WISHES.headroom,
        metavar="SHARE",
        help="of the memory, to stay free (0.08)",
    )
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="of the last stage: how long they take"
    )
    parser.add_argument(
        "--dollars-per-chip-hour", type=float, metavar="X", help="price, to say what the run costs"
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout, a line for a slice")
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
    wishes = Wishes(args.headroom, args.steps, args.dollars_per_chip_hour)
    if kind is not None or args.topology != slices.HERE:
        slices.prepare()
    if kind is None:
        results = iter([make_plan(config, args.topology, args.slices, wishes=wishes)])
    else:
        results = search(args.config, args.overrides, kind, args.slices, wishes)
    first: SlicePlan | None = None
    for result in results:
        text = json.dumps(contracts.encode(result)) if args.json else describe(result)
        print(text, flush=True)
        if first is None:
            first = result
            if args.out:
                write(result, pathlib.Path(args.out))
    if first is not None and not first.fits:
        raise RunError(verdict(first))


def _share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and less than 1")
    return float(text)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


if __name__ == "__main__":
    commands.finish(main)
