"""How every command ends: the exit code, and one sentence where a user can mend something.

0 done; 1 the run failed; 2 wrong input; 130 Ctrl-C; 143 SIGTERM (a scheduler may start it again).
Also the flags of pairs, `--columns` and `--values`, that several commands have.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from jlrm.config import RunError, UsageError
from jlrm.runtime import devices
from jlrm.runtime.settings import parse_pairs

T = TypeVar("T")
AT_ONCE = "Stopped at once. What was saved before is whole."
GRACE = 2.0  # seconds in which a handler may end the process in its own way
# Flags of pairs: their form, an example and what they are for.
PAIR_FLAGS = {
    "columns": ("OURS=THEIRS", "answer_1=response_a", "names of the columns"),
    "values": ("THEIRS=OURS", "0=1 1=2 2=0", "what labels mean: 1, 2 or 0 (a tie)"),
}


class Interrupted(Exception):
    """A command was asked to stop by a signal, and has saved what it had."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Abandoned(KeyboardInterrupt):
    """Ctrl-C came while a thread was in native code, which no signal ends."""


def abandonable(work: Callable[[], T], tick: Callable[[], object] = lambda: None) -> T:
    """Return what `work` returns, and leave at once if Ctrl-C comes meanwhile.

    For native code that takes minutes, as a compiler does: Python runs a signal's handler between
    two of its own instructions, so the work goes to a thread and this one waits. `tick` is called
    about every second.

    Raises:
      Abandoned: Ctrl-C; the work still runs, and the process has to end by `run`.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def fill() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=fill, daemon=True).start()
        while not concurrent.futures.wait([outcome], timeout=1.0).done:
            tick()
        return outcome.result()
    except KeyboardInterrupt:
        raise Abandoned from None


def finish(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`, and end the process with its exit code."""
    code, is_at_once = _run(main)
    if is_at_once:
        # A thread may be in native code, and would be ended with the interpreter in the middle of
        # it: of six trainings that Ctrl-C ended while XLA compiled, two died by a wrong address.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(main: Callable[[], None]) -> int:
    """Run a command's `main` and return its exit code."""
    return _run(main)[0]


def _run(main: Callable[[], None]) -> tuple[int, bool]:
    """Return the exit code, and whether Ctrl-C has ended the command where it was."""
    quieten()
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # until imports are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # of a terminal that knows less than UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    sys.unraisablehook = _tell
    with _second_signal_ends():
        code, message = _outcome(main)
    if message:
        print(message, file=sys.stderr, flush=True)
    # A run of several processes ends in all of them. Imported: this one may be part of such a run.
    if (hosts := sys.modules.get("jlrm.runtime.hosts")) is not None:
        hosts.leave(code, message.removeprefix("error: "))
    return code, message == AT_ONCE


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a line of a library says something that the command does not say itself.

    Orbax logs each part of a save that fails with its traceback, and then raises the error. And it
    warns of every checkpoint without a held-out metric, which is most of them.
    """
    text = record.getMessage()
    is_of_orbax = "orbax" in record.pathname or "orbax" in text
    return not (is_of_orbax and (record.levelno >= logging.ERROR or "tracked_metric" in text))


def _tell(lost: Any) -> None:
    """Print an error that nobody could catch, but not those of the rest of a save that failed."""
    if str(lost.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(lost)


@contextlib.contextmanager
def _second_signal_ends() -> Iterator[None]:
    """Let a second Ctrl-C or SIGTERM end the process, wherever the main thread is.

    Python runs handlers between two of its own instructions, and so not before a compiler returns.
    The number of a signal is written to a pipe at once; a thread reads it there, leaves the handler
    `GRACE` seconds, and ends the process if that did not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_count_signals, args=(heard,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()  # which ends the thread


def _count_signals(heard: socket.socket) -> None:
    asked = 0
    with heard:
        while signum := heard.recv(1):
            asked += signum[0] in (signal.SIGINT, signal.SIGTERM)
            if asked < 2:
                continue
            heard.settimeout(GRACE)
            with contextlib.suppress(TimeoutError):
                while heard.recv(1):
                    pass
                return  # the command has ended by itself
            os.write(2, b"Ended at once. What was saved before is whole.\n")
            os._exit(128 + signum[0])


def quieten() -> None:
    """Keep libraries from printing, once they are imported, what no user of a command can act on.

    What the user has set stays.
    """
    # "PyTorch was not found", and prompts longer than the model's limit, which we count ourselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Where libtpu is installed for `plan` but no chip is there, it prints "Failed to find host
    # bounds" as soon as JAX looks for devices. Told of any one host, it finds no chip silently.
    if not devices.tpu_files():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _outcome(main: Callable[[], None]) -> tuple[int, str]:
    """Run `main`; return the exit code and what to say."""
    try:
        main()
        sys.stdout.flush()  # a reader that has left is heard of here, not at the exit
    except UsageError as error:
        return 2, f"error: {error}"
    except RunError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return 1, f"error: {error}"
    except Interrupted as stop:
        return 128 + stop.signum, str(stop)
    except Abandoned:  # the interpreter would wait for the thread, or end in the middle of its call
        sys.stdout.flush()
        print("Stopped at once.", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, AT_ONCE
    except BrokenPipeError:  # the reader of our stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except OSError as error:
        return 1, f"error: {error}"
    except Exception as error:  # a fault of ours: in full, and the other processes hear of it too
        traceback.print_exc()
        return 1, f"error: {type(error).__name__}: {error}"
    return 0, ""


def add_pair_flags(
    parser: argparse.ArgumentParser, names: Sequence[str] = tuple(PAIR_FLAGS)
) -> None:
    """Add the flags that name columns and labels: `data.columns` and `data.values` of a config."""
    for name in names:
        form, example, meaning = PAIR_FLAGS[name]
        note = f"{meaning}, e.g. {example}"
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar=form, help=note)


def read_pair_flags(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the pairs of those flags by their names, in any spelling of `parse_pairs`.

    Raises:
      UsageError: what is no pair.
    """
    given = {}
    for name, (form, example, _) in PAIR_FLAGS.items():
        texts, pairs = getattr(args, name, []), {}
        if texts and texts[0].startswith("{") and not texts[0].endswith("}"):
            texts = [" ".join(texts)]  # a mapping without quotes, divided at its spaces
        for text in texts:
            if "=" not in text and not text.startswith("{"):
                raise UsageError(f"--{name} {text}: wanted {form}, e.g. {example}.")
            pairs |= parse_pairs(text, f"--{name}")
        given[name] = pairs
    return given
