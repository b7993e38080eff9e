"""Runs are killed again and again, in the middle of anything, and end where undisturbed ones do.

Everything runs one kill, inside a save. The campaign kills each kind of run as often as JLRM_KILLS
says (25), every third time inside a save, and of several processes any:

    JLRM_KILLS=25 python -m pytest --tier campaign tests/test_kills.py -s

Equal are, bit for bit: weights and moments (by the digests that checkpoints carry), all metrics but
times, the sampled completions, and the record of what was drawn, which must add up. Where the
number of processes changes between kills, sums have another order: tokens and the record are equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from conftest import COMPILE_FASTEST, slowness
from etils import epath

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


class Kind(NamedTuple):
    """Settings of a run, and the processes of its successive starts, each with its devices."""

    settings: tuple[str, ...]
    processes: tuple[tuple[int, int], ...] = ((1, 1),)


KINDS = {
    "both stages": Kind(("sft.steps=6", "grpo.steps=6")),
    "a step old": Kind(("grpo.ahead=stale", "grpo.loss.importance_cap=2")),
    "both orders, drawn anew": Kind(("grpo.zero_variance=resample", "data.orders=both")),
    "two processes": Kind(("sft.steps=6", "grpo.steps=6"), ((2, 2),)),
    "one, two and four processes": Kind(("grpo.steps=8",), ((1, 4), (2, 2), (4, 1))),
}


@dataclasses.dataclass
class Start:
    """One start of a run, in a process of its own or in several."""

    run_dir: pathlib.Path
    process: subprocess.Popen[bytes]  # the run's, or that which looks after its processes

    def num_steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written at this moment."""
        return any(self.run_dir.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))

    def trainers(self) -> list[int]:
        """Return the processes that train, of all on this machine."""
        wanted, found = f"run.dir={self.run_dir}".encode(), []
        for directory in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (directory / "cmdline").read_bytes().split(b"\0")
                if wanted in command and b"python" in command[0]:
                    found.append(int(directory.name))
        return sorted(found)

    def kill(self, rng: random.Random, inside_save: bool) -> bool:
        """Kill it at some moment after its next step, or inside a save; False: it ended before."""
        first = self.num_steps()
        while self.process.poll() is None and self.num_steps() <= first:
            time.sleep(0.002)
        trainers = self.trainers()
        moment = time.monotonic() + rng.uniform(0, 1.0)
        while trainers and self.process.poll() is None:
            if self.is_saving() if inside_save else time.monotonic() > moment:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(trainers), signal.SIGKILL)
                return self.process.wait() != 0
            time.sleep(0.0005)
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("kills")
    write_comparisons(toy.comparisons(seed=3, num_rows=24), path / "rows.jsonl")
    (path / "settings.yaml").write_text(SETTINGS.replace("ROWS", str(path / "rows.jsonl")))
    return path


def start(folder: pathlib.Path, name: str, kind: Kind, number: int = 0) -> Start:
    """Start a run for the `number`th time."""
    config = str(folder / "settings.yaml")
    num_processes, num_devices = kind.processes[number % len(kind.processes)]
    command = [sys.executable, "-m", "jlrm.train", "--config", config, f"run.dir={folder / name}"]
    if num_processes > 1:
        launcher = ["bash", str(ROOT / "launch/local.sh"), str(num_processes), str(num_devices)]
        command = [*launcher, "--", *command]
    with (folder / f"{name}.log").open("ab") as said:
        process = subprocess.Popen(
            [*command, *kind.settings],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "JAX_NUM_CPU_DEVICES": str(num_devices),
                "XLA_FLAGS": COMPILE_FASTEST,
            },
            stdout=said,
            stderr=said,
            cwd=ROOT,
        )
    return Start(folder / name, process)


def finish(folder: pathlib.Path, name: str, kind: Kind, number: int = 0) -> None:
    code = start(folder, name, kind, number).process.wait(300 * slowness())
    assert code == 0, (folder / f"{name}.log").read_text()[-3000:]


def outcome(run_dir: pathlib.Path) -> dict[str, Any]:
    """Return all that a run must have in common with another one of the same config."""
    times = ("time/", "perf/tokens_per_second", "perf/compiles")
    steps = {stage: numbers[-1] for stage, numbers in saved_steps(epath.Path(run_dir)).items()}
    weights = {
        stage: read_digests(epath.Path(run_dir) / "checkpoints" / stage / str(step))
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


def alike(kind: Kind, found: dict[str, Any]) -> dict[str, Any]:
    """Return what of an outcome must be equal, however many processes its starts had."""
    if len(kind.processes) == 1:
        return found
    tokens = {
        name: [(row["id"], row["order"], row["response"]) for row in rows]
        for name, rows in found["completions"].items()
    }
    kept = {part: found[part] for part in ("steps", "audit", "files", "left over")}
    return {**kept, "tokens": tokens}


@pytest.mark.parametrize(
    ("name", "num_kills"),
    [
        ("both stages", 1),
        *(pytest.param(name, KILLS, marks=pytest.mark.campaign, id=name) for name in KINDS),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(folder, name, num_kills):
    kind, rng = KINDS[name], random.Random(f"{name} {num_kills}")
    if not (folder / name).exists():
        finish(folder, name, kind)
    wanted = outcome(folder / name)
    assert not wanted["left over"] and not any(s.faults for s in audit.check(wanted["audit"]))
    killed = saving = runs = 0
    while killed < num_kills:
        runs += 1
        run, number = f"{name} {num_kills} {runs}", 0
        for number in range(min(A_RUN, num_kills - killed)):
            inside_save = (killed + (num_kills == 1)) % 3 == 1
            if not start(folder, run, kind, number).kill(rng, inside_save):
                break
            killed += 1
            saving += inside_save
        finish(folder, run, kind, number + 1)
        found = alike(kind, outcome(folder / run))
        for part, value in alike(kind, wanted).items():
            assert found[part] == value, f"{part} of {run}, killed {killed} times so far"
    print(f"{name}: killed {killed} times, {saving} inside a save, over {runs} runs: all equal")


# ------------------------------------------------------------------ other commands


def contents(directory: pathlib.Path) -> dict[str, Any]:
    """Return what a command wrote, but for times, and the journal's lines in any order."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        if path.suffix == ".jsonl":
            rows = map(timeless, map(json.loads, path.read_text().splitlines()))
            found[name] = sorted(json.dumps(row) for row in rows)
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    """Leave out what a clock has said, in any depth."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(each) for each in value] if isinstance(value, list) else value


CLOCKS = ("seconds", "date", "created", "games_per_second", "tokens_per_second", "moduleInfo")
COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": (
        *("--model", "RUN", "--benchmark", "pairs", "--data", "ROWS", "--out", "OUT"),
        *("--batch-size", "4", "--max-prompt-tokens", "48", "--max-new-tokens", "8"),
        *("--compute-dtype", "float32", "--prompt", "toy", "--no-report"),
    ),
    "prepare": ("--input", "ROWS", "--out", "OUT", "--swap", "--validation", "0.1"),
    "export": ("--checkpoint", "RUN", "--out", "OUT", "--dtype", "float32"),
}


@pytest.mark.campaign
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_ends_as_an_undisturbed_one(folder, command):
    run, rows = folder / "exported", folder / "rows.jsonl"
    if not run.exists():
        finish(folder, run.name, Kind(("grpo.steps=1",)))

    def begin(out: pathlib.Path) -> subprocess.Popen[str]:
        places = {"RUN": run, "ROWS": rows, "OUT": out}
        words = [str(places.get(word, word)) for word in COMMANDS[command]]
        return subprocess.Popen(
            [sys.executable, "-m", f"jlrm.{command}", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    began = time.monotonic()
    whole = begin(folder / f"{command} whole" / "out")
    said, _ = whole.communicate()
    assert whole.returncode == 0, said[-3000:]
    wanted, took = contents(folder / f"{command} whole" / "out"), time.monotonic() - began
    rng, killed, outs = random.Random(command), 0, 0
    while killed < min(KILLS, 20):
        outs += 1
        out = folder / f"{command} {outs}" / "out"  # a model card says the name
        while True:
            process = begin(out)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.3, 1.0) * took if killed < min(KILLS, 20) else None)
            if process.poll() is not None:
                break
            process.kill()
            process.communicate()
            killed += 1
        said, _ = process.communicate()
        # A kill may come when all is written; the command then writes over nothing.
        assert process.returncode == 0 or "exists already" in said, said[-3000:]
        assert contents(out) == wanted
        assert [path.name for path in out.parent.iterdir()] == [out.name]
    print(f"{command}: killed {killed} times over {outs} outputs: all equal")
