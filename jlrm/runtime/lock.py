"""One writer for a directory, on the local disk by the kernel's locks, in a store by an object.

A store has no locks and does not hear of a process that is killed. It makes an object only if there
is none (on gs://, generation 0 is asked for), and the writer changes that object every `BEAT`
seconds. Who finds one waits until it has changed, and leaves, or until it has not for `SILENT`
seconds, and takes it over, loudly. Clocks of two machines are never compared. A writer that was cut
off for so long finds another one's name there, and ends at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any

from jlrm.config import RunError, UsageError
from jlrm.runtime.storage import LOCK_FILE, Place, open_place

BEAT = 15.0  # seconds between two changes of a writer's object
SILENT = 60.0  # seconds without one, after which a writer counts as gone
SETTLE = 2.0  # seconds in which two that take over at once see each other, and a write ends


def is_locked(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False: another process holds it.

    The kernel releases the lock when the process ends, even when it is killed. A platform or a file
    system without locks holds nothing, and anyone may write.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        pass
    return True


@contextlib.contextmanager
def sole_writer(directory: pathlib.Path) -> Iterator[Callable[[], bool]]:
    """Hold a directory for this process, so that no other one writes there meanwhile.

    As `is_locked` holds a file.

    Yields:
      A function that returns whether the directory is still there: its disk may have vanished, and
      a path is made anew by whoever writes to it.

    Raises:
      UsageError: another process holds it; the message names its number and its host.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK_FILE, "a+", encoding="utf-8") as file:
        if not is_locked(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UsageError(
                f"{directory} is written by {owner}. Wait until it ends, or name another directory."
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

        def is_there() -> bool:
            try:
                return os.path.samestat(os.stat(directory / LOCK_FILE), os.fstat(file.fileno()))
            except OSError:
                return False

        yield is_there


@contextlib.contextmanager
def sole_writer_of_store(url: str) -> Iterator[Callable[[], bool]]:
    """Hold a directory of a store for this process, as `sole_writer` does a local one.

    A writer whose store vanishes hears of it when it writes, so that is not asked here.

    Raises:
      UsageError: another process writes there; the message names its number and its host.
      RunError: the store can't be used.
    """
    place = open_place(url)
    path = f"{place.root}/{LOCK_FILE}"
    mine = {
        "writer": f"process {os.getpid()} on {socket.gethostname()}",
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }
    _take(place, path, mine)
    has_ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(place, path, mine, has_ended), daemon=True)
    beating.start()
    try:
        yield lambda: True
    finally:
        has_ended.set()
        beating.join()
        with contextlib.suppress(OSError, UsageError):
            if (_read(place, path) or {}).get("token") == mine["token"]:
                place.system.rm_file(path)


def _take(place: Place, path: str, mine: dict[str, str]) -> None:
    """Make the object, or take over that of a writer that is gone."""
    if _make(place, path, mine):
        return
    found = _read(place, path)
    until = time.monotonic() + SILENT
    if found:
        who = f"{found['writer']} (since {found['since']})"
        print(
            f"{place.name} is held by {who}. Waiting {SILENT:.0f} s to see whether it still lives.",
            file=sys.stderr,
            flush=True,
        )
        while time.monotonic() < until and (now := _read(place, path)):
            if now != found:
                raise UsageError(
                    f"{place.name} is written by {now['writer']}. Wait until it ends, or name "
                    "another directory."
                )
            time.sleep(min(BEAT / 3, max(until - time.monotonic(), 0.0)))
        print(f"{who} is gone: {place.name} is taken over.", file=sys.stderr, flush=True)
        with contextlib.suppress(FileNotFoundError):
            place.system.rm_file(path)
    is_made = _make(place, path, mine)
    time.sleep(SETTLE)
    now = _read(place, path) or {}
    if not is_made or now.get("token") != mine["token"]:
        other = now.get("writer", "another process")
        raise UsageError(f"{place.name} has just been taken by {other}. Wait until it ends.")


def _make(place: Place, path: str, content: dict[str, Any]) -> bool:
    """Make the object unless there is one; return whether it was made."""
    try:
        place.system.makedirs(place.root, exist_ok=True)
        place.system.pipe_file(path, json.dumps(content).encode(), mode="create")
    except FileExistsError:
        return False
    except Exception as error:  # a store's client raises anything
        raise RunError(f"Cannot use {place.name}: {error}") from error
    return True


def _read(place: Place, path: str) -> dict[str, Any] | None:
    """Return what the object holds, None if there is none.

    A bucket's objects change at once; a file that is being written is read again.
    """
    until = time.monotonic() + SETTLE
    while True:
        place.system.invalidate_cache()
        try:
            content = json.loads(place.system.cat_file(path))
            if isinstance(content, dict) and {"writer", "since", "token"} <= content.keys():
                return content
        except FileNotFoundError:
            return None
        except ValueError:
            pass
        if time.monotonic() >= until:  # somebody else's file
            raise UsageError(f"{place.name}/{LOCK_FILE} is no lock of jlrm. Remove it.")
        time.sleep(SETTLE / 20)


def _beat(place: Place, path: str, mine: dict[str, str], has_ended: threading.Event) -> None:
    """Change the object again and again; end the process if another one has taken it over."""
    number = 0
    while not has_ended.wait(BEAT):
        number += 1
        try:
            now = _read(place, path)
            if now is None or now["token"] == mine["token"]:
                place.system.pipe_file(path, json.dumps(mine | {"beat": number}).encode())
                continue
        except Exception:  # the store is out of reach for a moment
            continue
        print(
            f"error: {now['writer']} has taken over {place.name}, having heard nothing of this "
            f"process for {SILENT:.0f} s. It ends, so that one alone writes there.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
