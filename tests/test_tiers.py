"""The tiers themselves: what is slow can't hide in `fast`, and what is marked is left out of it."""

from __future__ import annotations

import hypothesis
import pytest
import tiers

SPIN = """
import importlib, time
import pytest
from hypothesis import given, strategies as st

def spin(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
"""
TESTS = (
    SPIN
    + """
def test_quick():
    pass

def test_asleep():
    time.sleep(0.6)

@pytest.fixture
def laden():
    spin(0.6)

@pytest.fixture(scope="module")
def laden_once():
    spin(0.6)

def test_dear():
    spin(0.6)

def test_dear_by_a_fixture(laden):
    pass

def test_first_of_a_shared_fixture(laden_once):
    pass

def test_imports(tmp_path, monkeypatch):
    (tmp_path / "dear.py").write_text(
        "import time\\nuntil = time.process_time() + 0.6\\n"
        "while time.process_time() < until: pass\\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("dear")

@pytest.mark.slow
def test_marked():
    spin(0.6)

@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_marked_for_one_case(seconds):
    spin(seconds)

@pytest.mark.slow
def test_marked_and_quick():
    pass

@pytest.mark.campaign
def test_long():
    pass

@given(st.integers())
def test_property(number):
    pass
"""
)
DEAR = {"test_dear", "test_dear_by_a_fixture"}
SHARING = {"test_imports", "test_first_of_a_shared_fixture"}
QUICK = {"test_quick", "test_asleep", "test_property"} | SHARING
MARKED = {"test_marked", "test_marked_for_one_case", "test_marked_and_quick"}
pytest_plugins = ["pytester"]


LIMITS = ("--fast-seconds=0.4", "--fast-compile=0.3", "--fast-in-all=2")


def run(pytester: pytest.Pytester, tier: str, *limits: str, tests: str = TESTS):
    """Return the functions that passed, those that failed, what was printed, and the exit code."""
    profile = hypothesis.settings.get_current_profile_name()
    pytester.makepyfile(tests)
    plugins = ("-p", "tiers", "-p", "no:cacheprovider")
    result = pytester.runpytest_inprocess(*plugins, f"--tier={tier}", *LIMITS, *limits)
    hypothesis.settings.load_profile(profile)
    passed, _, failed = result.reprec.listoutcomes()
    names = [{report.nodeid.split("::")[1].split("[")[0] for report in r} for r in (passed, failed)]
    return names[0], names[1], result.stdout.str(), result.ret


def test_fast_fails_what_takes_long_and_is_not_marked(pytester):
    passed, failed, output, _ = run(pytester, "fast")
    assert (passed, failed) == (QUICK, DEAR)
    assert "Make it quicker, or mark it: @pytest.mark.slow." in output


@pytest.mark.slow
def test_fast_fails_when_all_of_it_takes_long(pytester):
    spins = f"{SPIN}\n@pytest.mark.parametrize('i', range(4))\ndef test_a(i):\n    spin(0.2)\n"
    assert run(pytester, "fast", tests=spins)[3] == 0
    _, failed, output, code = run(pytester, "fast", "--fast-in-all=0.5", tests=spins)
    assert not failed and code == 1 and "mark the dearest as slow" in output
    assert run(pytester, "everything", "--fast-in-all=0.5", tests=spins)[3] == 0
    fixture = "@pytest.fixture(scope='module')\ndef laden():\n    spin(0.6)\n"
    shared = f"{SPIN}\n{fixture}def test_b(laden):\n    pass\n"
    _, failed, _, code = run(pytester, "fast", "--fast-in-all=0.5", tests=shared)
    assert not failed and code == 1  # nobody's own, and yet it takes so long


@pytest.mark.slow
def test_everything_names_what_needs_no_mark(pytester):
    passed, failed, output, _ = run(pytester, "everything")
    assert (passed, failed) == (QUICK | DEAR | MARKED, set())
    unneeded = [line for line in output.splitlines() if line.startswith("needn't be marked slow")]
    assert [line.split("::")[1] for line in unneeded] == ["test_marked_and_quick"]


def test_the_campaign_runs_long_tests_and_more_examples_of_properties(pytester, monkeypatch):
    monkeypatch.setattr(tiers, "NUM_EXAMPLES", 7)
    counting = TESTS + "    print('an example')\n"
    passed, failed, output, _ = run(pytester, "campaign", "-s", tests=counting)
    assert (passed, failed) == ({"test_long", "test_property"}, set())
    assert output.count("an example") == 7


def test_a_long_compilation_fails_in_fast(pytester):
    program = "import jax\ndef test_program():\n    jax.jit(lambda x: x * 3.0 - 1.0)(2.0)\n"
    assert run(pytester, "fast", "--fast-compile=0.001", tests=program)[1] == {"test_program"}
    assert run(pytester, "fast", tests=program)[0] == {"test_program"}


def test_a_compilation_is_timed_by_the_processor_unless_the_clock_says_less():
    now = iter([0.0, 10.0, 13.0, 20.0, 28.0]).__next__
    clock = tiers.CompileClock(now)
    clock(tiers.LOWERED, 1.0)
    clock(tiers.COMPILED, 9.0)  # nine seconds on a busy machine, three of a processor
    assert clock.longest == 3.0
    clock(tiers.LOWERED, 1.0)
    clock(tiers.COMPILED, 4.0)  # four seconds of two threads
    assert clock.longest == 4.0
