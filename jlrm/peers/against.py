"""The command `jlrm bench --against hf,trl,tunix`: our programs beside those of other libraries.

    bash launch/peers.sh .peers                          # makes their Pythons, once
    python -m jlrm.bench --against hf,trl,tunix --size small
    python -m jlrm.bench --against trl --size judge --phases sft,dpo,bradley_terry

One model with random weights, in float32 on this machine's CPU (`--device`, `--dtype`), and one
batch for all. Rollouts draw every token at temperature 1; an update is one step of GRPO on a given
batch; an iteration is a rollout, its rewards, log-probabilities of the reference, and an update.
The stages sft, dpo and bradley_terry take a step on pairs of answers to one prompt; DPO computes
the log-probabilities of its reference in each. Whether all compute the same is seen in float32
always.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence

from jlrm.config import RunError, UsageError, nearest
from jlrm.peers import measure, workload
from jlrm.peers.measure import GRPO, PHASES, AgainstResult, CheckedPeer, PeerFigures
from jlrm.peers.processes import DEVICES, LIBRARIES, MALLOCS, OURS, Site
from jlrm.peers.workload import PAIRS, PROMPTS, ROLLOUTS, SIZES, STAGES
from jlrm.reports import contracts, tables

FLAG = "--against"
COLUMNS = ("phase", "library", "malloc", "s", "least", "most", "times ours", "low", "high", "GiB")
MOST = 86400  # turns, and seconds of one


def is_asked(words: Sequence[str]) -> bool:
    """Return whether the arguments of `jlrm bench` ask for this command."""
    return any(word.partition("=")[0] == FLAG for word in words)


def main(words: Sequence[str]) -> None:
    """Parse the command line, measure, and print; also what is known when something stops it.

    Raises:
      UsageError: no library that was named is installed.
      RunError: none could be timed.
    """
    args = _parser().parse_args(words)
    names = _listed(FLAG, args.against, [name for name in LIBRARIES if name != OURS])
    phases = _listed("--phases", args.phases, PHASES)
    for flag, value in (("--repeats", args.repeats), ("--patience", args.patience)):
        if not 0 < value <= MOST:
            raise UsageError(f"{flag} {value} is outside 1 to {MOST}.")
    size, load = SIZES[args.size], os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="jlrm-against-") as directory:
        site = Site(
            pathlib.Path(directory), args.peers.expanduser().absolute(), args.patience, args.device
        )
        stages = [phase for phase in phases if phase in STAGES]
        workload.write(site.workload, size, args.device, args.dtype, stages)
        checked = measure.check(site, names)
        able = [each.library for each in checked if not each.refused and each.library != OURS]
        _refuse_missing(checked)
        figures: list[PeerFigures] = []
        try:
            drawn = PROMPTS * ROLLOUTS, size.new_tokens
            for each in measure.measure(site, able, phases, drawn, args.repeats):
                figures.append(each)
        finally:
            result = AgainstResult(
                args.size,
                args.device,
                args.dtype,
                args.repeats,
                _num_cores(),
                load,
                os.getloadavg()[0],
                tuple(checked),
                tuple(sorted(figures, key=_order)),
            )
            print(json.dumps(contracts.encode(result)) if args.json else describe(result))
    if not any(each.times_ours for each in figures):
        raise RunError("no library could be timed; the reasons stand above.")


def _listed(flag: str, given: str, known: Sequence[str]) -> list[str]:
    """Return the names that a flag lists, each once."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"{flag}: {name} is not known. {nearest(name, known)}")
    if not names:
        raise UsageError(f"{flag} names nothing. Known: {', '.join(known)}.")
    return list(dict.fromkeys(names))


def _num_cores() -> int:
    """Return how many cores this process and those that it starts may use."""
    if hasattr(os, "sched_getaffinity"):  # which macOS does not have
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_missing(checked: Sequence[CheckedPeer]) -> None:
    """Refuse to go on where no library at all is installed."""
    others = [each for each in checked if each.library != OURS]
    if all(each.is_missing for each in others):
        reasons = "; ".join(f"{each.library} is {each.refused}" for each in others)
        raise UsageError(
            f"{reasons}. Make the Pythons that --peers DIR names by bash launch/peers.sh DIR."
        )


def _order(figures: PeerFigures) -> tuple[int, int, int]:
    names = list(LIBRARIES)
    malloc = list(MALLOCS).index(figures.malloc)
    return PHASES.index(figures.phase), malloc, names.index(figures.library)


def describe(result: AgainstResult) -> str:
    """Return the result as text: what was computed, the check, and a table of times."""
    size = SIZES[result.size]
    lines = [
        f"{result.size}: {size.num_weights / 1e6:.1f} million random weights, {result.dtype} "
        f"on the {result.device}; "
        f"{PROMPTS} prompts of {size.prompt_tokens // 2} to {size.prompt_tokens} tokens, "
        f"{ROLLOUTS} completions of {size.new_tokens} tokens each. Other stages than GRPO: {PAIRS} "
        f"prompts of {size.prompt_tokens} tokens with two answers of {size.new_tokens} each.",
        "",
    ]
    lines += [_check_line(each) for each in result.checked]
    if result.figures:
        lines += ["", tables.table([_row(each) for each in result.figures], COLUMNS), ""]
        lines += [
            f"{each.library}, {each.phase}, malloc {each.malloc}: {each.failed}."
            for each in result.figures
            if each.failed
        ]
        held = "memory of the GPU" if result.device == "gpu" else "resident memory"
        lines.append(
            f"Medians of {result.repeats} turns after {measure.WARM} that do not count; times "
            f"ours: of each turn over ours beside it. GiB: most {held} of a process with "
            f"this phase alone. {result.cores} cores, load {result.load_before:.1f} before and "
            f"{result.load_after:.1f} after, our own processes included."
        )
    return "\n".join(lines)


def _check_line(checked: CheckedPeer) -> str:
    versions = ", ".join(f"{name} {of}" for name, of in (checked.versions or {}).items())
    start = f"{checked.library} ({versions})" if versions else checked.library
    if checked.refused:
        return f"{start}: not timed, {checked.refused}."
    if checked.library == OURS:
        return f"{start}: what the others are held against."
    stages = "".join(
        f", {stage} by {difference:.1g}"
        for stage, difference in (checked.stage_differences or {}).items()
    )
    bound = f"; losses of the first steps{stages} (bound {measure.STAGE_TOLERANCE:g})"
    return (
        f"{start}: log-probabilities differ by {checked.logp_difference:.1g} at most (bound "
        f"{measure.LOGP_TOLERANCE:g}), the loss by {checked.loss_difference:.1g} (bound "
        f"{measure.LOSS_TOLERANCE:g}){bound if stages else ''}."
    )


def _row(figures: PeerFigures) -> dict[str, object]:
    row: dict[str, object] = {
        "phase": figures.phase,
        "library": figures.library,
        "malloc": figures.malloc,
    }
    if figures.seconds:
        row |= zip(("s", "least", "most"), contracts.encode(figures.seconds).values(), strict=True)
    if figures.times_ours:
        ratio = contracts.encode(figures.times_ours)
        row |= zip(("times ours", "low", "high"), ratio.values(), strict=True)
    if figures.peak_bytes is not None:
        row["GiB"] = figures.peak_bytes / 2**30
    return row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m jlrm.bench {FLAG}", description=(__doc__ or "").split("\n")[0]
    )
    known = ", ".join(name for name in LIBRARIES if name != OURS)
    add = parser.add_argument
    add(FLAG, required=True, metavar="NAMES", help=f"with commas between them: {known}")
    add("--size", choices=SIZES, default="tiny", help="of the model and the batch (tiny)")
    phases = f"with commas between them ({','.join(GRPO)}); also {', '.join(STAGES)}"
    add("--phases", default=",".join(GRPO), metavar="NAMES", help=phases)
    add("--device", choices=DEVICES, default="cpu", help="where all of them run (cpu)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (float32)")
    add("--repeats", type=int, default=5, metavar="N", help="turns that count (5)")
    add(
        "--peers",
        type=pathlib.Path,
        default=pathlib.Path(".peers"),
        metavar="DIR",
        help="what launch/peers.sh made (.peers)",
    )
    add("--patience", type=int, default=900, metavar="S", help="most of a turn, in seconds (900)")
    add("--json", action="store_true", help="print one JSON object on stdout")
    return parser
