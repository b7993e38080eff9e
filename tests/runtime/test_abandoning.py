"""Ctrl-C ends a command at once, even while native code runs that answers no signal."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jlrm.runtime import commands

ROOT = pathlib.Path(__file__).parents[2]
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
def begun(program: str) -> subprocess.Popen[str]:
    """Start a program, and return when it has said that it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_what_is_waited_for_comes_back_and_so_does_what_it_raises():
    ticks = []
    assert commands.abandonable(lambda: time.sleep(1.2) or 7, lambda: ticks.append(1)) == 7
    assert ticks

    def fail():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        commands.abandonable(fail)


def test_ctrl_c_does_not_wait_for_it():
    process = begun(SLEEPER)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 130 and error == "Stopped at once.\n"


@pytest.mark.parametrize("command", [["jlrm.judge"], ["jlrm", "judge"]], ids=str)
def test_ctrl_c_ends_a_command_that_is_still_importing(command, tmp_path):
    """Later it would be an exception, which an import turns into another one, or JAX swallows."""
    (tmp_path / "yaml.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "check", "no-file"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and error == ""


def test_what_a_terminal_can_not_show_is_spelled_out():
    program = (
        "import sys\nfrom jlrm.runtime import commands\n"
        "sys.exit(commands.run(lambda: print('\u00e9 \u00b7')))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert ended.stdout == b"\\xe9 \\xb7\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_no_handler_can(signum):
    """A hash that takes minutes stands for a compiler: no handler runs meanwhile."""
    program = (
        "import hashlib, signal, sys\nfrom jlrm.runtime import commands\ncommands.GRACE = 0.2\n"
        f"signal.signal({int(signum)}, lambda *_: None)\n"
        "def main():\n    print('begun', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "sys.exit(commands.run(main))"
    )
    process = begun(program)
    process.send_signal(signum)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and error.startswith("Ended at once.")


def test_a_command_that_ends_by_itself_after_two_signals_is_left_to():
    program = (
        "import signal, sys, time\nfrom jlrm.runtime import commands\ncommands.GRACE = 5.0\n"
        "seen = []\nsignal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
        "def main():\n    print('begun', flush=True)\n"
        "    while len(seen) < 2:\n        time.sleep(0.01)\n"
        "    raise commands.Interrupted(15, 'saved')\n"
        "sys.exit(commands.run(main))"
    )
    process = begun(program)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, "saved\n")


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


def test_a_command_that_was_stopped_waits_for_no_thread(tmp_path):
    """The interpreter's end would wait for it, or pull the floor from under native code."""
    program = (
        "import threading, time\n"
        "from jlrm.runtime import commands\n"
        "def main():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    raise KeyboardInterrupt\n"
        "commands.finish(main)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 130 and ended.stderr.startswith("Stopped at once. What was saved")
