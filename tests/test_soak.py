"""A run and a judge that go on for hours use no more at their end than at their start.

    JLRM_SOAK=2000 python -m pytest --tier campaign tests/test_soak.py -s

The quickstart's toy is trained for JLRM_SOAK steps of GRPO, with checkpoints and held-out judging
all along; then a toy judges five times as many games. While they run, the process's memory, open
files and threads are read from /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.reports.tracking import read_metrics

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parent.parent
STEPS = int(os.environ.get("JLRM_SOAK", "2000"))
SFT_STEPS = 100
MOST_GROWTH = 1.1  # of resident memory, from the second tenth of a run to its last


class Use(NamedTuple):
    """What a process holds at a moment."""

    done: float  # steps, games or requests
    mib: float  # resident
    files: float
    threads: float


def held(proc: pathlib.Path, done: int) -> Use:
    """Return what the process of a folder of /proc holds.

    Raises:
      OSError, KeyError: it has ended.
    """
    lines = (proc / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    files = len(list((proc / "fd").iterdir()))
    return Use(done, int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]))


def watch(command: Sequence[str], counted: pathlib.Path, log: pathlib.Path) -> Iterator[Use]:
    """Run a command to its end, yield what it holds twice a second; `counted` grows by lines."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            done = counted.read_bytes().count(b"\n") if counted.exists() else 0
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                yield held(pathlib.Path(f"/proc/{process.pid}"), done)
        assert process.returncode == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()


def hold(uses: Sequence[Use], title: str) -> None:
    """Assert that the last tenth of what was done held no more than the second one."""
    last = uses[-1].done
    tenths = {
        tenth: [use for use in uses if last * tenth / 10 < use.done <= last * (tenth + 1) / 10]
        for tenth in (1, 9)
    }
    middle = {
        name: [statistics.median(getattr(use, name) for use in tenths[tenth]) for tenth in (1, 9)]
        for name in ("mib", "files", "threads")
    }
    print(f"\n{title}: {last} done; second and last tenth: {middle}")
    assert middle["mib"][1] <= MOST_GROWTH * middle["mib"][0]
    assert middle["files"][1] <= middle["files"][0] + 4
    assert middle["threads"][1] <= middle["threads"][0] + 4


def test_a_long_training_uses_no_more_at_its_end(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "jlrm.train", "--config", "configs/quickstart.yaml"]
    command += [f"run.dir={run}", f"grpo.steps={STEPS}", f"sft.steps={SFT_STEPS}"]
    command += ["run.save_every=50", "run.eval_every=100"]
    uses = list(watch(command, run / "metrics.jsonl", tmp_path / "log"))
    trained = [use._replace(done=use.done - SFT_STEPS) for use in uses]
    hold([use for use in trained if use.done > 0], "GRPO steps")
    rows = [row for row in read_metrics(run) if row["stage"] == "grpo" and "time/update" in row]
    assert len(rows) == STEPS
    tenth = STEPS // 10
    names = ("time/step", "time/rollout", "time/update")
    middle = {
        name: [
            statistics.median(row[name] for row in part) for part in (rows[:tenth], rows[-tenth:])
        ]
        for name in names
    }
    saving = [row["time/step"] for row in rows if row["step"] % 50 == 1]
    print(
        f"seconds, first and last tenth: {middle}; steps after a save: "
        f"{statistics.median(saving):.3f}"
    )
    compiles = [row["perf/compiles"] for row in rows]
    print(f"programs compiled: {compiles[0]} at the first step, {compiles[-1]} at the last")


def test_a_long_judging_uses_no_more_at_its_end(tmp_path):
    write_comparisons(toy.comparisons(seed=3, num_rows=5 * STEPS // 2), tmp_path / "rows.jsonl")
    run = tmp_path / "run"
    trained = [sys.executable, "-m", "jlrm.train", "--config", "configs/quickstart.yaml"]
    trained += [f"run.dir={run}", f"sft.steps={SFT_STEPS}", "grpo.steps=0", "run.eval_every=0"]
    subprocess.run(trained, check=True, cwd=ROOT, capture_output=True)
    command = [sys.executable, "-m", "jlrm.judge", str(tmp_path / "rows.jsonl")]
    command += ["--model", str(run), "--out", str(tmp_path / "out"), "--batch-size", "32"]
    command += ["--max-prompt-tokens", "64", "--max-new-tokens", "36"]
    uses = list(watch(command, tmp_path / "out" / "responses.jsonl", tmp_path / "log"))
    hold([use for use in uses if use.done], "games")
    lines = (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 5 * STEPS // 2
    assert {json.loads(line)["error"] for line in lines} == {None}
