"""One writer for a directory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from jlrm.config import UsageError

LOCK_FILE = ".writer"


@contextlib.contextmanager
def sole_writer(directory: pathlib.Path) -> Iterator[None]:
    """Hold a directory for this process, so that no other one writes there meanwhile.

    The kernel releases the lock when the process ends, even when it is killed. A platform or a file
    system without locks holds nothing.

    Raises:
      UsageError: another process holds it; the message names its number and its host.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UsageError(
                f"{directory} is written by {owner}. Wait until it ends, or name another directory."
            ) from None
        except OSError:  # some network file systems
            pass
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
