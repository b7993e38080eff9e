"""`results.json`: what one judge earned on benchmarks, and all that is known of how it judges.

`evaluation/` makes these values, `jlrm.evaluate` writes the file, and pages and model cards show
it. A percent is from 0 to 100; None is a number that nothing can be computed from.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

from jlrm.config import UsageError
from jlrm.reports import contracts
from jlrm.reports.contracts import LEFT_OUT, key

VERSION = 1
NAME = "results.json"
Interval = tuple[float | None, float | None]  # low, high: 95 %


@dataclass(frozen=True)
class JudgeRecord:
    """Who judged, and the settings that shaped its responses."""

    name: str = ""  # in reports
    model: str = ""
    backend: str = ""
    prompt: str = ""
    parser: str = ""
    decoding: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A number that others report, and the command that follows their protocol as far as known."""

    judge: str
    metric: str
    value: float  # percent
    source: str
    command: str = ""


@dataclass(frozen=True)
class SubsetResult:
    """The mean credit on the items of one subset."""

    n: int
    accuracy: float | None  # percent
    interval: Interval | None = None


@dataclass(frozen=True)
class GroupResult:
    """A benchmark's metrics on the items of one group of the user's."""

    n: int
    metrics: dict[str, float | None] = field(default_factory=dict)  # percent; empty: no item
    intervals: dict[str, Interval] = field(default_factory=dict)
    share: float | None = None  # percent of its rows that the user gives


@dataclass(frozen=True)
class Rate:
    """A share of `n` cases."""

    percent: float | None
    n: int


@dataclass(frozen=True)
class ItemRate(Rate):
    """A share of `n` games or pairs, with an interval from drawing items."""

    interval: Interval | None = None


@dataclass(frozen=True)
class Lean:
    """Pairs whose two orders disagree: how many more lean to the answer shown first."""

    points: float | None  # -100: all to the second, 100: all to the first
    n: int
    first: int
    second: int


@dataclass(frozen=True)
class LengthCorrelation:
    """Correlations, -1 to 1, with the log of how many times longer the first answer is."""

    verdicts: float | None
    labels: float | None
    verdicts_given_label: float | None
    n: int


@dataclass(frozen=True)
class LengthBias:
    """How often verdicts, and labels, name the longer answer."""

    verdicts: Rate
    labels: Rate
    correlation: LengthCorrelation


@dataclass(frozen=True)
class CalibrationBin:
    """Games whose margin states a confidence between `low` and `high` percent."""

    low: float = field(metadata=key("from"))
    high: float = field(metadata=key("to"))
    n: int
    confidence: float | None  # mean, percent
    accuracy: float | None  # percent


@dataclass(frozen=True)
class Calibration:
    """The confidence that margins of scores state, against how often the verdict is right."""

    span: float  # the margin that states certainty
    n: int
    ties: int
    confidence: float  # percent
    accuracy: float  # percent
    ece: float  # expected calibration error, points
    brier: float  # 0 to 1
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class Confusion:
    """Games by label (rows) and verdict (columns), answers in the order of the item."""

    labels: tuple[int, ...]
    verdicts: tuple[int | None, ...]  # None: no verdict
    counts: tuple[tuple[int, ...], ...]
    n: int


@dataclass(frozen=True)
class Amount:
    """What `n` games took of something."""

    total: float
    mean: float
    n: int


@dataclass(frozen=True)
class JudgingCost:
    """What games took; None where no response recorded it."""

    num_tokens: Amount | None = field(default=None, metadata=LEFT_OUT)
    prompt_tokens: Amount | None = field(default=None, metadata=LEFT_OUT)
    seconds: Amount | None = field(default=None, metadata=LEFT_OUT)
    tokens_per_second: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Diagnostics:
    """What kind of judge it is; None where there is nothing to compute from."""

    items: int = 0
    games: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    parse_failures: Rate | None = None
    ties: Rate | None = None
    first: ItemRate | None = None  # verdicts that name the answer shown first
    second: ItemRate | None = None
    labels_first: Rate | None = None
    consistency: ItemRate | None = None  # pairs with the same verdict in both orders
    lean_to_first: Lean | None = None
    length: LengthBias | None = None
    calibration: Calibration | None = None
    confusion: Confusion | None = None
    cost: JudgingCost | None = None


@dataclass(frozen=True)
class WorstItem:
    """One of the items with the least credit. Texts may be cut."""

    item: str = ""
    subset: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    label: int | None = None
    responses: tuple[str, ...] = field(default=(), metadata=key("outputs"))
    scores: tuple[tuple[float, float] | None, ...] = ()  # of each game, as shown
    credit: float | None = None


@dataclass(frozen=True)
class UnreadGame:
    """One of the games without a verdict, as an example. The text may be cut at its front."""

    game: str = ""
    status: str = ""
    text: str = ""  # the end of what was said, where a verdict should stand


@dataclass(frozen=True)
class PairedComparison:
    """This judge less another one, by their credits on the items that both have judged."""

    other: str = field(metadata=key("with"))
    n: int
    difference: float  # points
    interval: Interval  # points
    p_value: float
    mcnemar_p: float | None = None  # None where credits are not 0 or 1, or items share a cluster
    clusters: int | None = None  # independent groups of the n items; None in older files
    design_effect: float | None = None  # of the differences


@dataclass(frozen=True)
class BenchmarkResult:
    """One judge on one benchmark: the entry of `results.json`. Without arguments: nothing known."""

    metrics: dict[str, float | None] = field(default_factory=dict)  # percent, the benchmark's names
    intervals: dict[str, Interval] = field(default_factory=dict)
    n: int = 0  # items whose games all have a response
    clusters: int | None = None  # groups of items that are independent; None in older files
    # How many times larger the variance of the mean credit is than that of independent items.
    design_effect: float | None = None
    parse_failures: int = 0  # games without a verdict
    ties: int = 0  # games
    statuses: dict[str, int] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    subsets: dict[str, SubsetResult] = field(default_factory=dict)
    groups: dict[str, GroupResult] = field(default_factory=dict)  # of --groups
    diagnostics: Diagnostics = Diagnostics()
    published: tuple[Published, ...] = ()
    incomplete: bool = False  # some games have no response yet
    worst: tuple[WorstItem, ...] = ()
    unread: tuple[UnreadGame, ...] = ()  # examples, where many games have no verdict
    comparison: PairedComparison | None = field(default=None, metadata=LEFT_OUT)

    @property
    def silent(self) -> tuple[str, ...]:
        """The metrics that no game with a verdict is of, so that they have no value."""
        return tuple(name for name, value in self.metrics.items() if value is None)

    @property
    def has_no_verdict(self) -> bool:
        """Whether there are games, and none of them has a verdict."""
        return 0 < self.diagnostics.games == self.parse_failures


@dataclass(frozen=True)
class Results:
    """The content of `results.json`."""

    judge: JudgeRecord
    benchmarks: dict[str, BenchmarkResult]
    version: int = VERSION


def write(directory: pathlib.Path, results: Results) -> None:
    """Write `results.json` into a directory."""
    contracts.write(directory / NAME, results)


def read(directory: pathlib.Path) -> Results:
    """Read the `results.json` of a directory.

    Raises:
      UsageError: there is none, or it is not what `jlrm.evaluate` writes.
    """
    path = directory / NAME
    if not path.exists():
        raise UsageError(f"{directory} holds no {NAME}. Give what --out of an evaluation named.")
    content = contracts.read(path, VERSION, "Run the evaluation again.")
    parts = [content.get("judge"), content.get("benchmarks")]
    if not all(isinstance(part, dict) for part in parts):
        raise UsageError(
            f"{path} holds no `judge` and `benchmarks`, two JSON objects. "
            "Give the results.json that jlrm.evaluate writes."
        )
    return contracts.decode(Results, {**content, "version": VERSION}, str(path))


def headline(result: BenchmarkResult) -> dict[str, Any]:
    """Return what `jlrm.evaluate --json` prints of a benchmark."""
    whole = contracts.encode(result)
    kept = ("n", "clusters", "design_effect", "parse_failures", "ties", "policy", "comparison")
    return {**whole["metrics"], **{name: whole[name] for name in kept if name in whole}}
