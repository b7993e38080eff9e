"""Runs are killed again and again, in the middle of anything, and end where undisturbed ones do.

Everything runs one kill, inside a save. The campaign kills each kind of run as often as JLRM_KILLS
says (25), every third time inside a save:

    JLRM_KILLS=25 python -m pytest --tier campaign tests/test_kills.py -s

Equal are, bit for bit: weights and moments (by the digests that checkpoints carry), all metrics but
times, the sampled completions, and the record of what was drawn, which must add up.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import COMPILE_FASTEST, slowness

from jlrm.data import audit
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.reports.tracking import read_metrics
from jlrm.weights.steps import read_digests, saved_steps

pytestmark = pytest.mark.slow  # whole models are compiled

ROOT = pathlib.Path(__file__).parent.parent
KILLS = int(os.environ.get("JLRM_KILLS", "25"))
A_RUN = 6  # kills of one run; then it may end, and another one begins
SETTINGS = """
run: {dir: unset, save_every: 1, eval_every: 4, completions_every: 3, tensorboard: false}
model: {preset: toy, tokenizer: toy, compute_dtype: float32, remat: none}
data: {train: ROWS, prompt: toy, max_prompt_tokens: 48, eval_rows: 4}
sampling: {max_new_tokens: 8, eval_batch_size: 8}
reward: {mode: none, plugins: {"payers:vowels": 1.0}}
sft: {batch_size: 4, max_target_tokens: 48}
grpo: {steps: 12, prompts: 4, rollouts: 4, optimizer: {learning_rate: 1e-3}}
"""
KINDS = {
    "both stages": ("sft.steps=6", "grpo.steps=6"),
    "a step old": ("grpo.ahead=stale", "grpo.loss.importance_cap=2"),
    "both orders, drawn anew": ("grpo.zero_variance=resample", "data.orders=both"),
}


@dataclasses.dataclass
class Start:
    """One start of a run, in a process of its own."""

    run_dir: pathlib.Path
    process: subprocess.Popen[bytes]

    def num_steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written at this moment."""
        return any(self.run_dir.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))

    def kill(self, rng: random.Random, inside_save: bool) -> bool:
        """Kill it at some moment after its next step, or inside a save; False: it ended before."""
        first = self.num_steps()
        while self.process.poll() is None and self.num_steps() <= first:
            time.sleep(0.002)
        moment = time.monotonic() + rng.uniform(0, 1.0)
        while self.process.poll() is None:
            if self.is_saving() if inside_save else time.monotonic() > moment:
                self.process.send_signal(signal.SIGKILL)
                return self.process.wait() == -signal.SIGKILL
            time.sleep(0.0005)
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("kills")
    write_comparisons(toy.comparisons(seed=3, num_rows=24), path / "rows.jsonl")
    (path / "settings.yaml").write_text(SETTINGS.replace("ROWS", str(path / "rows.jsonl")))
    return path


def start(folder: pathlib.Path, name: str, *settings: str) -> Start:
    config = str(folder / "settings.yaml")
    command = [sys.executable, "-m", "jlrm.train", "--config", config, f"run.dir={folder / name}"]
    with (folder / f"{name}.log").open("ab") as said:
        process = subprocess.Popen(
            [*command, *settings],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "JAX_NUM_CPU_DEVICES": "1",
                "XLA_FLAGS": COMPILE_FASTEST,
            },
            stdout=said,
            stderr=said,
            cwd=ROOT,
        )
    return Start(folder / name, process)


def finish(folder: pathlib.Path, name: str, *settings: str) -> None:
    code = start(folder, name, *settings).process.wait(300 * slowness())
    assert code == 0, (folder / f"{name}.log").read_text()[-3000:]


def outcome(run_dir: pathlib.Path) -> dict[str, object]:
    """Return all that a run must have in common with another one of the same config."""
    times = ("time/", "perf/tokens_per_second", "perf/compiles")
    steps = {stage: numbers[-1] for stage, numbers in saved_steps(run_dir).items()}
    weights = {
        stage: read_digests(run_dir / "checkpoints" / stage / str(step))
        for stage, step in steps.items()
    }
    return {
        "steps": steps,
        "weights": {s: (found["params"], found["opt_state"]) for s, found in weights.items()},
        "metrics": [
            {name: value for name, value in row.items() if not name.startswith(times)}
            for row in read_metrics(run_dir)
        ],
        "completions": {
            path.name: pq.read_table(path).to_pylist() for path in run_dir.glob("completions/*")
        },
        "audit": audit.read(run_dir),
        "files": sorted(path.name for path in run_dir.iterdir() if path.suffix != ".lock"),
        "left over": [str(p) for p in run_dir.rglob("*") if "tmp" in p.name],
    }


@pytest.mark.parametrize(
    ("kind", "num_kills"),
    [
        ("both stages", 1),
        *(pytest.param(kind, KILLS, marks=pytest.mark.campaign, id=kind) for kind in KINDS),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(folder, kind, num_kills):
    settings, rng = KINDS[kind], random.Random(f"{kind} {num_kills}")
    if not (folder / kind).exists():
        finish(folder, kind, *settings)
    wanted = outcome(folder / kind)
    assert not wanted["left over"] and not any(s.faults for s in audit.check(wanted["audit"]))
    killed = saving = runs = 0
    while killed < num_kills:
        runs += 1
        name = f"{kind} {num_kills} {runs}"
        for _ in range(min(A_RUN, num_kills - killed)):
            inside_save = (killed + (num_kills == 1)) % 3 == 1
            if not start(folder, name, *settings).kill(rng, inside_save):
                break
            killed += 1
            saving += inside_save
        finish(folder, name, *settings)
        found = outcome(folder / name)
        for part, value in wanted.items():
            assert found[part] == value, f"{part} of {name}, killed {killed} times so far"
    print(f"{kind}: killed {killed} times, {saving} inside a save, over {runs} runs: all equal")
