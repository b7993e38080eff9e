"""A run directory in a store: its small files are mirrored, its checkpoints are Orbax's."""

from __future__ import annotations

import errno
import os
import pathlib
import threading
import time
from typing import Any

import pytest

from jlrm.config import UsageError
from jlrm.runtime import storage


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path / "cache"))


def test_a_local_directory_is_its_own_mirror(tmp_path):
    mirror = storage.mirror(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("a")
    mirror.push()
    mirror.pull()
    assert mirror.local == tmp_path and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_pushed_comes_back_on_another_machine(tmp_path):
    url = f"file://{tmp_path}/store/run"
    mine = storage.mirror(url)
    mine.pull()  # nothing is there yet
    (mine.local / "model").mkdir()
    (mine.local / "model" / "config.json").write_text("{}")
    (mine.local / "metrics.jsonl").write_text("1\n")
    (mine.local / "old.parquet").write_text("old")
    (mine.local / "torn.partial").write_text("half")
    mine.push()
    (tmp_path / "store/run/checkpoints/grpo/1").mkdir(parents=True)
    (tmp_path / "store/run/checkpoints/grpo/1/weights").write_text("large")
    (mine.local / "metrics.jsonl").write_text("1\n2\n")
    (mine.local / "old.parquet").unlink()
    mine.push()
    theirs = storage.mirror(url)
    assert not any(theirs.local.iterdir())  # what an earlier process left here is not trusted
    theirs.pull()
    files = {str(p.relative_to(theirs.local)) for p in theirs.local.rglob("*") if p.is_file()}
    assert files == {"metrics.jsonl", "model/config.json"}
    assert (theirs.local / "metrics.jsonl").read_text() == "1\n2\n"


def test_only_what_has_changed_is_copied(tmp_path):
    url = f"file://{tmp_path}/store"
    mine = storage.mirror(url)
    (mine.local / "a").write_text("a")
    mine.push()
    (tmp_path / "store" / "a").write_text("theirs")
    mine.push()
    assert (tmp_path / "store" / "a").read_text() == "theirs"


def test_a_store_that_nothing_can_reach_is_refused():
    with pytest.raises(UsageError, match="Cannot open nosuch://bucket"):
        storage.mirror("nosuch://bucket/run").pull()


def test_a_reader_does_not_touch_what_training_writes(tmp_path):
    url = f"file://{tmp_path}/store"
    training = storage.mirror(url)
    (training.local / "metrics.jsonl").write_text("1\n")
    training.push()
    reader = storage.mirror(url)  # of the same process, as of another on the same machine
    reader.pull()
    with (training.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    training.push()
    assert (tmp_path / "store" / "metrics.jsonl").read_text() == "1\n2\n"
    assert (reader.local / "metrics.jsonl").read_text() == "1\n"


@pytest.mark.parametrize("text", ["", "  ", "lost.\nand more"])
def test_an_error_says_something_whatever_it_holds(text):
    assert storage.first_line(ValueError(text)) in ("ValueError", "lost")


# ------------------------------------------------------------------ a disk that fails


def full_at_first(monkeypatch, times: int) -> list[int]:
    """Let syncing to disk, the last part of a write, fail so many times."""
    calls: list[int] = []

    def sync(_: int) -> None:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", sync)
    return calls


def test_what_a_full_disk_refused_is_written_when_there_is_space(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    calls = full_at_first(monkeypatch, 2)
    storage.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and len(calls) == 3
    assert caplog.text.count("No space left on device. Trying again") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_stays_full_leaves_the_old_content(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    (tmp_path / "a").write_bytes(b"old")
    full_at_first(monkeypatch, 9)
    with pytest.raises(OSError, match="No space is left"):
        storage.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    path, real, tries = tmp_path / "log", pathlib.Path.open, []
    storage.append(path, "first\n")

    class Half:
        """A file of which half a line is written, as on a disk that is full."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            tries.append(text)
            self.file.write(text if len(tries) > 1 else text[: len(text) // 2])
            self.file.flush()
            if len(tries) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "open", lambda self, *a, **k: Half(real(self, *a, **k)))
    storage.append(path, "second\n")
    monkeypatch.undo()
    assert path.read_text() == "first\nsecond\n" and len(tries) == 2


def test_a_path_that_can_never_be_written_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (3600.0,))
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write_atomically(tmp_path / "a", b"new")


def test_a_disk_that_does_not_answer_is_named_while_it_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "SLOW", 0.05)
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    pipe = tmp_path / "metrics.jsonl"
    os.mkfifo(pipe)  # to open it for writing takes until somebody reads
    writing = threading.Thread(target=storage.append, args=(pipe, "a line"))
    writing.start()
    while sum("does not answer" in message for message in caplog.messages) < 2:
        assert writing.is_alive()
        time.sleep(0.01)
    assert str(pipe) in caplog.messages[0]
    assert pipe.read_text() == "a line"
    writing.join()
    assert "ended after" in caplog.messages[-1]
    said = len(caplog.messages)
    storage.append(tmp_path / "fast", "a line")
    assert len(caplog.messages) == said
