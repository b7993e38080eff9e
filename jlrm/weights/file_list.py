"""The list of a step's files: their sizes, and a checksum of every byte.

Digests (digests.py) say that the numbers of a step are those that were saved. The list says so of
its files: a bit that flips in bytes that no reader needs today is damage all the same, and shows
that the disk can't be trusted. It has a digest of its own, and is read only as it was written.

A store such as gs:// compares checksums itself whenever a file is read, so of large files there the
size alone is listed. Lists of older programs hold sizes alone.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from jlrm.runtime.storage import write_atomically
from jlrm.weights import digests

NAME = "files.json"
PIECE = 2**24  # bytes that are read at a time
LARGE = 2**20  # bytes: of larger files a store is trusted

Listed = dict[str, Any]  # name: [bytes, checksum]; by older programs bytes alone


class Listing:
    """What `read_files` finds in a step that is being saved, read in the background.

    A step gets its name when its save has finished.
    """

    def __init__(self, directory: epath.Path) -> None:
        self._directory = directory
        self._found: Listed = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="checksums", daemon=True)
        self._thread.start()

    def finish(self) -> Listed:
        """Return what is found, after the save has ended; empty: nothing could be read."""
        self._is_over.set()
        self._thread.join()
        return self._found

    def _read(self) -> None:
        while not self._directory.exists() and not self._is_over.wait(0.1):
            pass
        with contextlib.suppress(OSError):  # whoever reads next meets it again, and says so
            self._found = read_files(self._directory)


def read_files(directory: epath.Path) -> Listed:
    """Return what there is to write down of a step's files; reads all of them."""
    is_local = "://" not in str(directory)
    return {
        name: [size, _checksum(directory / name)] if is_local or size <= LARGE else [size]
        for name, size in _sizes(directory)
    }


def write(directory: epath.Path, listed: Listed) -> None:
    """Write the list into its step, as a whole."""
    content = _spelled(listed)
    if "://" in str(directory):
        (directory / NAME).write_bytes(content)  # a store writes a file whole or not at all
    else:
        write_atomically(pathlib.Path(directory) / NAME, content)


def is_written(directory: epath.Path) -> bool:
    """Return whether a step has a list of its files."""
    return (directory / NAME).exists()


def damage(directory: epath.Path) -> str:
    """Return which file is missing, or of another size than listed; empty: none is.

    Never raises for anything that the list may hold.
    """
    sizes = dict(_sizes(directory))
    if not is_written(directory):
        empty = [name for name, size in sizes.items() if not size]
        return f"{empty[0]} is empty" if empty else ""
    listed = _read(directory)
    if listed is None:
        return f"{NAME} can't be read"
    for name, (size, *_) in listed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes, not {size}"
    return ""


def changed(directory: epath.Path, item: str = "") -> str:
    """Return which file of a step is not what was listed; empty: none is. Reads all of them.

    Args:
      item: read only the files of this item; empty: all files.
    """
    for name, (_, *checksum) in (_read(directory) or {}).items():
        is_wanted = name.startswith(f"{item}/") if item else True
        if is_wanted and checksum and _checksum(directory / name) != checksum[0]:
            item, _, file = name.partition("/")
            where = f"its item '{item}' is not what was saved, in {file}"
            return where if file else f"{name} is not what was saved"
    return ""


def _read(directory: epath.Path) -> Listed | None:
    """Return the list with every entry as [bytes, checksum] or [bytes]; None: it is damaged."""
    if not is_written(directory):
        return {}
    content = (directory / NAME).read_bytes()
    try:
        listed = json.loads(content)
        if digests.SEAL not in listed:
            return {str(name): [int(size)] for name, size in listed.items()}
        entries = {name: entry for name, entry in listed.items() if name != digests.SEAL}
        return entries if _spelled(entries) == content else None
    except (ValueError, OverflowError, AttributeError, TypeError, RecursionError):
        return None


def _spelled(listed: Listed) -> bytes:
    return json.dumps(digests.sealed(listed), sort_keys=True).encode()


def _checksum(file: epath.Path) -> int:
    """Return the CRC-32 of a file, which every single flipped bit changes."""
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def _sizes(directory: epath.Path, within: str = "") -> Iterator[tuple[str, int]]:
    for entry in sorted(directory.iterdir()):
        name = within + entry.name
        if entry.is_dir():
            yield from _sizes(entry, f"{name}/")
        elif name not in (NAME, f"{NAME}.partial"):
            yield name, int(entry.stat().length)
