"""Our programs beside those of other libraries: are they the same, and how long do they take?

A library's log-probabilities of the batch and its losses are held against ours first. One that
differs is not timed. Then each phase of each library runs in a process of its own, beside ours, and
the two take turns, ours first in every second pair: what disturbs one disturbs the other. No more
than two processes hold a model at a time.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from jlrm.config import RunError
from jlrm.peers.processes import (
    OURS,
    FailedLibrary,
    MissingLibrary,
    Process,
    Site,
    mallocs,
)
from jlrm.peers.workload import STAGES
from jlrm.reports.contracts import LEFT_OUT

GRPO = ("rollout", "update", "iteration")
PHASES = (*GRPO, *STAGES)
AGAINST_VERSION = 1
# Measured are 2e-6 and 2e-8; another clip, KL or mask changes the loss by far more.
LOGP_TOLERANCE = 1e-4  # nats, of any token
LOSS_TOLERANCE = 1e-5
STAGE_TOLERANCE = 1e-4  # of each loss of the first steps: Adam enlarges what rounding changes
WARM = 2  # turns of each process that are not counted: it compiles, and fills its caches


@dataclass(frozen=True)
class Spread:
    """What was measured several times."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class CheckedPeer:
    """Whether a library computes what we do: the largest differences of a token and of losses."""

    library: str
    versions: dict[str, str] | None = field(default=None, metadata=LEFT_OUT)
    logp_difference: float | None = field(default=None, metadata=LEFT_OUT)
    loss_difference: float | None = field(default=None, metadata=LEFT_OUT)
    stage_differences: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    refused: str | None = field(default=None, metadata=LEFT_OUT)  # why it is not timed
    is_missing: bool = False  # it is not installed


@dataclass(frozen=True)
class PeerFigures:
    """A phase of a library. `times_ours`: its time over ours, pair by pair; None: this is ours."""

    phase: str
    library: str
    malloc: str
    seconds: Spread | None = None
    times_ours: Spread | None = field(default=None, metadata=LEFT_OUT)
    peak_bytes: int | None = None  # of the process with this phase alone: resident, or the GPU's
    failed: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class AgainstResult:
    """What `jlrm.bench --against --json` prints. Loads are averages over a minute."""

    size: str
    device: str
    dtype: str
    repeats: int
    cores: int
    load_before: float
    load_after: float
    checked: tuple[CheckedPeer, ...]
    figures: tuple[PeerFigures, ...]
    version: int = AGAINST_VERSION


def check(site: Site, names: Sequence[str]) -> list[CheckedPeer]:
    """Hold each library's log-probabilities and loss against ours, which come first.

    Raises:
      RunError: ours could not be computed.
    """
    checked, ours = [], {}
    for name in tqdm([OURS, *names], "check", file=sys.stderr):
        try:
            with Process(site, name, "check", "as it is") as process:
                told = process.turn()
        except MissingLibrary as error:
            checked.append(CheckedPeer(name, refused=f"not installed: {error}", is_missing=True))
            continue
        except FailedLibrary as error:
            _raise_if_ours(error)
            checked.append(CheckedPeer(name, refused=str(error)))
            continue
        ours = ours or told
        checked.append(_held_against(ours, name, told))
    return checked


def _held_against(ours: dict, name: str, told: dict) -> CheckedPeer:
    logps, wanted = np.array(told["logps"]), np.array(ours["logps"])
    versions = told["versions"]
    if logps.shape != wanted.shape:
        reason = f"it gives log-probabilities {logps.shape}, and {wanted.shape} are asked for"
        return CheckedPeer(name, versions, refused=reason)
    logp = float(np.max(np.abs(logps - wanted)))
    loss = abs(told["loss"] - ours["loss"])
    of_stages = {
        stage: float(np.max(np.abs(np.subtract(losses, ours["losses"][stage]))))
        for stage, losses in told["losses"].items()
    }
    refused = None
    if not (logp <= LOGP_TOLERANCE and loss <= LOSS_TOLERANCE):  # NaN is no agreement
        refused = (
            f"it computes something else: a log-probability differs by {logp:.2g} nats (at most "
            f"{LOGP_TOLERANCE:g}), the loss by {loss:.2g} (at most {LOSS_TOLERANCE:g})"
        )
    for stage, difference in of_stages.items():
        if not difference <= STAGE_TOLERANCE:
            refused = (
                f"it computes something else: a loss of {stage} differs by {difference:.2g} (at "
                f"most {STAGE_TOLERANCE:g})"
            )
    return CheckedPeer(name, versions, logp, loss, of_stages or None, refused)


def measure(
    site: Site,
    names: Sequence[str],
    phases: Sequence[str],
    drawn: tuple[int, int],
    repeats: int,
) -> Iterator[PeerFigures]:
    """Time phases with each setting of malloc, and yield the figures as they are known.

    Args:
      drawn: B and T of the completions that a rollout has to draw.

    Raises:
      RunError: a phase of ours failed.
    """
    settings = list(itertools.product(mallocs(site.device), phases))
    with tqdm(total=len(settings) * len(names), file=sys.stderr) as bar:
        for malloc, phase in settings:
            with Process(site, OURS, phase, malloc) as process:
                own = Side(process, drawn if phase == "rollout" else None)
                for name in names:
                    bar.set_description(f"{name}, {phase}, malloc {malloc}")
                    yield _beside(own, site, (phase, name, malloc), repeats)
                    bar.update()
            if own.seconds:
                seconds = spread(own.seconds)
                yield PeerFigures(phase, OURS, malloc, seconds, peak_bytes=own.peak_bytes)


class Side:
    """A process with the peak of its memory, and the seconds of its turns that count."""

    def __init__(self, process: Process, drawn: tuple[int, int] | None) -> None:
        self.process, self.drawn = process, drawn
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def turn(self) -> float:
        """Let it work once, and return the seconds that this took.

        Raises:
          FailedLibrary: it failed, or its rollout is not the work that was asked for.
        """
        told = self.process.turn()
        if self.drawn is not None:
            num_rows, num_tokens = self.drawn
            wanted = [num_rows, num_tokens, num_rows]  # all of them differ
            if told.get("drawn") != wanted:
                reason = (
                    f"rows, tokens and different rows must be {wanted}, got {told.get('drawn')}"
                )
                raise FailedLibrary(self.process.name, reason)
        self.peak_bytes = max(self.peak_bytes, told["peak_bytes"])
        return told["seconds"]


def take_turns(own: Side, other: Side, repeats: int) -> None:
    """Let both sides work in turn, after some turns that do not count."""
    for side in (own, other):
        for _ in range(WARM):
            side.turn()
    pairs = []
    for repeat in range(repeats):
        first, second = (own, other) if repeat % 2 == 0 else (other, own)
        took = {first: first.turn(), second: second.turn()}
        pairs.append((took[own], took[other]))
    # Only whole comparisons: a library that fails halfway leaves nothing behind.
    for side, seconds in zip((own, other), zip(*pairs, strict=True), strict=True):
        side.seconds += seconds


def _beside(own: Side, site: Site, what: tuple[str, str, str], repeats: int) -> PeerFigures:
    phase, name, malloc = what
    try:
        with Process(site, name, phase, malloc) as process:
            other = Side(process, own.drawn)
            take_turns(own, other, repeats)
    except FailedLibrary as error:
        _raise_if_ours(error)
        return PeerFigures(*what, failed=str(error))
    pairs = zip(other.seconds, own.seconds[-repeats:], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    return PeerFigures(*what, spread(other.seconds), spread(ratios), other.peak_bytes)


def spread(values: Sequence[float]) -> Spread:
    """Return the median of some values, the least and the most."""
    return Spread(statistics.median(values), min(values), max(values))


def _raise_if_ours(error: FailedLibrary) -> None:
    if error.name == OURS:
        raise RunError(f"jlrm's own process failed: {error}.") from error
