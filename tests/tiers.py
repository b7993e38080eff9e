"""Three tiers of tests: `fast` on every save, everything before a commit, `campaign` overnight.

A test belongs to `fast` unless it is marked `slow`, and nobody keeps a list of what is slow: in
`fast` a test fails when it uses more than `MOST_SECONDS` of a processor, or compiles one program
for more than `MOST_COMPILE` seconds, until it is marked or made quicker. Processor seconds, not
those of the clock, so that a busy machine fails nothing. In everything, a test that is marked and
would pass these limits is named at the end.

`campaign` runs the tests marked so, and every hypothesis test with many more examples.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import pytest

TIERS = ("fast", "everything", "campaign")
MARKERS = {
    "slow": "takes too long to run on every save; launch/test.sh --fast leaves it out",
    "campaign": "takes minutes; only launch/test.sh campaign runs it",
}
MOST_SECONDS = 2.0  # of a processor, what child processes use included
MOST_COMPILE = 1.0
MOST_IN_ALL = 130.0  # of all of `fast`, what tests share included: some 100, a third more when busy
# Files that take minutes begin first, the longest before the others: one that began last would be
# waited for by itself.
LONG_FILES = (
    *("test_train.py", "test_hosts.py", "test_effects.py", "test_update.py", "test_tpu.py"),
    *("test_notebook.py", "test_sampler.py", "test_programs.py", "test_damage.py"),
)
NUM_EXAMPLES = 3_000  # of each hypothesis test in `campaign`; its default is 100

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Cost:
    """What a phase of a test took: processor seconds, and those of its longest compilation.

    shared: seconds that it paid for others, beside its own.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    shared: float = 0.0

    def is_fast(self, option: argparse.Namespace) -> bool:
        is_short = self.seconds <= option.fast_seconds
        return is_short and self.compile_seconds <= option.fast_compile

    def __add__(self, other: Cost) -> Cost:
        longest = max(self.compile_seconds, other.compile_seconds)
        return Cost(self.seconds + other.seconds, longest, self.shared + other.shared)


COST = pytest.StashKey[Cost]()


def processor_seconds() -> float:
    """Return what this process and its ended children have used."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class CompileClock:
    """Keeps the longest compilation since `longest` was last set to zero."""

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.longest = 0.0
        self._now, self._lowered = now, now()

    def __call__(self, event: str, duration: float, **_: object) -> None:
        """Hear an event of `jax.monitoring`: lowering ends right before compiling begins."""
        if event == LOWERED:
            self._lowered = self._now()
        elif event == COMPILED:
            # Of the clock it may be longer on a busy machine, of all threads on an idle one.
            self.longest = max(self.longest, min(duration, self._now() - self._lowered))


class SharedClock:
    """Adds up the seconds of what many tests share: whoever is first pays, and isn't slow for that.

    These are imports, and fixtures of more than one test.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._find_and_load = importlib._bootstrap._find_and_load  # type: ignore[attr-defined]

    def install(self) -> None:
        importlib._bootstrap._find_and_load = self.importing  # type: ignore[attr-defined]

    def importing(self, *args: Any) -> Any:
        with self.running():
            return self._find_and_load(*args)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time a block, and what is inside of it once."""
        began, self._depth = processor_seconds(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += processor_seconds() - began


COMPILES, SHARED = CompileClock(), SharedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--tier", choices=TIERS, default="everything", help="see tests/tiers.py")
    group.addoption("--fast-seconds", type=float, default=MOST_SECONDS, help="of one test")
    group.addoption("--fast-compile", type=float, default=MOST_COMPILE, help="of one program")
    group.addoption("--fast-in-all", type=float, default=MOST_IN_ALL, help="of the whole tier")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    jax.monitoring.register_event_duration_secs_listener(COMPILES)
    SHARED.install()
    if not hasattr(config, "workerinput"):  # of pytest-xdist
        config.pluginmanager.register(Ledger(config))
    # No test asserts a time: a busy machine is slow.
    num_examples = NUM_EXAMPLES if config.option.tier == "campaign" else 100
    hypothesis.settings.register_profile(
        "jlrm", max_examples=num_examples, deadline=None, print_blob=True
    )
    hypothesis.settings.load_profile("jlrm")


def belongs(item: pytest.Item, tier: str) -> bool:
    """Return whether a tier runs this test."""
    is_campaign = item.get_closest_marker("campaign") is not None
    if tier == "campaign":
        return is_campaign or getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    is_slow = item.get_closest_marker("slow") is not None
    return not is_campaign and not (is_slow and tier == "fast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.option.tier
    left_out = [item for item in items if not belongs(item, tier)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if belongs(item, tier)]
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))  # stable


def _measured(item: pytest.Item) -> Iterator[None]:
    """Add what the wrapped phase costs to the test's, and fail in `fast` what is not fast."""
    COMPILES.longest, began, before = 0.0, processor_seconds(), SHARED.seconds
    try:
        return (yield)
    finally:
        shared = SHARED.seconds - before
        cost = Cost(processor_seconds() - began - shared, COMPILES.longest, shared)
        item.stash[COST] = item.stash.get(COST, Cost()) + cost


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    with SHARED.running() if fixturedef.scope != "function" else contextlib.nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield from _measured(item)
    cost = item.stash[COST]
    option = item.config.option
    if option.tier == "fast" and not cost.is_fast(option):
        pytest.fail(
            f"{cost.seconds:.1f} processor seconds (at most {option.fast_seconds}), and "
            f"{cost.compile_seconds:.1f} for one program (at most {option.fast_compile}), its own "
            "fixtures included, are too many for the fast tier. "
            "Make it quicker, or mark it: @pytest.mark.slow.",
            pytrace=False,
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        cost = item.stash.get(COST, Cost())
        report.user_properties.append(("cost", dataclasses.astuple(cost)))
        is_slow = item.get_closest_marker("slow") is not None
        report.user_properties.append(("is_slow", is_slow))
    return report


class Ledger:
    """Adds up what the tests of all workers cost."""

    def __init__(self, config: pytest.Config) -> None:
        self._option = config.option
        self._costs: dict[str, Cost] = {}
        self._marked: dict[
            str, list[Cost]
        ] = {}  # by function: one slow case of it is reason enough

    @property
    def seconds(self) -> float:
        return sum(cost.seconds + cost.shared for cost in self._costs.values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        values = dict(report.user_properties)
        if report.when == "call" and "cost" in values:
            cost = self._costs[report.nodeid] = Cost(*values["cost"])
            if values["is_slow"]:
                self._marked.setdefault(report.nodeid.partition("[")[0], []).append(cost)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._is_too_much() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the dearest tests of `fast`, and in everything those that need no mark."""
        write = terminalreporter.write_line
        if self._option.tier == "fast" and self._costs:
            write(f"fast: {self.seconds:.0f} processor seconds; the dearest tests:")
            for name, cost in sorted(self._costs.items(), key=lambda each: -each[1].seconds)[:5]:
                write(f"  {cost.seconds:.1f} s  {name}")
        if self._is_too_much():
            write(f"FAILED: more than {self._option.fast_in_all:.0f} s: mark the dearest as slow.")
        for function, each in self._marked.items():
            # One test of a file pays for its fixtures: what is near the limit is left alone.
            is_short = sum(each, Cost()).seconds < self._option.fast_seconds / 4
            if is_short and all(cost.is_fast(self._option) for cost in each):
                write(f"needn't be marked slow: {function}")

    def _is_too_much(self) -> bool:
        return self._option.tier == "fast" and self.seconds > self._option.fast_in_all
