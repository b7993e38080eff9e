"""What tracking promises: the record survives kills and resumes, and no failure is swallowed."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from jlrm.config import UsageError
from jlrm.reports import run_summary, tables, tracking
from jlrm.reports.run_summary import RunSummary


def make_tracker(run_dir: pathlib.Path, **changes: Any) -> tracking.Tracker:
    settings: dict[str, Any] = dict(
        stage="grpo", num_steps=10, first_step=0, tensorboard=False, wandb_project="", config={}
    )
    return tracking.Tracker(run_dir, **({"is_writer": True} | settings | changes))


def log_steps(run_dir: pathlib.Path, steps: range, **changes: Any) -> None:
    with make_tracker(run_dir, **changes) as tracker:
        for step in steps:
            tracker.log(step, {"loss": float(step)})


def steps_of(run_dir: pathlib.Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in tracking.read_metrics(run_dir)]


def test_one_strict_json_object_per_step_with_non_finite_values_kept(tmp_path):
    with make_tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": math.nan, "kl": -math.inf, "reward": 1e-6})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse)["loss"] == "nan" and text.endswith("}\n")
    (row,) = tracking.read_metrics(tmp_path)
    assert row["stage"] == "grpo" and row["step"] == 1 and row["reward"] == 1e-6
    assert math.isnan(row["loss"]) and row["kl"] == -math.inf


def test_every_step_is_on_disk_before_the_next(tmp_path):
    tracker = make_tracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.0})
        assert len(tracking.read_metrics(tmp_path)) == step
    tracker.__exit__(None, None, None)


def test_a_step_is_logged_once(tmp_path):
    with make_tracker(tmp_path, first_step=4) as tracker:
        with pytest.raises(ValueError, match="step 4 logged after step 4"):
            tracker.log(4, {"loss": 0.0})
        tracker.log(5, {"loss": 0.0})
        with pytest.raises(ValueError):
            tracker.log(5, {"loss": 0.0})
    with make_tracker(tmp_path / "fresh") as tracker:
        tracker.log(0, {"eval/agreement": 50.0})  # before training
        tracker.log(1, {"loss": 0.0})
    assert steps_of(tmp_path / "fresh") == [("grpo", 0), ("grpo", 1)]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    log_steps(tmp_path, range(1, 7), stage="sft")
    log_steps(tmp_path, range(1, 4))
    log_steps(tmp_path, range(5, 7), stage="sft", first_step=4)
    assert steps_of(tmp_path) == [("sft", step) for step in range(1, 7)]
    log_steps(tmp_path, range(1, 6))
    log_steps(tmp_path, range(3, 5), first_step=2)
    assert steps_of(tmp_path) == [
        *(("sft", step) for step in range(1, 7)),
        *(("grpo", step) for step in range(1, 5)),
    ]


def test_a_stage_without_a_checkpoint_starts_over(tmp_path):
    log_steps(tmp_path, range(1, 3), stage="sft")
    log_steps(tmp_path, range(0, 5))
    log_steps(tmp_path, range(0, 2))
    assert steps_of(tmp_path) == [("sft", 1), ("sft", 2), ("grpo", 0), ("grpo", 1)]


def test_a_finished_stage_opened_again_drops_nothing(tmp_path):
    log_steps(tmp_path, range(1, 3), stage="sft", num_steps=2)
    log_steps(tmp_path, range(1, 3))
    log_steps(tmp_path, range(0), stage="sft", num_steps=2, first_step=2)
    assert len(steps_of(tmp_path)) == 4


def test_a_stage_that_was_made_shorter_forgets_what_it_has_no_checkpoint_of(tmp_path):
    log_steps(tmp_path, range(1, 5), stage="sft", num_steps=4)
    log_steps(tmp_path, range(1, 3))
    log_steps(tmp_path, range(0), stage="sft", num_steps=2, first_step=2)
    assert steps_of(tmp_path) == [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)]


def test_resume_removes_completions_of_forgotten_steps(tmp_path):
    with make_tracker(tmp_path) as tracker:
        for step in (2, 4):
            tracker.log_completions(step, [{"id": "a"}])
            tracker.log(step, {"loss": 0.0})
    make_tracker(tmp_path, first_step=2).__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["grpo_000002.parquet"]


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    log_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert steps_of(tmp_path) == [("grpo", 1), ("grpo", 2)]
    log_steps(tmp_path, range(3, 5), first_step=2)
    assert steps_of(tmp_path) == [("grpo", step) for step in range(1, 5)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    log_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2,', '"step": 2'))
    with pytest.raises(UsageError, match="line 2"):
        tracking.read_metrics(tmp_path)


def test_no_metrics_yet(tmp_path):
    assert tracking.read_metrics(tmp_path) == []


def test_only_the_writer_writes(tmp_path):
    run_dir = tmp_path / "run"
    with make_tracker(run_dir, is_writer=False, tensorboard=True, wandb_project="p") as tracker:
        tracker.log(1, {"loss": 0.0})
        tracker.log_completions(1, [{"id": "a"}])
        tracker.note("unseen")
    assert not run_dir.exists()


def test_completions_are_a_parquet_table(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"id": "a", "gold": [8.0, 3.0], "verdict": [7, 2], "reward": 4.2, "rewards/format": 1.0},
        {"id": "b", "gold": [1.0, 3.0], "verdict": None, "reward": -1, "status": "no_answer"},
    ]
    with make_tracker(tmp_path) as tracker:
        tracker.log_completions(7, rows)
        tracker.log_completions(8, [])
    (path,) = (tmp_path / "completions").iterdir()
    assert path.name == "grpo_000007.parquet"
    first, second = pq.read_table(path).to_pylist()
    assert first == {"step": 7, **rows[0], "status": None}
    assert second == {"step": 7, **rows[1], "rewards/format": None}


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_tracker(tmp_path, tensorboard=True) as tracker:
        for step in range(1, 7):
            tracker.log(step, {"loss": 100.0 + step, "time/step": math.inf})
    with make_tracker(tmp_path, tensorboard=True, first_step=3) as tracker:
        for step in range(4, 6):
            tracker.log(step, {"loss": 200.0 + step})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert read == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0)]


def test_a_missing_wandb_is_a_usage_error_before_anything_is_dropped(tmp_path, monkeypatch):
    log_steps(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UsageError, match=r"pip install 'jlrm\[wandb\]'"):
        make_tracker(tmp_path, wandb_project="judges")
    assert len(steps_of(tmp_path)) == 3


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for first_step in (0, 2, 0):
        changes = dict(first_step=first_step, wandb_project="judges", config={"seed": 1})
        log_steps(tmp_path, range(first_step + 1, 5), **changes)
        ids.append((tmp_path / "wandb" / "grpo.id").read_text())
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path):
    with make_tracker(tmp_path) as tracker:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space is left.*metrics\.jsonl"):
            tracker.log(1, {"loss": 0.0})
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "summary.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space is left.*summary\.json"):
        run_summary.write(tmp_path, RunSummary({}, steps=1))
    assert (tmp_path / "summary.json").read_text() == "{}"
    assert not os.path.lexists(tmp_path / "summary.json.partial")


def test_summary_replaces_and_stays_strict_json(tmp_path):
    assert run_summary.read(tmp_path) is None
    run_summary.write(tmp_path, RunSummary({"sft": {"agreement": 1.0}}))
    stages = {"grpo": {"agreement": np.float32(71.5), "reward": math.nan, "f1": None}}
    run_summary.write(tmp_path, RunSummary(stages, steps=3))
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content == {
        "grpo": {"agreement": 71.5, "reward": "nan", "f1": None},
        **{"steps": 3, "seconds": 0.0, "tokens": 0, "version": 1},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    back = run_summary.read(tmp_path)
    assert back.steps == 3 and math.isnan(back.stages["grpo"]["reward"])
    assert back.stages["grpo"]["agreement"] == 71.5 and back.stages["grpo"]["f1"] is None


def test_a_summary_from_before_there_were_versions_is_read(tmp_path):
    old = {"start": {"agreement": 4.0}, "sft": {"reward": "-inf"}, "steps": 2, "tokens": 9}
    (tmp_path / "summary.json").write_text(json.dumps(old))
    stages = {"start": {"agreement": 4.0}, "sft": {"reward": -math.inf}}
    assert run_summary.read(tmp_path) == RunSummary(stages, steps=2, tokens=9)
    (tmp_path / "summary.json").write_text(json.dumps(old | {"version": 2}))
    with pytest.raises(UsageError, match="is of version 2, and this program reads version 1"):
        run_summary.read(tmp_path)


def test_log_files_get_few_plain_lines(tmp_path, capsys):
    with make_tracker(tmp_path, num_steps=200) as tracker:
        for step in range(1, 201):
            tracker.log(step, {"reward": 1.5, "judge/agreement": 70.0, "loss": 0.1, "kl": 0.9})
            if step == 100:
                tracker.note("checkpoint written")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("grpo: 0/200") and lines[1].startswith("grpo: 1/200")
    assert lines[2] == "checkpoint written"
    assert lines[3].startswith("grpo: 200/200") and len(lines) == 4
    assert "reward=1.5, agreement=70, loss=0.1" in lines[3] and "kl" not in lines[3]


def test_a_run_that_fails_shows_how_far_it_came(tmp_path, capsys):
    with pytest.raises(RuntimeError), make_tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 0.25, "perf/tokens_per_second": 5230.0})
        raise RuntimeError
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("grpo: 3/10") and "loss=0.25, tok/s=5.23k" in last


def test_a_terminal_gets_a_bar_that_notes_do_not_break(tmp_path, monkeypatch):
    class Terminal(list):
        write, encoding = list.append, "utf-8"

        def isatty(self) -> bool:
            return True

        def flush(self) -> None: ...

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with make_tracker(tmp_path, first_step=3) as tracker:
        tracker.log(4, {"loss": 0.5})
        tracker.note("a note")
        tracker.log(10, {"loss": 0.25})
    text = "".join(terminal)
    assert "4/10" in text and "loss=0.25" in text and "|" in text
    assert any(line.endswith("a note") for line in text.split("\r") for line in line.split("\n"))


def test_table_aligns_and_marks_what_is_missing():
    rows = [{"stage": "sft", "agreement": 61.25, "steps": 40}, {"stage": "grpo", "steps": 100}]
    assert tables.table(rows, ["stage", "agreement", "steps"]).splitlines() == [
        "stage  agreement  steps",
        "-----  ---------  -----",
        "sft        61.25     40",
        "grpo           -    100",
    ]
