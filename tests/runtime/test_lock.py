"""One writer in a store: the second one leaves, and a dead one's place is taken."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from jlrm.config import UsageError
from jlrm.runtime import lock

DEAD = {"writer": "process 7 on judge-0", "since": "2026-01-02T03:04:05+00:00", "token": "dead"}


@pytest.fixture
def store(tmp_path, monkeypatch) -> tuple[str, pathlib.Path]:
    """Return a store's url, and its object on this disk; seconds become hundredths."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENT", 1.0)
    monkeypatch.setattr(lock, "SETTLE", 0.2)
    return f"file://{tmp_path}/store/run", tmp_path / "store/run" / lock.LOCK_FILE


def refused(url: str) -> str:
    with pytest.raises(UsageError) as error, lock.sole_writer_of_store(url):
        pass
    return str(error.value)


def wait_for(is_true) -> None:
    end = time.monotonic() + 20
    while not is_true() and time.monotonic() < end:
        time.sleep(0.01)
    assert is_true()


def test_the_second_writer_leaves_as_soon_as_the_first_shows_that_it_lives(store, capsys):
    url, path = store
    with lock.sole_writer_of_store(url):
        held = json.loads(path.read_text())
        assert held["writer"].startswith(f"process {os.getpid()} on ")
        assert f"written by process {os.getpid()} on " in refused(url)
        assert "to see whether it still lives" in capsys.readouterr().err
        assert json.loads(path.read_text())["token"] == held["token"]
    assert not path.exists()
    with lock.sole_writer_of_store(url):  # which is free again
        pass


def test_the_place_of_a_dead_writer_is_taken_loudly(store, capsys):
    url, path = store
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(DEAD))
    began = time.monotonic()
    with lock.sole_writer_of_store(url):
        assert time.monotonic() - began >= lock.SILENT
        assert json.loads(path.read_text())["token"] != "dead"
    said = capsys.readouterr().err
    assert "process 7 on judge-0 (since 2026-01-02T03:04:05+00:00) is gone" in said


def test_a_writer_that_ends_meanwhile_is_waited_for_no_longer(store):
    url, path = store
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(DEAD))
    threading.Timer(0.1, path.unlink).start()
    began = time.monotonic()
    with lock.sole_writer_of_store(url):
        assert time.monotonic() - began < lock.SILENT


def test_of_two_that_take_over_one_leaves(store, monkeypatch):
    """The other one's object stands where ours was made."""
    url, path = store
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(DEAD))
    monkeypatch.setattr(lock, "SILENT", 0.1)
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    made = lock._make

    def make(place, where, content) -> bool:
        is_made = made(place, where, content)
        if is_made:
            path.write_text(json.dumps(DEAD | {"writer": "process 8", "token": "other"}))
        return is_made

    monkeypatch.setattr(lock, "_make", make)
    assert "has just been taken by process 8" in refused(url)
    assert json.loads(path.read_text())["token"] == "other"


@pytest.mark.parametrize("content", ["mine", "[]", '{"writer": 7}'])
def test_a_file_that_is_no_lock_is_named(store, content):
    url, path = store
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert ".writer is no lock of jlrm. Remove it" in refused(url)


@pytest.mark.parametrize("half", ["", '{"writer": "pro'])
def test_a_lock_that_is_being_written_is_read_again(store, monkeypatch, half):
    """A store on a disk shows an object while it is written."""
    url, path = store
    monkeypatch.setattr(lock, "SETTLE", 20.0)
    path.parent.mkdir(parents=True)
    path.write_text(half)
    has_ended = threading.Event()

    def write() -> None:
        beat = 0
        while not has_ended.wait(0.2):
            beat += 1
            (path.parent / "new").write_text(json.dumps(DEAD | {"beat": beat}))
            (path.parent / "new").rename(path)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        assert "is written by process 7 on judge-0" in refused(url)
    finally:
        has_ended.set()
        writing.join()


@pytest.mark.slow  # two processes
def test_a_writer_that_was_taken_over_ends_and_a_killed_one_leaves_its_object(store):
    url, path = store
    code = (
        "import sys, time\nfrom jlrm.runtime import lock\nlock.BEAT = 0.05\n"
        "with lock.sole_writer_of_store(sys.argv[1]):\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, url]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(path.exists)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert path.exists()
    path.unlink()
    second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(path.exists)
    path.write_text(json.dumps(DEAD))
    said = second.communicate(timeout=30)[1]
    assert second.returncode == 1 and "process 7 on judge-0 has taken over" in said
    assert json.loads(path.read_text())["token"] == "dead"
