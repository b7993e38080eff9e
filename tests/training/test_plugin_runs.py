"""Whole runs with rewards of users: what a step does that pays nothing, and what data it sees."""

from __future__ import annotations

import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import mesh_of

from jlrm import train
from jlrm.config import RunError
from jlrm.data import batches
from jlrm.data.worlds import toy
from jlrm.model import qwen
from jlrm.reports.tracking import read_metrics
from jlrm.runtime.mesh import training_layout
from jlrm.runtime.settings import load
from jlrm.training import rollouts
from jlrm.training.recipes import sft
from jlrm.weights import file_list, hf_config, reading, steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pages")]  # whole models are compiled

REWARDS = '''
import numpy

ASKED = []


async def letters(completions, trainer_state, log_metric, log_extra, **columns):
    """Pay nothing in the second step."""
    ASKED.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
    log_metric("letters/most", max(len(set(c[0]["content"])) for c in completions))
    log_extra("letters", [len(set(text)) for text in completions])
    if trainer_state.global_step == 1:
        return [None] * len(completions)
    return numpy.array([len(set(text)) / 8 for text in completions])


def rows(completions, id, difficulty, **columns):
    """Record which rows are seen, and what is written for them."""
    ASKED.append((id, [str(text) for text in completions], difficulty))
    return [len(set(text)) / 8 for text in completions]


def ends(completions, **columns):
    raise SystemExit(0)
'''


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Write the rewards above as the module `run_rewards`, and return what they were asked."""
    (tmp_path / "run_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "run_rewards", raising=False)
    import run_rewards  # pyright: ignore[reportMissingImports]

    return run_rewards.ASKED


@pytest.fixture
def run(tmp_path, asked):
    rows = [
        {**vars(row), "where": None, "meta": {**row.meta, "difficulty": i}}
        for i, row in enumerate(toy.comparisons(seed=3, num_rows=24))
    ]
    rows = [{k: v for k, v in row.items() if k not in ("where", "is_swapped")} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(name: str, *overrides: str) -> pathlib.Path:
        fixed = {
            "run": {"dir": str(tmp_path / name), "eval_every": 0, "save_every": 1,
                    "completions_every": 1, "keep_last": 9, "tensorboard": False},
            "model": {"preset": "toy", "tokenizer": "toy", "compute_dtype": "float32"},
            "data": {"train": str(tmp_path / "pairs.jsonl"), "prompt": "toy",
                     "max_prompt_tokens": 48, "eval_rows": 4},
            "sampling": {"max_new_tokens": 8, "eval_batch_size": 8},
            "reward": {"mode": "none"},
            "grpo": {"steps": 3, "prompts": 4, "rollouts": 4,
                     "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.5}},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(fixed))
        train.train(load(path, overrides), jax.devices()[:1])
        return tmp_path / name

    return start


def state(run_dir: pathlib.Path, step: int):
    """Return the parameters of a step."""
    model = hf_config.read_config(run_dir / "model", compute_dtype="float32")
    abstract = qwen.abstract_params(model, training_layout(mesh_of(1, 1, 1)))
    return reading.restore_params(steps.find(f"{run_dir}@grpo/{step}"), abstract)


def test_a_step_that_nothing_is_paid_for_moves_no_weight(run, asked):
    """Weight decay and momentum would, and the step after it would count it."""
    pay = "reward.plugins={run_rewards:letters: 1.0}"
    run_dir = run("r", pay, "grpo.optimizer.schedule=linear", "grpo.optimizer.warmup_steps=9")
    rows = [row for row in read_metrics(run_dir) if "loss" in row]
    first, second, third = (state(run_dir, step) for step in (1, 2, 3))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))
    assert not jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, third))
    assert rows[1]["loss"] == rows[1]["grad_norm"] == 0 and rows[1]["minibatches/skipped"] == 1
    assert "kl" not in rows[1] and "entropy" not in rows[1] and "reward" not in rows[1]
    assert rows[1]["completions/unpaid_ratio"] == 1 and rows[0]["completions/unpaid_ratio"] == 0
    # The rate of the newest update: the second step has none of its own.
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, np.array([1, 1, 2]) * 1e-2 / 9, rtol=1e-5)
    assert "minibatches/skipped" not in rows[2] and rows[2]["kl"] >= 0
    # What the reward is told, and what it logs.
    training = [each for each in asked if each[:2] in ((0, 3), (1, 3), (2, 3))]
    num_rows = 19  # of 24, four are held out, and one more asks a question of theirs
    assert training == [(0, 3, 0.0), (1, 3, 4 / num_rows), (2, 3, 8 / num_rows)]
    assert asked[-1] == (3, 3, 12 / num_rows)  # the held-out set
    table = pq.read_table(run_dir / "completions" / "grpo_000001.parquet").to_pylist()
    assert rows[0]["letters/most"] == max(row["letters"] for row in table)
    assert [row["reward"] for row in table] == [row["letters"] / 8 for row in table]
    assert rows[2]["eval/letters/most"] >= 1
    unpaid = pq.read_table(run_dir / "completions" / "grpo_000002.parquet").to_pylist()
    assert {row["reward"] for row in unpaid} == {None} and len(unpaid) == 16


def test_grpo_has_the_rows_in_another_order_than_sft_and_an_older_run_keeps_its_own(
    run, asked, monkeypatch
):
    drawn = {}
    for module in (sft, rollouts):
        original = module.batches.batch_rows

        def recorded(*arguments, name=module.__name__, original=original):
            rows = original(*arguments)
            drawn.setdefault(name, []).append((arguments, rows.tolist()))
            return rows

        monkeypatch.setattr(module, "batches", types.SimpleNamespace(**vars(module.batches)))
        monkeypatch.setattr(module.batches, "batch_rows", recorded)
    pay = "reward.plugins={run_rewards:rows: 1.0}"
    new = run("new", pay, "sft.steps=3", "sft.batch_size=4")
    ((first, imitated), *_), ((second, sampled), *_) = drawn.values()
    assert first[:4] == second[:4] and imitated != sampled  # seed, position, size, rows
    ids, texts, difficulty = next(each for each in asked if len(each[0]) == 16)
    assert difficulty == [int(name.rsplit("-", 1)[1]) for name in ids]  # the row's own column
    assert len(set(ids)) == 4 and len(set(texts)) > 12

    # A checkpoint from before streams names none, and its order was that of SFT.
    for step in (new / "checkpoints" / "grpo").iterdir():
        meta = step / "meta" / "metadata"
        content = json.loads(meta.read_text())
        assert content.pop("stream") == 1
        meta.write_text(json.dumps(content))
        # Nor had it digests, which would tell that the file was changed.
        shutil.rmtree(step / "digests")
        (step / file_list.NAME).unlink()
        about = step / steps.ABOUT
        described = json.loads(about.read_text())
        del described["item_handlers"]["digests"]
        about.write_text(json.dumps(described))
    drawn.clear()
    run("new", pay, "sft.steps=3", "sft.batch_size=4", "grpo.steps=4")
    ((arguments, rows),) = drawn["jlrm.training.rollouts"]
    assert rows == batches.batch_rows(*arguments[:4]).tolist() and arguments[1] == 3


def test_a_reward_that_ends_the_program_stops_the_run_with_an_error(run):
    with pytest.raises(RunError, match=r"The reward ends failed on row .*it called sys\.exit\(0\)"):
        run("r", "reward.plugins={run_rewards:ends: 1.0}")
