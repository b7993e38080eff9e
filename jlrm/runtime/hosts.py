"""The processes of one run: how they agree, watch each other, and end together.

One process runs per host and all run the same program (multi-controller SPMD, `jax.distributed`).
What the devices compute meets in their collectives. What the hosts know (text, verdicts, signals)
meets here, through the coordination service's key-value store, so that it never queues behind
programs on the devices. A single process needs none of this, and every function is then trivial.

Nothing may wait for ever. A thread in each process tells the store that it lives and how far its
main thread has come, and watches the others: one that fails is quoted, one that is silent or stays
behind is named, and every process ends. Exit codes: of the one that failed; 137 (killed, so that a
scheduler may start it again) where one vanished or hangs.

JAX is imported where processes join: what has no device (preparing data) does without. How they
find each other is cluster.py.
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
from jlrm.runtime import cluster
from jlrm.runtime.settings import flatten

Value = TypeVar("Value")

BEAT_SECONDS = 2.0
SILENT_SECONDS = 45.0  # without a sign of life; jax's own limit (100 s) would not say who it was
GONE = 137
NEVER = 7 * 24 * 3600 * 1000  # ms; the watch thread says who is late, long before


@dataclass
class _State:
    """This process among the others; `client` is None where it is alone."""

    client: Any = None
    count: int = 1
    index: int = 0
    num_exchanges: int = 0
    step: int = 0  # of the main thread, what it is at
    at: str = "start"
    watcher: threading.Thread | None = None
    leaving: threading.Event = dataclasses.field(default_factory=threading.Event)


_state = _State()


@contextlib.contextmanager
def joined(
    args: argparse.Namespace, settings: Mapping[str, Any], timeout: float = 1800.0
) -> Iterator[None]:
    """Join the other processes of the run, if there are any, before anything touches a device.

    Args:
      settings: what must be the same in all of them, as a tree.
      timeout: seconds that a process may stay behind the others.

    Raises:
      UsageError: impossible flags; no other process came; one of them has other settings.
    """
    _initialise(args)
    if count() > 1:
        _state.watcher = threading.Thread(target=_watch, args=(timeout,), daemon=True)
        _state.watcher.start()
        _check_same(settings)
    try:
        yield
    except KeyboardInterrupt:  # unlike a signal that all have agreed on, it came to this one
        if count() > 1:
            print("Stopped at once, and the other processes with it.", file=sys.stderr, flush=True)
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
    """Return which of `size` things are this process's to do: a run of them, as even as can be."""
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


def highest(what: str, value: int) -> int:
    """Return the highest of the values that the processes bring."""
    return max(gather(what, value))


def agree(what: str, value: Any) -> None:
    """Refuse to go on with what is not the same in every process, and name one that differs.

    Raises:
      UsageError: in every process.
    """
    digests = gather(what, hashlib.sha256(repr(value).encode()).digest())
    different = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise UsageError(
            f"Processes {different} have other {what} than process 0: start all alike."
        )


def at(what: str) -> None:
    """Say that the main thread has come to `what`; one that comes no further is named by others."""
    _state.at = what
    _state.step += 1


def leave(code: int, message: str) -> None:
    """End this process's part: quietly, or telling the others why. Does not return on a failure."""
    if count() == 1 or _state.leaving.is_set():
        return
    if code == 0 or code > 128:  # done, or all of them stopped by a signal
        _end_together()
        return
    if message.startswith("JaxRuntimeError") and "RESOURCE_EXHAUSTED" not in message:
        # What a collective says when another process is gone; the watch will say which and end us.
        time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
    _fail(code, message)


def _end_together() -> None:
    """Part from the others, none of which has failed."""
    import jax

    at("the end")  # process 0 may still be writing: until it comes, all say that they live
    _state.client.wait_at_barrier("jlrm-end", NEVER)
    _state.leaving.set()
    if _state.watcher is not None:  # in the middle of a call it would not survive the interpreter
        _state.watcher.join(10.0)
    jax.distributed.shutdown()


def _fail(code: int, message: str) -> NoReturn:
    """Tell the others why this process ends, and end it."""
    _state.leaving.set()
    failure = json.dumps({"code": code, "message": message, "host": socket.gethostname()})
    with contextlib.suppress(Exception):  # the service may be what has failed
        _state.client.key_value_set(f"jlrm/failed/{index()}", failure)
        time.sleep(3 * BEAT_SECONDS)  # process 0 keeps the store: the others have yet to read it
    _exit(code)


def _initialise(args: argparse.Namespace) -> None:
    settings = cluster.settings(args)
    if settings is None:
        return
    import jax

    # We agree on a step to stop at ourselves; jax's own handler would swallow SIGTERM until then.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"Could not join the other processes ({reason}). Start all of them with the same "
            "--coordinator, or set --distributed off for one alone."
        ) from None
    from jax._src import distributed  # there is no public way to the key-value store

    _state.client = distributed.global_state.client
    _state.count, _state.index = jax.process_count(), jax.process_index()


def _check_same(settings: Mapping[str, Any]) -> None:
    """Compare what every process is about to run; before anything compiles."""
    import jax

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
                f"{', '.join(changed)}. Start all of them alike."
            )


@dataclass
class _Seen:
    """What is known of another process, by this one's clock."""

    beat: int = -1
    step: int = -1
    at: str = "start-up"
    host: str = "?"
    beat_time: float = 0.0
    step_time: float = 0.0


def _watch(timeout: float) -> None:
    """Tell that this process lives, and end it when another can't go on."""
    seen = {number: _Seen(beat_time=time.monotonic()) for number in range(count())}
    beat, host = 0, socket.gethostname()
    while not _state.leaving.is_set():
        beat += 1
        try:
            mine = json.dumps([beat, _state.step, _state.at, host])
            _state.client.key_value_set(f"jlrm/alive/{index()}", mine, allow_overwrite=True)
            failed = _state.client.key_value_dir_get("jlrm/failed")
            alive = _state.client.key_value_dir_get("jlrm/alive")
        except Exception as error:  # the service lives in process 0
            if not _state.leaving.is_set():
                reason = str(error).splitlines()[0]
                _give_up(GONE, f"Process 0 ({seen[0].host}) is gone: {reason}")
            return
        for key, text in failed:
            told = json.loads(text)
            number = key.rpartition("/")[2]
            _give_up(told["code"], f"Process {number} ({told['host']}) failed: {told['message']}")
        _note(seen, alive)
        _check_alive(seen, timeout)
        _state.leaving.wait(BEAT_SECONDS)


def _note(seen: dict[int, _Seen], alive: list[tuple[str, str]]) -> None:
    now = time.monotonic()
    for key, text in alive:
        about = seen[int(key.rpartition("/")[2])]
        beat, step, about.at, about.host = json.loads(text)
        if beat != about.beat:
            about.beat, about.beat_time = beat, now
        if step != about.step:
            about.step, about.step_time = step, now


def _check_alive(seen: dict[int, _Seen], timeout: float) -> None:
    now, furthest = time.monotonic(), max(about.step for about in seen.values())
    for number, about in seen.items():
        if now - about.beat_time > SILENT_SECONDS:
            silent = f"{now - about.beat_time:.0f} s"
            _give_up(GONE, f"Process {number} ({about.host}) has been silent for {silent}.")
        is_behind = 0 <= about.step < furthest
        if is_behind and now - about.step_time > timeout:
            _give_up(
                GONE,
                f"Process {number} ({about.host}) hangs: it has come no further than "
                f"'{about.at}' for {timeout:.0f} s (run.host_timeout), and the others wait for it.",
            )


def _give_up(code: int, message: str) -> None:
    if _state.leaving.is_set():
        return
    _state.leaving.set()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if is_main():
        time.sleep(3 * BEAT_SECONDS)  # the store ends with this process: let the others read it too
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End at once: what runs at an orderly exit would wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
