"""The processes of one run: how they agree, watch each other, and end together.

One process runs per host, and all run the same program (multi-controller SPMD, `jax.distributed`).
Devices exchange arrays in their collectives. Hosts exchange what only they know (text, verdicts,
signals) through the key-value store of JAX's coordination service. So it never queues behind
programs on the devices. With a single process every function here is trivial, but for those that
share work out (`taken`, `send`, `received`), which it has no use for.

No process may wait for ever. A thread in each process writes to the store that it is alive and how
far its main thread has come. The same thread watches the others. If one fails, all print its
message; if one is silent or falls behind, all name it. Then every process ends, with the exit code
of the one that failed, or with 137 if one vanished or hangs. 137 means killed, so a scheduler may
start the run again.

JAX is imported only where processes join, since preparing data needs no device. How processes find
each other is in cluster.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from jlrm.config import UsageError
from jlrm.runtime import cluster, preemption
from jlrm.runtime.settings import flatten
from jlrm.runtime.storage import first_line

Value = TypeVar("Value")

BEAT_SECONDS = 2.0
SILENT_SECONDS = 45.0  # without a sign of life; jax's own limit (100 s) does not name the process
LOADING_SECONDS = 60.0  # in which processes that were started together come together
GONE = 137  # 128 + SIGKILL (9): a scheduler may start such a run again
PARTING_SECONDS = 30  # that JAX waits for others where all of them leave
NEVER = 7 * 24 * 3600 * 1000  # ms; the watch thread names a late process long before


@dataclass
class _State:
    """This process among the others; `client` is None if it is alone."""

    client: Any = None
    count: int = 1
    index: int = 0
    num_exchanges: int = 0
    step: int = 0  # places that the main thread has reached (`at`)
    at: str = "start"  # the last of them
    watcher: threading.Thread | None = None
    # Set once this process is about to end: its watch thread then stops, and reports nothing more.
    leaving: threading.Event = dataclasses.field(default_factory=threading.Event)


_state = _State()


@contextlib.contextmanager
def joined(
    args: argparse.Namespace, settings: Mapping[str, Any], timeout: float = 1800.0
) -> Iterator[None]:
    """Join the other processes of the run, if there are any, before anything touches a device.

    Args:
      settings: a tree of settings that must be the same in all of them.
      timeout: seconds that a process may fall behind the others.

    Raises:
      UsageError: impossible flags; no other process came; one of them has other settings.
    """
    preemption.watch()
    _initialise(args, timeout)
    if count() > 1:
        # Watching begins before the first exchange, which may be the first to wait for ever. A
        # daemon thread, so that it does not keep a process alive whose main thread has ended.
        _state.watcher = threading.Thread(target=_watch, args=(timeout,), daemon=True)
        _state.watcher.start()
        _check_same(settings)
    try:
        yield
    except KeyboardInterrupt:  # Ctrl-C reaches one process; the others have not agreed to stop
        if count() > 1:
            print("Stopped at once, and the other processes too.", file=sys.stderr, flush=True)
            _fail(130, "Stopped by Ctrl-C")
        raise


def count() -> int:
    """Return the number of processes."""
    return _state.count


def index() -> int:
    """Return the number of this process."""
    return _state.index


def is_main() -> bool:
    """Return whether this process writes logs and files."""
    return _state.index == 0


def share(size: int) -> range:
    """Return which of `size` items this process works on: a range, as even as possible."""
    # The bounds of neighbours are the same expression, so no item is left out or done twice.
    bounds = [size * number // count() for number in (index(), index() + 1)]
    return range(*bounds)


def gather(what: str, mine: Value) -> list[Value]:
    """Give every process the values of all of them, in the order of their numbers.

    A value is anything that pickles: an array, records, None where processes only wait for each
    other. All processes call it the same number of times in the same order. `what` is shown when
    one does not come.
    """
    if count() == 1:
        return [mine]
    client, number = _state.client, _state.num_exchanges
    _state.num_exchanges += 1
    at(what)
    folder = f"jlrm/exchange/{number}"
    # Pickled, for whoever can write to this store runs code in every process anyway; and packed,
    # for all of it passes through process 0 once for each other process. Text shrinks fourfold.
    packed = zlib.compress(pickle.dumps(mine), level=1)
    client.key_value_set_bytes(f"{folder}/{index():06d}", packed)
    client.wait_at_barrier(f"jlrm-{number}", NEVER)
    values = dict(client.key_value_dir_get_bytes(folder))
    if number > 1 and is_main():  # all have read it before they came to this one
        client.key_value_delete(f"jlrm/exchange/{number - 1}")
    return [pickle.loads(zlib.decompress(values[key])) for key in sorted(values)]


def taken(name: str, size: int) -> Iterator[int]:
    """Yield numbers below `size`, each of them in one process: the next to who asks next.

    All of several processes call it with the same `name`, which no call had before.
    """
    # The store counts from 1.
    while (number := _state.client.key_value_increment(f"jlrm/taken/{name}", 1)) <= size:
        yield number - 1


def send(name: str, number: int, value: Any) -> None:
    """Lay a value down for process 0, which `received` it; one for each number."""
    packed = zlib.compress(pickle.dumps(value), level=1)
    _state.client.key_value_set_bytes(f"jlrm/sent/{name}/{number}", packed)


def received(name: str) -> list[Any]:
    """Return the values sent by this name that were not received yet, without waiting."""
    values = []
    for key, packed in _state.client.key_value_dir_get_bytes(f"jlrm/sent/{name}"):
        _state.client.key_value_delete(key)
        values.append(pickle.loads(zlib.decompress(packed)))
    return values


def highest(what: str, value: int) -> int:
    """Return the highest of the values that the processes bring."""
    return max(gather(what, value))


def agree(what: str, value: Any) -> None:
    """Raise unless all processes hold the same value.

    Raises:
      UsageError: in every process, naming those that differ from process 0.
    """
    # A digest, since the value may be large; all compare, so all raise and none waits for another.
    digests = gather(what, hashlib.sha256(repr(value).encode()).digest())
    different = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise UsageError(
            f"Processes {different} have other {what} than process 0. Start all processes with the "
            "same command and files."
        )


def at(what: str) -> None:
    """Report that the main thread has reached `what`: a process stuck here can then be named."""
    # All processes run the same program, so the number of places reached can be compared.
    _state.at = what
    _state.step += 1


def leave(code: int, message: str) -> None:
    """End this process, and tell the others why if it failed. Does not return on a failure."""
    if count() == 1 or _state.leaving.is_set():
        return
    if code == 0 or code > 128:  # done, or all were stopped by a signal
        _end_together()
        return
    if message.startswith("JaxRuntimeError") and "RESOURCE_EXHAUSTED" not in message:
        # A collective fails like this when another process is gone. Wait: the watch thread will
        # name that process, and end this one with its exit code.
        time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
    _fail(code, message)


def _end_together() -> None:
    """Leave the run with all others, none of which has failed."""
    import jax

    at("the end")  # process 0 may still be writing: until it comes, all go on reporting
    _state.client.wait_at_barrier("jlrm-end", NEVER)
    _state.leaving.set()
    # The watcher must not be inside a call into the client when the interpreter goes down.
    if _state.watcher is not None:
        _state.watcher.join(10.0)
    # All have come to the end. Process 0 may take the service away before another has its answer.
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()


def _fail(code: int, message: str) -> NoReturn:
    """Tell the others why this process ends, and end it."""
    # First, or the watch thread would report this very failure.
    _state.leaving.set()
    failure = json.dumps({"code": code, "message": message, "host": socket.gethostname()})
    with contextlib.suppress(Exception):  # perhaps the service itself has failed
        _state.client.key_value_set(f"jlrm/failed/{index()}", failure)
        # Process 0 holds the store: it stays until the others have read this, one beat later.
        time.sleep(3 * BEAT_SECONDS)
    _exit(code)


def _initialise(args: argparse.Namespace, timeout: float) -> None:
    """Start `jax.distributed` if this process is one of several.

    The others may be `timeout` seconds late, or a minute if that is less: a program has to load
    first. JAX's own limit comes after that. It ends the process by a signal, and without a word
    that a user can act on.
    """
    settings = cluster.settings(args)
    if settings is None:
        return
    import jax

    timeout = max(timeout, LOADING_SECONDS)
    late = threading.Timer(timeout, _end_alone, [timeout])
    late.daemon = True
    late.start()

    # Processes agree here on the step to stop at. JAX's own handler would hold back SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=int(timeout) + 60,
            shutdown_timeout_seconds=PARTING_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UsageError(
            f"Could not join the other processes ({reason}). Start all of them with the same "
            "--coordinator, or use --distributed off to run one process alone."
        ) from None
    finally:
        late.cancel()
    from jax._src import distributed  # JAX has no public interface to the key-value store

    _state.client = distributed.global_state.client
    _state.count, _state.index = jax.process_count(), jax.process_index()


def _end_alone(timeout: float) -> NoReturn:
    message = (
        f"error: Not all processes of the run have come within {timeout:.0f} s "
        "(run.host_timeout). Look for hosts where the command has failed or does not run."
    )
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _check_same(settings: Mapping[str, Any]) -> None:
    """Compare the settings of all processes, before anything compiles."""
    import jax

    # Another version of JAX may compile other programs, whose collectives would never meet.
    mine = {"jax": jax.__version__, **flatten(settings)}
    everyone = gather("the config", (socket.gethostname(), mine))
    first = everyone[0][1]
    for number, (host, theirs) in enumerate(everyone):
        changed = [
            f"{key} is {theirs.get(key)!r}, not {first.get(key)!r}"
            for key in sorted(first.keys() | theirs.keys())
            if theirs.get(key) != first.get(key)
        ]
        if changed:
            raise UsageError(
                f"Process {number} ({host}) runs another config than process 0: "
                f"{', '.join(changed)}. Start all processes with the same config."
            )


@dataclass
class _Seen:
    """What this process knows about another one.

    Times are those of this process's clock, at which a number was first seen: clocks of hosts
    differ.
    """

    beat: int = -1
    step: int = -1  # -1: it has not reported yet
    at: str = "start-up"
    host: str = "?"
    beat_time: float = 0.0
    passed_time: float | None = None  # since when another one is further; None: none is


def _watch(timeout: float) -> None:
    """Report that this process is alive, and end it if another process can't go on."""
    seen = {number: _Seen(beat_time=time.monotonic()) for number in range(count())}
    beat, host = 0, socket.gethostname()
    while not _state.leaving.is_set():
        beat += 1
        try:
            mine = json.dumps([beat, _state.step, _state.at, host])
            _state.client.key_value_set(f"jlrm/alive/{index()}", mine, allow_overwrite=True)
            failed = _state.client.key_value_dir_get("jlrm/failed")
            alive = _state.client.key_value_dir_get("jlrm/alive")
        except Exception as error:  # the service is part of process 0, so that is gone
            if not _state.leaving.is_set():
                reason = first_line(error)
                _give_up(GONE, f"Process 0 ({seen[0].host}) is gone: {reason}")
            return
        for key, text in failed:
            told = json.loads(text)
            number = key.rpartition("/")[2]
            _give_up(told["code"], f"Process {number} ({told['host']}) failed: {told['message']}")
        # After the failures: a process that failed falls silent too, and its message says more.
        _note(seen, alive)
        _check_alive(seen, timeout)
        _state.leaving.wait(BEAT_SECONDS)


def _note(seen: dict[int, _Seen], alive: list[tuple[str, str]]) -> None:
    """Update what is known about each process."""
    now = time.monotonic()
    for key, text in alive:
        about = seen[int(key.rpartition("/")[2])]
        beat, step, about.at, about.host = json.loads(text)
        if beat != about.beat:
            about.beat, about.beat_time = beat, now
        if step != about.step:
            about.step, about.passed_time = step, None
    furthest = max(about.step for about in seen.values())
    for about in seen.values():
        if 0 <= about.step < furthest and about.passed_time is None:
            about.passed_time = now


def _check_alive(seen: dict[int, _Seen], timeout: float) -> None:
    """End this process if another one is silent, or hangs."""
    now = time.monotonic()
    for number, about in seen.items():
        if now - about.beat_time > SILENT_SECONDS:
            silent = f"{now - about.beat_time:.0f} s"
            _give_up(GONE, f"Process {number} ({about.host}) has been silent for {silent}.")
        # Slowness alone is no fault: all may be in one long step. A process hangs only if another
        # has gone on without it.
        if about.passed_time is not None and now - about.passed_time > timeout:
            _give_up(
                GONE,
                f"Process {number} ({about.host}) hangs: it has come no further than "
                f"'{about.at}' for {timeout:.0f} s (run.host_timeout), and the others wait for it.",
            )


def _give_up(code: int, message: str) -> None:
    """Print why the run can't go on, and end this process."""
    if _state.leaving.is_set():
        return
    _state.leaving.set()
    print(f"error: {message}", file=sys.stderr, flush=True)
    # The store ends with process 0, so the others get time to read the same message from it.
    if is_main():
        time.sleep(3 * BEAT_SECONDS)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End at once: an orderly exit would wait for processes that are gone."""
    # `os._exit` flushes nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
