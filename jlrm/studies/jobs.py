"""Run a study's commands, one after the other or several at a time.

Each command has a process of its own. One at a time speaks on this terminal; of several each
has a log, `logs/CELL.log` in the study's directory.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from jlrm.config import RunError
from jlrm.runtime.commands import Interrupted
from jlrm.studies.cells import Cell

FORWARDED = (signal.SIGTERM, signal.SIGHUP)
LOGS = "logs"
POLL = 0.1  # seconds between two looks at what runs
TAIL = 20  # last lines of a failed command's log that are shown

Running = dict[Cell, "subprocess.Popen[bytes]"]


def run_all(
    missing: Sequence[Cell],
    flags: Sequence[str],
    finished: Callable[[Cell], None],
    keeps_going: bool,
    jobs: int = 1,
    logs: pathlib.Path | None = None,
) -> list[Cell]:
    """Run cells, each after those that it needs, and return those that could not be done.

    flags: of the run of several processes, for every command. finished: called after each.
    jobs: how many run at once. logs: the directory of what they say, in place of this terminal.

    Raises:
      Interrupted: a signal; the commands that ran have heard it too.
      RunError: a command failed, unless `keeps_going`. No other was begun after it.
    """
    waiting, failed, numbers = list(missing), list[Cell](), itertools.count(1)
    running: Running = {}
    with _forwarding(running) as heard:
        while waiting or running:
            if heard or (failed and not keeps_going):
                waiting.clear()
            cell = _ready(waiting, running) if len(running) < jobs else None
            if cell is not None:
                waiting.remove(cell)
                _say(f"[{next(numbers)}/{len(missing)}] {cell.key}")
                lost = {each.key for each in failed} & set(cell.needs)
                if lost:
                    _say(f"left out: {', '.join(sorted(lost))} failed")
                    failed.append(cell)
                else:
                    running[cell] = _start(cell, flags, logs)
            elif running:
                cell, code = _first_to_end(running)
                _say_end(cell, code, logs)
                if code == 0:
                    finished(cell)
                else:
                    failed.append(cell)
    if heard:
        signum, where = heard[0]
        raise Interrupted(signum, f"Stopped in {where}. The same command goes on from there.")
    if failed and not keeps_going:
        raise RunError(
            f"{failed[0].key} failed; what it said stands above. The same command goes on from "
            "here; --keep-going does what does not rest on it first."
        )
    return failed


@contextlib.contextmanager
def _forwarding(running: Running) -> Iterator[list[tuple[int, str]]]:
    """Pass signals on to what runs; yield those that came, with the cells that heard them.

    A terminal's Ctrl-C reaches the commands by itself: they are in the group of this process.
    """
    heard: list[tuple[int, str]] = []

    def forward(signum: int, _: object) -> None:
        heard.append((signum, ", ".join(cell.key for cell in running) or "no command"))
        for process in list(running.values()):
            process.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in FORWARDED}
    try:
        yield heard
    except KeyboardInterrupt:
        for process in running.values():
            process.wait()
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _ready(waiting: Sequence[Cell], running: Running) -> Cell | None:
    """Return the first cell that needs none of those which are still to end."""
    open_keys = {cell.key for cell in (*waiting, *running)}
    return next((cell for cell in waiting if not open_keys & set(cell.needs)), None)


def _start(
    cell: Cell, flags: Sequence[str], logs: pathlib.Path | None
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", *cell.command, *flags]
    if logs is None:
        return subprocess.Popen(command, stdout=sys.stderr)
    logs.mkdir(parents=True, exist_ok=True)
    with _log(logs, cell).open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _first_to_end(running: Running) -> tuple[Cell, int]:
    """Wait for a command to end, and return it with its exit code; it no longer runs."""
    while True:
        for cell, process in running.items():
            if process.poll() is not None:
                del running[cell]
                return cell, process.returncode
        time.sleep(POLL)


def _say_end(cell: Cell, code: int, logs: pathlib.Path | None) -> None:
    if logs is None:
        if code:
            _say(f"{cell.key} ended with exit code {code}")
        return
    if code == 0:
        _say(f"done: {cell.key}")
        return
    lines = _log(logs, cell).read_text(errors="replace").splitlines()
    _say("\n".join(lines[-TAIL:]))
    _say(f"{cell.key} ended with exit code {code}; all that it said: {_log(logs, cell)}")


def _log(logs: pathlib.Path, cell: Cell) -> pathlib.Path:
    return logs / f"{cell.key.replace('/', '-')}.log"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
