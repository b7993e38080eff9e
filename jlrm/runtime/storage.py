"""Directories and files on the local disk and in stores such as gs://, by fsspec.

`local_copy` copies what is read to the local disk, once per version. A `Place` is where a dataset
is written, and a `Mirror` is where a run is. Nothing here knows about rows.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from jlrm.config import RunError, UsageError

log = logging.getLogger(__name__)


# A disk that is full or away may come back: seconds between tries to write.
PAUSES = (5.0, 15.0, 40.0)
SLOW = 60.0  # seconds in which a write should have ended
PASSING = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV),
)

FAILURES = {  # marks in the errors of tensorstore, which are all ValueErrors
    **{text: text for text in map(os.strerror, (*PASSING, errno.EROFS))},
    "RESOURCE_EXHAUSTED": os.strerror(errno.ENOSPC),
    "UNAVAILABLE": "the store does not answer",
    "DEADLINE_EXCEEDED": "the store does not answer in time",
}


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    patiently(path, write)


def append(path: pathlib.Path, text: str) -> None:
    """Add to a file, whole or not at all."""

    def write() -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise

    patiently(path, write)


def patiently(path: pathlib.Path, write: Callable[[], None]) -> None:
    """Write, and try again for a minute where the disk is full or away; then OSError."""
    for pause in PAUSES:
        try:
            with told_if_slow(path):
                return write()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            log.warning("%s: %s. Trying again in %.0f s.", path, error.strerror, pause)
            time.sleep(pause)
    with explain_full_disk(path):
        return write()


@contextlib.contextmanager
def told_if_slow(path: os.PathLike[str] | str) -> Iterator[None]:
    """Say that a write is waited for after `SLOW` seconds, each time that the wait has doubled.

    A disk that is frozen, or a store that does not answer, holds up whoever writes to it, and no
    error ends that: another thread has to tell why nothing goes on.
    """
    began, has_ended = time.monotonic(), threading.Event()

    def tell() -> None:
        wait = SLOW
        while not has_ended.wait(wait):
            log.warning(
                "Writing to %s has taken %.0f s: the disk or the store is slow, or does not "
                "answer. What was saved before is whole; this goes on as soon as it does.",
                path,
                waited := time.monotonic() - began,
            )
            wait = waited

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        has_ended.set()
        if (waited := time.monotonic() - began) >= SLOW:
            log.warning("Writing to %s ended after %.0f s.", path, waited)


def failure(error: Exception) -> str:
    """Return what storage fails by, in the words of a system or of tensorstore; "": it does not."""
    if isinstance(error, OSError) and error.errno in (*PASSING, errno.EROFS, errno.ENOENT):
        return error.strerror or first_line(error)
    return next((said for mark, said in FAILURES.items() if mark in str(error)), "")


@contextlib.contextmanager
def explain_full_disk(path: pathlib.Path) -> Iterator[None]:
    """Add to the error of a full disk what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "No space is left. Free some and repeat the command, which resumes by itself"
        raise OSError(error.errno, advice, str(path)) from error


# A directory without both is no TFDS dataset. So they are copied last: a reader never takes an
# unfinished copy for a dataset.
LAST_FILES = ("features.json", "dataset_info.json")
# Fields that tell two versions of a remote file apart. Each file system has some of them.
STAMPS = ("size", "etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "created")
LOCK_FILE = ".writer"  # whose directory it is, see lock.py
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


def cache() -> pathlib.Path:
    """Return the directory for what can be made again: copies, compiled programs, plans."""
    return pathlib.Path(os.environ.get("JLRM_CACHE") or "~/.cache/jlrm").expanduser()


def local_copy(url: str) -> pathlib.Path:
    """Copy a file or prepared directory into the cache, unless this version is already there."""
    system, root = _open(url)
    files = _remote_files(system, root, url)
    parent, _, base = root.rpartition("/")
    version = hashlib.sha256(json.dumps([url, files]).encode()).hexdigest()[:32]
    cached = cache() / version / base
    if cached.exists():
        return cached
    cache().mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted copy is never read.
    with tempfile.TemporaryDirectory(dir=cache(), prefix="incomplete-") as holder:
        whole = pathlib.Path(holder) / "whole"
        local = [whole / name[len(parent) :].lstrip("/") for name in files]
        for path in local:
            path.parent.mkdir(parents=True, exist_ok=True)
        system.get(list(files), [str(path) for path in local])
        try:
            whole.rename(cache() / version)
        except OSError:
            if not cached.exists():  # else another process has just made the same copy
                raise
    return cached


def _remote_files(system: Any, root: str, url: str) -> dict[str, list[str]]:
    """Return the names of the files, each with the fields that change when the file does."""
    is_directory = system.isdir(root)
    infos = system.find(root, detail=True) if is_directory else {root: system.info(root)}
    infos = {name: info for name, info in sorted(infos.items()) if info.get("type") == "file"}
    if is_directory and f"{root}/features.json" not in infos:
        raise UsageError(
            f"{url} is no file, and no prepared TFDS directory (it has no features.json)."
        )
    if any(".." in name.split("/") for name in infos):
        raise UsageError(f"{url} contains a file named '..', which would leave the cache.")
    return {name: [str(info.get(stamp)) for stamp in STAMPS] for name, info in infos.items()}


@dataclass(frozen=True)
class Place:
    """Where a dataset is written: a local directory, or a directory of a store, named by a URL."""

    name: str  # as the user spelled it
    system: Any  # fsspec's file system
    root: str  # the directory's name there

    @property
    def is_remote(self) -> bool:
        """Whether files are copied there one by one: no store can rename a directory at once."""
        return "://" in self.name

    def files(self) -> set[str]:
        """Return the names of all files, relative to the directory; empty if it does not exist.

        Raises:
          UsageError: it is a file.
        """
        with _explained(self.name):
            if self.system.isfile(self.root):
                raise UsageError(f"{self.name} is a file. Name a directory.")
            return {path[len(self.root) :].lstrip("/") for path in self.system.find(self.root)}

    def holds_dataset(self, files: set[str]) -> bool:
        """Return whether these files include a complete dataset."""
        return files.issuperset(LAST_FILES)

    def read_json(self, name: str) -> Any:
        """Read a file that `add_files` wrote."""
        with _explained(self.name):
            return json.loads(self.system.cat_file(f"{self.root}/{name}"))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        with _explained(self.name):
            for name in names:
                self.system.rm_file(f"{self.root}/{name}")

    def upload(self, directory: pathlib.Path) -> None:
        """Copy a dataset into a store, beside the files of it that are there already."""
        with _explained(self.name):
            self.system.makedirs(self.root, exist_ok=True)
            names = sorted({file.name for file in directory.iterdir()} - {*LAST_FILES})
            for name in tqdm([*names, *LAST_FILES], desc="upload", delay=1):
                self.system.put_file(str(directory / name), f"{self.root}/{name}")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any error of a store's client into a RunError that names the store."""
    try:
        yield
    except (OSError, UsageError):
        raise
    except Exception as error:  # a store's client raises anything
        raise RunError(f"Cannot use {name}: {error}") from error


def open_place(name: str) -> Place:
    """Open a directory, which need not exist, or a URL such as gs://BUCKET/DIR.

    Raises:
      UsageError: no installed package can reach this kind of store.
    """
    return Place(name, *_open(os.path.expanduser(name)))


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path of its root there; nothing cached is used."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(url.partition("://")[0])
        advice = f" Do: pip install {package}" if package else ""
        reason = first_line(error)
        raise UsageError(f"Cannot open {url}: {reason}.{advice}") from None
    system.invalidate_cache()
    return system, root.rstrip("/")


@dataclass(frozen=True)
class Mirror:
    """The local copy of a run directory's small files; for a local run, the directory itself.

    A store can't append to a file, but the log of a run grows line by line. So these files are
    written here, and copied to the store whenever a checkpoint is saved. Orbax writes checkpoints
    to the store itself.
    """

    url: str  # "": there is no store
    local: pathlib.Path
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict)

    def pull(self) -> None:
        """Copy the files of the store here, over those of the same name."""
        if not self.url:
            return
        system, root = _open(self.url)
        with _explained(self.url):
            names = [path[len(root) :].lstrip("/") for path in system.find(root)]
            for name in filter(_is_small, names):
                if ".." in name.split("/"):
                    raise UsageError(f"{self.url} contains a file named '..'.")
                path = self.local / name
                path.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(f"{root}/{name}", str(path))
                self._pushed[name] = _stamp(path)

    def push(self) -> None:
        """Copy to the store what has changed here since the last time; remove what is gone here."""
        if not self.url:
            return
        system, root = _open(self.url)
        files = [path for path in sorted(self.local.rglob("*")) if path.is_file()]
        now = {str(path.relative_to(self.local)): _stamp(path) for path in files}
        now = {name: stamp for name, stamp in now.items() if _is_small(name)}
        with _explained(self.url), told_if_slow(self.url):
            for name, stamp in now.items():
                if self._pushed.get(name) != stamp:
                    system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                    system.put_file(str(self.local / name), f"{root}/{name}")
                    self._pushed[name] = stamp
            for name in self._pushed.keys() - now.keys():
                system.rm_file(f"{root}/{name}")
                del self._pushed[name]


def mirror(name: str) -> Mirror:
    """Open the local side of a run directory, which need not exist; `pull` fills it."""
    if "://" not in name:
        return Mirror("", pathlib.Path(name).expanduser())
    (cache() / "runs").mkdir(parents=True, exist_ok=True)
    # One each: who reads a run must not share a directory with the training that writes it.
    local = pathlib.Path(tempfile.mkdtemp(dir=cache() / "runs"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    return Mirror(name.rstrip("/"), local)


def _is_small(name: str) -> bool:
    is_own = name == LOCK_FILE or name.endswith(".partial")
    return not name.startswith("checkpoints/") and not is_own


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
