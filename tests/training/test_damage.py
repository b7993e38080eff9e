"""Runs whose directory was damaged, or whose weights: nothing is trained on it, all is named."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax
import pytest

from jlrm import export, train
from jlrm.config import Config, RunError, UsageError
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.reports.tracking import read_metrics
from jlrm.runtime.settings import from_dict
from jlrm.weights import steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pages")]  # whole models are compiled


def settings(run_dir: pathlib.Path, **changes: Any) -> Config:
    data = run_dir.parent / "pairs.jsonl"
    if not data.exists():
        write_comparisons(toy.comparisons(seed=3, num_rows=32), data)
    tree = {
        "run": {"dir": str(run_dir), "save_every": 1, "eval_every": 0, "tensorboard": False},
        "model": {"preset": "toy", "tokenizer": "toy", "compute_dtype": "float32"},
        "data": {"train": str(data), "prompt": "toy", "max_prompt_tokens": 48, "eval_rows": 8},
        "sampling": {"max_new_tokens": 4, "eval_batch_size": 8},
        "sft": {"steps": 2, "batch_size": 4, "max_target_tokens": 48},
        "grpo": {"steps": 2, "prompts": 2, "rollouts": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("_")
        tree[section][name] = value
    return from_dict(tree)


def trained(run_dir: pathlib.Path, **changes: Any) -> dict[str, Any]:
    return train.train(settings(run_dir, **changes), jax.devices()[:1])


def record(run_dir: pathlib.Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, no_pages) -> pathlib.Path:
    """A run of both stages, in a directory with a name that a url would read otherwise."""
    run_dir = tmp_path_factory.mktemp("runs") / "a@b %20#1"
    trained(run_dir)
    assert record(run_dir) == [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)]
    export.export_to_hf(str(run_dir), run_dir.parent / "out")
    return run_dir


@pytest.fixture
def run_dir(begun, tmp_path) -> pathlib.Path:
    shutil.copy(begun.parent / "pairs.jsonl", tmp_path)
    return pathlib.Path(shutil.copytree(begun, tmp_path / begun.name))


def longer(run_dir: pathlib.Path, **changes: Any) -> dict[str, Any]:
    data = str(run_dir.parent / "pairs.jsonl")
    text = (run_dir / "config.yaml").read_text()
    began_with = next(line.split(": ", 1)[1] for line in text.splitlines() if "  train: " in line)
    (run_dir / "config.yaml").write_text(text.replace(began_with, data))
    return trained(run_dir, grpo_steps=3, **changes)


def test_a_flipped_byte_trains_nothing_and_the_step_before_is_taken_if_asked_for(run_dir):
    params = run_dir / "checkpoints/grpo/2/params"
    file = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = record(run_dir)
    with pytest.raises(UsageError, match=r"grpo/2 is damaged: its item 'params'.*step is 1"):
        longer(run_dir)
    assert record(run_dir) == before
    whole = run_dir.with_name("whole")
    trained(whole, grpo_steps=3)
    longer(run_dir, run_resume="previous")
    aside = ("time", "perf/tokens", "perf/compiles")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith((*aside, "eval/"))} for row in found]
        for found in (read_metrics(run_dir), read_metrics(whole))
    ]
    assert rows[0] == rows[1]  # bit for bit as if nothing had happened


def test_a_later_stages_record_survives_that_its_predecessor_was_removed(run_dir):
    shutil.rmtree(run_dir / "checkpoints/sft")
    before = record(run_dir)
    with pytest.raises(UsageError, match=r"checkpoints of grpo, and of sft before it none"):
        longer(run_dir)
    assert record(run_dir) == before
    shutil.rmtree(run_dir / "checkpoints/grpo")
    trained(run_dir)
    assert record(run_dir) == before


def test_weights_that_are_infinite_are_never_saved(tmp_path):
    run_dir = tmp_path / "r"
    with pytest.raises(RunError, match=r"sft step 1: .* NaN or infinite|is (nan|inf)"):
        trained(run_dir, sft_optimizer={"learning_rate": 1e38, "weight_decay": 1e3})
    assert steps.saved_steps(steps.absolute(run_dir)) == {}
