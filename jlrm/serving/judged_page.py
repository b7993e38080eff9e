"""The page of a judged file: who wins and how sure, what the judge leans to, what to read.

It is drawn from `verdicts.jsonl` and `summary.json` alone, so it can be drawn again. What a judge
wrote is shown in full, as text.
"""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jlrm.config import UsageError
from jlrm.reports import charts, contracts
from jlrm.reports.charts import Bar, Chart, Mark
from jlrm.reports.evaluated import shown_name, whole_interval
from jlrm.reports.pages import write_page
from jlrm.reports.results_file import ItemRate
from jlrm.reports.theme import LIGHT, colour
from jlrm.serving import tally
from jlrm.serving.results import VERSION, VerdictLine
from jlrm.serving.tally import JudgingSummary

VERDICTS, SUMMARY, PAGE = "verdicts.jsonl", "summary.json", "report.html"
MOST_SHOWN = 50  # pairs of a section; the rest is counted, and stands in verdicts.jsonl
OPEN = 3  # of them, which are not folded
OUTCOMES = (("answer 1", 1, colour(0)), ("tie", 0, LIGHT.faint), ("answer 2", 2, colour(4)))
MEANINGS = {  # of the statuses of games; the others are forms that the parser does not read
    "ok": "a verdict was read",
    "unjudged": "no response; the row says why",
    "refused": "the server would not judge",
    "cut": "cut off before a verdict",
    "no_think_end": "the reasoning did not end",
}
UNREAD = "no verdict that the parser reads"


class PairsToRead(NamedTuple):
    """Pairs to be read: those shown, and how many there are in all."""

    title: str
    note: str
    pairs: Sequence[VerdictLine]
    total: int


def is_judged(directory: pathlib.Path) -> bool:
    """Return whether a directory is what `jlrm judge` has written."""
    return (directory / VERDICTS).is_file() and (directory / SUMMARY).is_file()


def write(directory: pathlib.Path) -> None:
    """Draw `report.html` of a judged file.

    Raises:
      UsageError: the directory holds other files, or scores of single answers, which have no page.
    """
    found, lines = tally.read(directory / SUMMARY), read_lines(directory / VERDICTS)
    statuses = Counter(game.status for line in lines for game in line.games)
    errors = [line for line in lines if line.error is not None]
    flipped = [
        line
        for line in lines
        if line.is_consistent is False and all(game.winner is not None for game in line.games)
    ]
    wrong = [
        line
        for line in lines
        if line.is_consistent is not False
        and None not in (line.label, line.winner)
        and line.winner != line.label
    ]
    readings = [
        PairsToRead(
            "The orders disagree",
            "The same answers in both orders, with two winners: what the judge wrote follows the "
            "place, or the pair is close.",
            flipped[:MOST_SHOWN],
            len(flipped),
        ),
        PairsToRead(
            "Against the label",
            "The verdict names another answer than the label, whichever stands first.",
            wrong[:MOST_SHOWN],
            len(wrong),
        ),
    ]
    write_page(
        directory / PAGE,
        "judged.html",
        title=found.pairs or directory.resolve().name,
        found=found,
        judge=shown_name(found.judge),
        rates=_rates(found),
        charts=[chart for chart in (_wins(found), _leans(found)) if chart],
        statuses=[
            (name, count, MEANINGS.get(name, UNREAD)) for name, count in statuses.most_common()
        ],
        errors=errors[:MOST_SHOWN],
        num_errors=len(errors),
        readings=[each for each in readings if each.total],
        num_open=OPEN,
    )


def read_lines(path: pathlib.Path) -> list[VerdictLine]:
    """Return the lines of a `verdicts.jsonl`.

    Raises:
      UsageError: a line that is none, or one of a single answer.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"{place} is no JSON. Run jlrm judge again.") from None
        if not isinstance(row, dict) or "games" not in row or row.get("version", 0) > VERSION:
            raise UsageError(f"{place} is no verdict on a pair of answers of this version of jlrm.")
        lines.append(contracts.decode(VerdictLine, row, place))
    return lines


def _rates(found: JudgingSummary) -> list[tuple[str, ItemRate, str]]:
    """Return the shares that there are, each with what it says."""
    rates = [
        ("Answer 1 wins", found.share_1, "of N verdicts, ties half"),
        ("Both orders agree", found.consistency, "of N pairs"),
        ("Names the first shown", found.first, "of N games"),
        ("Names the longer", found.longer, "of N games"),
        ("Agrees with the label", found.agreement, "of N rows with one"),
    ]
    return [(title, rate, note) for title, rate, note in rates if rate and rate.percent is not None]


def _wins(found: JudgingSummary) -> Chart | None:
    counts = {1: found.wins_1, 0: found.ties, 2: found.wins_2}
    silent = found.rows - sum(counts.values())
    parts = [(name, hue) for name, _, hue in OUTCOMES] + [("no verdict", LIGHT.soft)]
    sizes = [float(counts[number]) for _, number, _ in OUTCOMES] + [float(silent)]
    text = ", ".join(f"{name} {size:.0f}" for (name, _), size in zip(parts, sizes, strict=True))
    chart = charts.stacks("Winners", [Bar("pairs", sizes)], parts)
    return chart._replace(note=text, alt=f"Winners: {text}")


def _leans(found: JudgingSummary) -> Chart | None:
    rows = []
    for title, rate, _ in _rates(found):
        rows.append((title, [Mark(rate.percent, whole_interval(rate.interval), 0)]))
    if not rows:
        return None
    chart = charts.dots("Shares (%)", rows, is_percent=True)
    return chart._replace(note="Lines: 95 % intervals, which draw whole questions")
