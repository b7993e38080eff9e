"""Does a judge judge as people do: verdicts beside labels, `python -m jlrm.judge check FILE`.

FILE is what `jlrm judge` writes, or any table with a column for the judge's verdicts and one for
the labels. A row without a verdict counts as wrong; a row without a label does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jlrm.config import RunError, UsageError, nearest
from jlrm.data import readers
from jlrm.evaluation.heuristics import HEURISTICS
from jlrm.evaluation.scoring import kappa
from jlrm.evaluation.statistics.diagnostics import calibration_error
from jlrm.judgement import labels
from jlrm.judgement.labels import Unusable
from jlrm.reports import contracts
from jlrm.reports.results_file import ItemRate, Rate
from jlrm.runtime import commands
from jlrm.serving import calibration
from jlrm.serving.calibration import ConfidenceMap
from jlrm.serving.tally import rate_by_question

VERSION = 1  # of what --json prints
VERDICTS = "verdicts.jsonl"  # in a directory of `jlrm judge`
CLASSES = (1, 2, 0)  # the better answer; 0: a tie
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the rows that are answered, the surest first


class Checked(NamedTuple):
    """One row: the judge's verdict and the label, 1, 2 or 0; None where there is none."""

    judge: int | None
    human: int | None
    confidence: float | None = None
    question: str = ""
    longer: int | None = None  # the longer answer; None where not known, or both are as long
    is_calibrated: bool = False  # the confidence went through a map


@dataclass(frozen=True)
class Abstention:
    """Accuracy on the rows of which the judge is surest, of those where an answer is better."""

    share: float
    rows: int
    accuracy: float


@dataclass(frozen=True)
class Audit:
    """How a judge's verdicts stand to labels. Shares are in percent, intervals of 95 %.

    kappa: Cohen's, of the rows with both; alpha: Krippendorff's, nominal. ece: of the stated
    confidence, in points, on rows where verdict and label name an answer.
    """

    rows: int
    unread: int
    agreement: ItemRate
    kappa: float | None
    alpha: float | None
    recall: dict[str, Rate]
    longer_judge: Rate | None
    longer_human: Rate | None
    ece: float | None
    abstention: tuple[Abstention, ...]
    calibration: ConfidenceMap | None = None
    version: int = VERSION


def audit(rows: Sequence[Checked], is_calibrated: bool = False) -> Audit:
    """Compare verdicts with labels; with `is_calibrated` fit a map of the confidence too.

    Raises:
      UsageError: no row has a label; too few rows to fit a map.
    """
    labelled = [row for row in rows if row.human is not None]
    if not labelled:
        raise UsageError("No row has a label, so there is nothing to compare the verdicts with.")
    right = [float(row.judge == row.human) for row in labelled]
    agreement = rate_by_question([row.question for row in labelled], right)
    assert agreement is not None  # there are rows
    both = [(row.judge, row.human) for row in labelled if row.judge is not None]
    sure = [r for r in labelled if r.confidence is not None and r.judge in (1, 2) and r.human]
    stated = np.array([row.confidence for row in sure], float)
    is_right = np.array([float(row.judge == row.human) for row in sure])
    return Audit(
        rows=len(labelled),
        unread=sum(row.judge is None for row in labelled),
        agreement=agreement,
        kappa=kappa(*zip(*both, strict=True)) if both else None,
        alpha=alpha(both),
        recall={
            {1: "answer 1", 2: "answer 2", 0: "tie"}[label]: _rate(
                [row.judge == label for row in labelled if row.human == label]
            )
            for label in CLASSES
        },
        longer_judge=_longer(labelled, "judge"),
        longer_human=_longer(labelled, "human"),
        ece=calibration_error(stated, is_right) if sure else None,
        abstention=tuple(_abstentions(stated, is_right)) if sure else (),
        calibration=_calibration(labelled, sure) if is_calibrated else None,
    )


def _calibration(labelled: Sequence[Checked], sure: Sequence[Checked]) -> ConfidenceMap:
    """Fit a map of the confidence, and where labels are ties too the bound of ties."""
    fitted = calibration.fit(
        [row.confidence or 0.0 for row in sure],
        [row.judge == row.human for row in sure],
        [row.question for row in sure],
    )
    said = [row for row in labelled if row.judge == 0 or (row.judge and row.confidence is not None)]
    if not any(row.human == 0 for row in said):
        return fitted
    bound, agreement = calibration.fit_ties(
        [(row.confidence or 0.5) if row.judge else 0.5 for row in said],
        [row.judge or 0 for row in said],
        [row.human or 0 for row in said],
        [row.question for row in said],
    )
    return dataclasses.replace(fitted, tie_below=bound, agreement=agreement)


def alpha(pairs: Sequence[tuple[int | None, int | None]]) -> float | None:
    """Return Krippendorff's alpha for nominal data of two raters; None without disagreement to
    expect.
    """
    values = Counter(value for pair in pairs for value in pair)
    num = 2 * len(pairs)
    if num < 2:
        return None
    expected = sum(n * (num - n) for n in values.values()) / (num - 1)
    observed = 2 * sum(one != two for one, two in pairs)
    return 1 - observed / expected if expected else None


def _rate(values: Sequence[bool]) -> Rate:
    return Rate(100 * sum(values) / len(values) if values else None, len(values))


def _longer(rows: Sequence[Checked], who: str) -> Rate | None:
    named = [row for row in rows if row.longer and getattr(row, who) in (1, 2)]
    return _rate([getattr(row, who) == row.longer for row in named]) if named else None


def _abstentions(stated: np.ndarray, right: np.ndarray) -> Iterator[Abstention]:
    order = np.argsort(-stated, kind="stable")
    for share in SHARES:
        kept = right[order[: max(round(share * len(order)), 1)]]
        yield Abstention(share, len(kept), 100 * float(kept.mean()))


# --- The command ---


def read(
    source: str, judge: str, human: str, values: Mapping[str, str] | None = None
) -> list[Checked]:
    """Read verdicts and labels from a table, or from the directory that `jlrm judge` wrote.

    Args:
      values: what labels mean, as `labels.meanings` takes it.

    Raises:
      UsageError: no such file or column, or a value that names no class.
    """
    rows: list[Checked] = []
    known, written = labels.meanings(values or {}), pathlib.Path(source) / VERDICTS
    source = str(written) if written.is_file() else source
    for place, raw in readers.checked_rows(source, {}):
        where = str(place._replace(source=source))
        if not isinstance(raw, dict):
            raise UsageError(f"{where} must be an object, got {type(raw).__name__}.")
        for flag, name in (("judge", judge), ("human", human)):
            if name not in raw:
                raise UsageError(
                    f"{where} has no column '{name}'. {nearest(name, raw)} Name it by --{flag}."
                )
        rows.append(
            Checked(
                _class(raw[judge], {}, where),
                _class(raw[human], known, where),
                _confidence(raw.get("confidence"), where),
                str(raw.get("question") or ""),
                longer(raw.get("answer_1"), raw.get("answer_2")),
                raw.get("is_calibrated") is True,
            )
        )
    if not rows:
        raise UsageError(f"{source} has no rows.")
    return rows


def _class(value: Any, known: Mapping[str, int], where: str) -> int | None:
    try:
        return labels.preference(value, known, where)
    except Unusable:  # a graded label between two classes
        return None


def _confidence(value: Any, where: str) -> float | None:
    if labels.is_missing(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise UsageError(f"{where}: confidence must be a number from 0 to 1, got {value!r}.")
    return number


def longer(one: Any, two: Any) -> int | None:
    """Return which of two texts is longer; None if neither is, or one is no text."""
    if not isinstance(one, str) or not isinstance(two, str):
        return None
    return HEURISTICS["longer"](one, two) or None


def lines(found: Audit) -> Iterator[str]:
    """Yield an audit as text."""
    low, high = found.agreement.interval or (float("nan"), float("nan"))
    yield f"{found.rows} labelled rows, {found.unread} without a verdict"
    yield (
        f"  {'agreement':26}{found.agreement.percent:.1f} % [{low:.1f}, {high:.1f}]"
        f", kappa {_number(found.kappa)}, alpha {_number(found.alpha)}"
        + (f" (these two of the {found.rows - found.unread} read)" if found.unread else "")
    )
    for name, rate in found.recall.items():
        if rate.percent is not None:
            yield f"  {'recall of ' + name:26}{rate.percent:.1f} % of {rate.n}"
    if found.longer_judge and found.longer_human:
        yield (
            f"  {'names the longer answer':26}{found.longer_judge.percent:.1f} %, "
            f"the labels {found.longer_human.percent:.1f} %"
        )
    if found.ece is not None:
        yield f"  {'calibration error':26}{found.ece:.1f} points"
        told = ", ".join(f"{each.accuracy:.1f} % of {each.rows}" for each in found.abstention)
        yield f"  {'right among the surest':26}{told}"
    if found.calibration:
        made = found.calibration
        yield (
            f"  {'after a fitted map':26}{made.ece[1]:.1f} points, on questions that it had not "
            f"seen ({made.method}, {made.rows} rows)"
        )
        if made.agreement:
            plain, with_ties = made.agreement
            yield (
                f"  {'agreement with ties':26}{with_ties:.1f} % likewise, where verdicts stating "
                f"up to {100 * made.tie_below:.1f} % are ties; {plain:.1f} % where equal scores are"
            )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def main(argv: Sequence[str]) -> None:
    """Parse the command line of `judge check`, audit, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.judge check", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("file", help="--out of `jlrm judge`, or a table (.jsonl, .csv, .tsv, .parquet)")
    add("--judge", default="winner", metavar="COLUMN", help="of the verdicts (winner)")
    add("--human", default="label", metavar="COLUMN", help="of the labels (label)")
    commands.add_pair_flags(parser, ["values"])
    add("--at-least", type=float, metavar="SHARE", help="end with 1 if fewer agree, e.g. 0.6")
    add("--calibrate", action="store_true", help="fit a map of the confidence, and save it")
    add(
        "--out",
        type=pathlib.Path,
        metavar="PATH",
        help="of the map: a file, or the directory of the run or export whose judge is to use it "
        "(calibration.json beside FILE)",
    )
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.at_least is not None and not 0 <= args.at_least <= 1:
        raise UsageError(f"--at-least={args.at_least}: wanted a share from 0 to 1.")
    values = commands.read_pair_flags(args)["values"]
    try:
        rows = read(args.file, args.judge, args.human, values)
    except UsageError as error:  # labels are read as those of a training config
        raise UsageError(str(error).replace("data.values=", "--values ")) from None
    if args.calibrate and any(row.is_calibrated for row in rows):
        raise UsageError(
            f"{args.file} holds confidences that went through a map already. Judge again with "
            "--calibration none, and fit it to those."
        )
    found = audit(rows, args.calibrate)
    print(json.dumps(contracts.encode(found)) if args.json else "\n".join(lines(found)))
    if found.calibration:
        given = pathlib.Path(args.file)
        path = args.out or (given if given.is_dir() else given.parent)
        path = path / calibration.NAME if path.is_dir() else path
        calibration.write(path, found.calibration)
        if not args.json:
            print(f"Written: {path}")
    agreement = found.agreement.percent or 0.0
    if args.at_least is not None and agreement < 100 * args.at_least:
        raise RunError(
            f"{agreement:.1f} % of the rows agree, fewer than {100 * args.at_least:g} %."
        )
