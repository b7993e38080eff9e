"""What `jlrm.plan` and `jlrm.bench` find out: the content of `plan.json`, and what `--json` prints.

Sizes are GiB and seconds are a device's, but where a name says otherwise. A figure that is None
could not be had: a program that the compiler refuses has no temporaries, FLOPs or collectives.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

from jlrm.reports import contracts
from jlrm.reports.contracts import LEFT_OUT

PLAN_VERSION = BENCH_VERSION = 1
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Moved:
    """What the collectives of one kind move, within a slice (ICI) and between slices (DCN)."""

    count: float
    ici_bytes: float
    dcn_bytes: float


@dataclass(frozen=True)
class Work:
    """What is counted in compiled code; `lower_bound_s` by data-sheet rates."""

    flops: float
    bytes: float
    collectives: dict[str, Moved]
    lower_bound_s: dict[str, float]
    compiler_estimate_cycles: float


@dataclass(frozen=True)
class DecodeStep(Work):
    """The work of one of `steps` steps of decoding."""

    steps: int


@dataclass(frozen=True)
class ProgramPlan:
    """One compiled program; what is None at the end was not counted."""

    argument_gib: float
    temp_gib: float | None
    output_gib: float | None
    peak_gib: float
    flops: float | None
    bytes: float | None
    collectives: dict[str, Moved] | None
    compile_s: float
    assumed: str
    note: str
    lower_bound_s: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    compiler_estimate_cycles: float | None = field(default=None, metadata=LEFT_OUT)
    code_gib: float | None = field(default=None, metadata=LEFT_OUT)  # in HBM, of all its shapes
    pallas_kernels: float | None = field(default=None, metadata=LEFT_OUT)
    unknown_loops: int | None = field(default=None, metadata=LEFT_OUT)
    prefill: Work | None = field(default=None, metadata=LEFT_OUT)
    decode_step: DecodeStep | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class PhasePlan:
    """The moment of a phase at which most memory is held."""

    program: str | None  # that runs then
    resident_gib: float  # held beside it
    peak_gib: float
    kinds_gib: dict[str, float]


@dataclass(frozen=True)
class HostPlan:
    """What one VM of the slice holds in its own memory, by phase."""

    chips: int
    limit_gib: float
    phases_gib: dict[str, float]


@dataclass(frozen=True)
class Duration:
    """How long a run takes and what it costs, from the least to the most; an estimate."""

    steps: dict[str, int]  # by stage
    step_s: dict[str, tuple[float, float]]
    hours: tuple[float, float]
    dollars: tuple[float, float] | None
    basis: str


@dataclass(frozen=True)
class SlicePlan:
    """Whether a run fits a slice, and why.

    `usable_gib` is the limit without the headroom, and what the peak is held against.
    """

    fits: bool
    peak_gib: float
    limit_gib: float
    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    model: str
    programs: dict[str, ProgramPlan]
    phases: dict[str, PhasePlan]
    not_compiled: tuple[str, ...]
    overrides: tuple[str, ...] | None = field(default=None, metadata=LEFT_OUT)  # of a search
    usable_gib: float | None = field(default=None, metadata=LEFT_OUT)
    versions: dict[str, str] | None = field(default=None, metadata=LEFT_OUT)  # what compiled it
    host: HostPlan | None = field(default=None, metadata=LEFT_OUT)
    duration: Duration | None = field(default=None, metadata=LEFT_OUT)
    version: int = PLAN_VERSION


@dataclass(frozen=True)
class PhaseFigures:
    """A measured phase. Shares are of 1; `tokens` are what the phase is for.

    spread: the longest less the shortest time, over the median, which is `seconds`.
    """

    seconds: float
    min_seconds: float
    spread: float
    tokens: float
    tokens_per_second: float
    flops: float
    mfu: float
    roofline_share: float
    peak_bytes: float
    compile_s: float
    plain_tokens: float | None = field(default=None, metadata=LEFT_OUT)
    plain_tokens_per_second: float | None = field(default=None, metadata=LEFT_OUT)
    padding: float | None = field(default=None, metadata=LEFT_OUT)
    prefill_share: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one config took as the other, over pairs of runs."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Measured:
    """The phases of one config."""

    rollout: PhaseFigures
    logprobs: PhaseFigures
    update: PhaseFigures
    machine: dict[str, Any]  # rates that were measured beside it, and what it is

    def phase(self, name: str) -> PhaseFigures:
        """Return the figures of a phase by its name."""
        return getattr(self, name)


@dataclass(frozen=True)
class MeasuredAgainst(Measured):
    """The phases of a second config; ratio: of its times to those of the first, by phase."""

    ratio: dict[str, Ratio]


@dataclass(frozen=True)
class BenchResult(Measured):
    """What `jlrm.bench --json` prints."""

    compare: MeasuredAgainst | None = field(default=None, metadata=LEFT_OUT)
    version: int = BENCH_VERSION


def write_plan(directory: pathlib.Path, plan: SlicePlan) -> None:
    """Write `plan.json` into a directory."""
    contracts.write(directory / PLAN_NAME, plan)


def read_plan(path: pathlib.Path) -> SlicePlan:
    """Read a `plan.json`. Raises UsageError for a file that is none."""
    content = contracts.read(path, PLAN_VERSION, "Run jlrm.plan again.")
    return contracts.decode(SlicePlan, {**content, "version": PLAN_VERSION}, str(path))
