"""Ctrl-C ends a command at once, even while native code runs that answers no signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from jlrm.runtime import commands

SLEEPER = """
import sys, time
from jlrm.runtime import commands

def work():
    print("begun", flush=True)
    time.sleep(60)

def main():
    commands.abandonable(work)

sys.exit(commands.run(main))
"""


@pytest.mark.slow
def test_what_is_waited_for_comes_back_and_so_does_what_it_raises():
    ticks = []
    assert commands.abandonable(lambda: time.sleep(1.2) or 7, lambda: ticks.append(1)) == 7
    assert ticks

    def fail():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        commands.abandonable(fail)


def test_ctrl_c_does_not_wait_for_it():
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 130 and error == "Stopped at once.\n"


def test_work_that_times_out_says_so():
    def fail():
        raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        commands.abandonable(fail)


def test_a_reader_that_leaves_early_is_no_fault_of_ours():
    program = (
        "import sys\nfrom jlrm.runtime import commands\n"
        "def main():\n    sys.stdin.read()\n    print('a few words')\n"
        "sys.exit(commands.run(main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, b"")
