"""A step that is not finite: no weight moves, its batch is kept, and runs alone from there."""

from __future__ import annotations

import functools
import json
import re

import jax
import numpy as np
import pytest
from training.test_damage import record, settings, trained

from jlrm import train
from jlrm.config import RunError, UsageError
from jlrm.model.visibility import Packing
from jlrm.reports.tracking import read_metrics
from jlrm.training import replay
from jlrm.training.packing import Rows
from jlrm.training.recipes import grpo as grpo_module
from jlrm.training.recipes import sft
from jlrm.weights import steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pages")]  # whole models are compiled


def spoil(monkeypatch, module, name, at, change):
    """Let some calls of a function, counted from 1, return something else."""
    real, calls = getattr(module, name), iter(range(1, 1_000))

    @functools.wraps(real)
    def wrapper(*args, **kwargs):
        result = real(*args, **kwargs)
        return change(result) if next(calls) in at else result

    monkeypatch.setattr(module, name, wrapper)


def digests(run_dir, stage: str) -> list[str]:
    """Return a text that stands for the weights and moments of each saved step of a stage."""
    series = steps.absolute(run_dir) / "checkpoints" / stage
    numbers = steps.saved_steps(steps.absolute(run_dir))[stage]
    held = [steps.read_digests(series / str(number)) for number in numbers]
    return [json.dumps([each["params"], each["opt_state"]]) for each in held]


def test_a_step_of_sft_is_not_applied_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "r"
    spoil(monkeypatch, sft, "token_weights", {2}, lambda weights: weights * np.nan)
    trained(run_dir, sft_steps=3, grpo_steps=0, run_keep_last=5)
    assert record(run_dir) == [("sft", 1), ("sft", 2), ("sft", 3)]
    assert not np.isfinite(read_metrics(run_dir)[1]["loss"] or np.nan)
    first, second, third = digests(run_dir, "sft")
    assert first == second != third
    file = run_dir / "not_applied" / "sft-2.npz"
    said = capsys.readouterr().err
    assert "sft step 2 was not applied: loss nan, grad_norm 0. Its batch runs alone" in said
    assert f"--replay {file}" in said
    train.main(["--replay", str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"sft step 2, with the weights of {run_dir}@sft/2:")
    lines = printed.split("\n")
    assert "optimiser step 0: grad_norm 0, loss nan" in lines[1]
    assert lines[2].strip() == "what it learns from is not finite already: weights"


def test_a_step_of_grpo_is_not_applied_and_its_other_minibatch_is(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "r"

    def change(part):
        targets = part.targets
        return part._replace(targets=targets._replace(weights=targets.weights * np.inf))

    spoil(monkeypatch, grpo_module, "pack_minibatch", {2}, change)
    loss = {"entropy_weight": 0.1, "kl_weight": 0.1}
    trained(run_dir, sft_steps=0, grpo_minibatches=2, grpo_loss=loss, run_keep_last=5)
    assert record(run_dir) == [("grpo", 1), ("grpo", 2)]
    file = run_dir / "not_applied" / "grpo-1.npz"
    _, batches = replay.read(file)
    assert len(batches) == 2
    said = replay.replay(file)
    assert len(said) == 4 and "optimiser step 0" in said[1] and "optimiser step 1" in said[2]
    assert "nan" not in said[1] and "loss nan" in said[2]
    first, second = digests(run_dir, "grpo")
    assert first != second


def test_weights_that_are_too_large_are_named(tmp_path, monkeypatch):
    """Weights of the checkpoint that are too large: the batch itself is as it should be."""
    run_dir = tmp_path / "r"
    spoil(monkeypatch, sft, "token_weights", {2}, lambda weights: weights * np.nan)
    trained(run_dir, sft_steps=2, grpo_steps=0)
    file = run_dir / "not_applied" / "sft-2.npz"
    about, ((rows, weights),) = replay.read(file)
    monkeypatch.setattr(replay, "read", lambda _: (about, [(rows, np.nan_to_num(weights))]))
    real = replay.source.read_params
    huge = lambda *given: jax.tree.map(lambda x: x * 1e30, real(*given))  # noqa: E731
    monkeypatch.setattr(replay.source, "read_params", huge)
    said = replay.replay(file)
    assert "nan" in said[1]
    assert re.search(r"JAX: .*nan.* The largest weight is \d(\.\d+)?e\+3\d, in \w", said[2])


def test_three_in_a_row_end_the_run_which_goes_on_with_another_rate(tmp_path, monkeypatch):
    run_dir = tmp_path / "r"
    with monkeypatch.context() as patch:
        spoil(patch, sft, "token_weights", {2, 3, 4}, lambda weights: weights * np.nan)
        with pytest.raises(RunError, match=r"last 3 steps were not applied. Saved after step 4"):
            trained(run_dir, sft_steps=6, grpo_steps=0)
    assert record(run_dir) == [("sft", step) for step in (1, 2, 3, 4)]
    summary = trained(run_dir, sft_steps=6, grpo_steps=0, sft_optimizer={"learning_rate": 1e-7})
    assert record(run_dir) == [("sft", step) for step in range(1, 7)] and summary["steps"] == 6


def test_two_that_are_apart_do_not(tmp_path, monkeypatch):
    spoil(monkeypatch, sft, "token_weights", {1, 2, 4, 5}, lambda weights: weights * np.nan)
    trained(tmp_path / "r", sft_steps=6, grpo_steps=0)
    assert len(record(tmp_path / "r")) == 6


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04 cut", "other"])
def test_what_is_no_such_file_is_one_sentence(content, tmp_path):
    file = tmp_path / "sft-2.npz"
    if content == "other":
        np.savez(file, x=np.zeros(3))
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"--replay .*sft-2.npz(:| is no file of a step)"):
        replay.read(file)


def test_a_step_whose_checkpoint_is_gone_is_named(tmp_path):
    config = settings(tmp_path / "r")
    (tmp_path / "r").mkdir()
    zeros = jax.numpy.zeros((1, 1, 1))
    rows = Rows(zeros, zeros, Packing(zeros, zeros, zeros), *[zeros] * 5)
    file = replay.write(tmp_path / "r", config, "sft", 2, [(rows, zeros)])
    assert file == tmp_path / "r" / "not_applied" / "sft-2.npz"
    with pytest.raises(UsageError, match=r"holds no checkpoints"):
        replay.replay(file)
