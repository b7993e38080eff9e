"""Commands of a study that run at once: their order, their logs, and what stops them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import yaml

from jlrm import study
from jlrm.config import RunError
from jlrm.runtime import commands
from jlrm.studies import jobs
from jlrm.studies.cells import Cell

ROOT = pathlib.Path(__file__).parents[2]
# Each notes its beginning and its end in a file that all share; `meet` waits until another has
# begun, so it ends only where two run at once.
MODULE = """
import pathlib, signal, sys, time
name, what, file = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
def note(line):
    with file.open("a") as out:
        out.write(line + "\\n")
def stop(*_):
    note("heard " + name)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
note("begin " + name)
print("this is", name, flush=True)
deadline = time.monotonic() + 30
while what != "pass" and what not in file.read_text():
    if time.monotonic() > deadline:
        sys.exit("nothing came")
    time.sleep(0.02)
time.sleep(1.0 if name == "long" else 0.0)  # what it waited for has left by then
note("end " + name)
sys.exit(3 if name.startswith("bad") else 0)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "noted.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def cell(tmp_path, name, waits_for="pass", needs=()):
    return Cell(name, ("noted", name, waits_for, str(tmp_path / "notes")), needs)


def notes(tmp_path) -> list[str]:
    return (tmp_path / "notes").read_text().splitlines()


def test_two_run_at_once_and_none_before_what_it_needs(tmp_path, capfd):
    wanted = [
        cell(tmp_path, "a", waits_for="begin c"),
        cell(tmp_path, "b", needs=("a",)),
        cell(tmp_path, "c", waits_for="end a"),
        cell(tmp_path, "d", needs=("b", "c")),
    ]
    done: list[Cell] = []
    logs = tmp_path / "logs"
    assert jobs.run_all(wanted, [], done.append, False, jobs=2, logs=logs) == []
    said = notes(tmp_path)
    assert sorted(said[:2]) == ["begin a", "begin c"] and said[2] == "end a"
    assert said.index("begin b") > said.index("end a") and said[-2:] == ["begin d", "end d"]
    assert {each.key for each in done} == set("abcd")
    assert (logs / "a.log").read_text() == "this is a\n"
    told = capfd.readouterr().err
    assert "[2/4] c" in told and "done: d" in told and "this is" not in told


def test_a_failure_shows_its_log_and_what_runs_ends_first(tmp_path, capfd):
    wanted = [
        cell(tmp_path, "bad", waits_for="begin long"),
        cell(tmp_path, "long", waits_for="end bad"),
        cell(tmp_path, "after", needs=("bad",)),
        cell(tmp_path, "other"),
    ]
    done: list[Cell] = []
    with pytest.raises(RunError, match="bad failed; what it said stands above"):
        jobs.run_all(wanted, [], done.append, False, jobs=2, logs=tmp_path / "logs")
    assert [each.key for each in done] == ["long"] and "begin other" not in notes(tmp_path)
    told = capfd.readouterr().err
    assert "this is bad\nbad ended with exit code 3; all that it said: " in told
    failed = jobs.run_all(wanted, [], done.append, True, jobs=2, logs=tmp_path / "logs")
    assert [each.key for each in failed] == ["bad", "after"]
    assert {each.key for each in done[1:]} == {"long", "other"}


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_signal_reaches_all_that_run(tmp_path, names):
    logs = repr(str(tmp_path / "logs"))
    script = (
        "import pathlib\n"
        "from jlrm.runtime import commands\n"
        "from jlrm.studies.cells import Cell\n"
        "from jlrm.studies import jobs\n"
        f"words = [('noted', name, 'never', {str(tmp_path / 'notes')!r}) for name in {names!r}]\n"
        "wanted = [Cell(each[1], each) for each in words]\n"
        f"logs = pathlib.Path({logs}) if len(wanted) > 1 else None\n"
        "commands.finish(lambda: jobs.run_all(wanted, [], print, False, len(wanted), logs))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    file = tmp_path / "notes"
    while not (file.exists() and len(notes(tmp_path)) == len(names)):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    told = process.stderr.read()
    assert process.wait(30) == 143
    heard = [line for line in notes(tmp_path) if line.startswith("heard ")]
    assert sorted(heard) == [f"heard {name}" for name in names]
    assert f"Stopped in {', '.join(names)}. The same command goes on from there." in told
    assert "this is a" in told  # on the terminal, or as the end of its log


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--jobs", "2", "--distributed", "on"]])
def test_a_number_that_no_machine_can_run_is_refused(words, capsys):
    path = str(ROOT / "configs/study/toy.yaml")
    assert commands.run(lambda: study.main([path, "--dir", "nowhere", *words])) == 2
    assert "several hosts run each command together" in capsys.readouterr().err


@pytest.mark.slow
def test_each_training_is_planned_for_a_slice(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tree = {
        "dir": str(tmp_path / "out"),
        "config": "configs/quickstart.yaml",
        "settings": ["grpo.steps=0"],
        "runs": {
            "small": {"label": "a toy"},
            # Its optimiser alone holds more than any machine that runs this.
            "large": {"after": "small", "settings": ["model.preset=qwen2.5-72b"]},
            "paid": {"settings": ["reward.length=0.2", "run.seed=1"]},
            "longer": {"model": "longer", "arguments": ["--backend", "heuristic"]},
        },
        "evaluations": {"pairs": {"benchmark": "pairs", "data": "lists#heldout"}},
        "tables": {"main": {"columns": ["pairs.overall"]}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    code = commands.run(lambda: study.main([str(path), "--topology", "here", "--jobs", "2"]))
    told = capfd.readouterr()
    assert code == 1, told.err
    first, second, third = told.out.splitlines()
    assert first.startswith("a toy: Fits: ") and second.startswith("large: Does not fit, by ")
    assert third == "paid: the same programs as a toy."  # so it has no plan of its own
    assert sorted(path.name for path in tmp_path.glob("out/plans/here/*")) == ["large", "small"]
    assert "1 of 3 trainings do not fit here" in told.err
    assert not (tmp_path / "out" / "runs").exists()
