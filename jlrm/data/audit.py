"""Which rows each step drew and what became of them: `audit.jsonl`, and whether it adds up.

The one idea: a stage numbers the places that it fills with rows 0, 1, 2, ... An epoch is as many of
them as there are rows. Where every place was filled once, and no row stands twice in an epoch,
every row of a whole epoch was drawn exactly once: across stops, kills and other numbers of hosts,
and whatever was drawn more than once a step or ahead of it.

A line is a step: `rows`, those of each batch that it drew, `position`, the number of batches before
them, `fates`, what became of each, and `of`, how many rows there are. Rows are numbered as the run
holds them after it left some out; for GRPO with `data.orders: both` a pair is one.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.runtime import step_log

FILE = "audit.jsonl"
TRAINED = "trained"
SKIPPED = "skipped"  # in the step's batch, and out of its loss
DISCARDED = "discarded"  # drawn, and not taken into the batch
UNAPPLIED = "not_applied"  # trained on by a step that was not finite
FATES = (TRAINED, SKIPPED, DISCARDED, UNAPPLIED)

Line = Mapping[str, Any]


class Draws(NamedTuple):
    """What a step drew: rows of so many, batch by batch, and the fate of each."""

    of: int
    rows: list[list[int]]
    fates: list[list[str]]

    def unapplied(self) -> Draws:
        """Return the same of a step that moved no weight."""
        changed = {TRAINED: UNAPPLIED}
        return Draws(
            self.of, self.rows, [[changed.get(f, f) for f in fates] for fates in self.fates]
        )


def write(run_dir: pathlib.Path, stage: str, step: int, position: int, draws: Draws) -> None:
    """Append the line of a step. A full disk raises OSError."""
    line = {"stage": stage, "step": step, "position": position, **draws._asdict()}
    step_log.append(run_dir / FILE, line)


def read(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines in order; a last one torn by a kill is left out.

    Raises:
      UsageError: another line is not one that `write` has written.
    """
    lines = []
    for where, line in step_log.read(run_dir / FILE):
        if not _is_step(line):
            raise UsageError(f"{where} is no step of a run.")
        lines.append(line)
    return lines


def _is_step(line: Line) -> bool:
    """Return whether a line holds what `write` writes."""
    numbers = [line.get(name) for name in ("position", "of")]
    rows, fates = line.get("rows"), line.get("fates")
    if not (isinstance(rows, list) and isinstance(fates, list) and len(rows) == len(fates)):
        return False
    parts = [*rows, *fates]
    if not all(isinstance(part, list) for part in parts):
        return False
    numbers += [row for part in rows for row in part]
    return (
        all(type(number) is int for number in numbers)
        and line["of"] > 0
        and all(fate in FATES for part in fates for fate in part)
        and [len(part) for part in rows] == [len(part) for part in fates]
    )


def forget_after(
    run_dir: pathlib.Path, stage: str, last_step: int, keep_later: bool = False
) -> None:
    """Drop what stands behind a step of a stage, as going back to it does with all records."""
    step_log.go_back(run_dir / FILE, stage, last_step, keep_later=keep_later)


class StageAudit(NamedTuple):
    """What the lines of a stage come to."""

    stage: str
    steps: int
    rows: int
    epochs: float
    counts: dict[str, int]  # by fate
    faults: list[str]


def check(lines: Sequence[Line]) -> list[StageAudit]:
    """Return what each stage drew, and what does not add up."""
    stages = dict.fromkeys(line["stage"] for line in lines)
    return [_check_stage(name, [x for x in lines if x["stage"] == name]) for name in stages]


def _check_stage(name: str, lines: Sequence[Line]) -> StageAudit:
    counts = collections.Counter(f for line in lines for fates in line["fates"] for f in fates)
    faults = [*_gaps(lines), *_repeats(lines)]
    drawn, num_rows = sum(counts.values()), lines[-1]["of"]
    by_fate = {fate: counts[fate] for fate in FATES}
    return StageAudit(name, len(lines), num_rows, drawn / num_rows, by_fate, faults)


def _gaps(lines: Sequence[Line]) -> Iterator[str]:
    """Say where a step, or a batch of the data, is missing or stands twice."""
    step, position = 0, 0
    for line in lines:
        if line["step"] != step + 1:
            yield f"after step {step} comes step {line['step']}"
        if line["position"] != position:
            yield f"step {line['step']} drew batch {line['position']} of the data, not {position}"
        step, position = line["step"], line["position"] + len(line["rows"])


def _repeats(lines: Sequence[Line]) -> Iterator[str]:
    """Say which rows an epoch holds twice. Another number of rows begins other epochs."""
    seen: set[tuple[int, int, int]] = set()
    for line in lines:
        num_rows = line["of"]
        for number, rows in enumerate(line["rows"], start=line["position"]):
            for place, row in enumerate(rows, start=number * len(rows)):
                if not 0 <= row < num_rows:
                    yield f"step {line['step']} drew row {row}, of {num_rows}"
                key = num_rows, place // num_rows, row
                if key in seen:
                    yield f"step {line['step']} drew row {row} again in epoch {key[1] + 1}"
                seen.add(key)
