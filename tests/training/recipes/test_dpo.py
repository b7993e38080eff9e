"""DPO on a tiny model: pairs of every kind, a stop and a resume, and what a step learns from."""

from __future__ import annotations

import numpy as np
import pytest
from test_train import (
    assert_equal_trees,
    assert_same_record,
    comparable,
    final_params,
    run,
    saved_params,
    steps,
)

from jlrm.data import audit
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.training.recipes.preference import best_and_worst

pytestmark = pytest.mark.usefixtures("no_pages")

DPO = ["grpo.steps=0", "dpo.batch_size=4", "dpo.optimizer.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_comparisons(toy.comparisons(seed=3, num_rows=64), path)
    return path


def test_the_best_paid_is_paired_with_the_worst_paid():
    assert best_and_worst(np.array([1.0, 3.0, -1.0, 3.0])) == (1, 2)
    assert best_and_worst(np.array([np.nan, 2.0, 1.0])) == (1, 2)
    for nothing in ([1.0, 1.0], [np.nan, np.nan], [np.nan, 2.0]):
        assert best_and_worst(np.array(nothing)) is None


@pytest.mark.slow
@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize(
    ("pairs", "rank"), [("answers", 0), ("answers", 3), ("verdicts", 0), ("judgements", 3)]
)
def test_dpo_goes_on_bit_for_bit_where_it_stopped(tmp_path, data, pairs, rank):
    options = [*DPO, f"dpo.pairs={pairs}", "run.save_every=1", "sft.steps=1", f"lora.rank={rank}"]
    options += ["reward.plugins={'training.recipes.test_dpo:pay': 1.0}"]
    run(tmp_path / "whole", data, *options, "dpo.steps=3")
    run(tmp_path / "broken", data, *options, "dpo.steps=1")
    run(tmp_path / "broken", data, *options, "dpo.steps=3")
    assert_same_record(tmp_path / "whole", tmp_path / "broken")
    assert_equal_trees(*(saved_params(tmp_path / name) for name in ("whole", "broken")))
    of_dpo = [row for row in steps(tmp_path / "whole") if row["stage"] == "dpo"]
    # It begins as its own reference, and leaves it.
    assert of_dpo[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert of_dpo[2]["rewards/margins"] != 0.0
    if pairs == "judgements":
        assert {"reward", "judge/parse_rate", "frac_reward_zero_std"} <= of_dpo[0].keys()


def pay(completions: list[str], **_: object) -> list[float]:
    """Pay any text, so that rewards differ: a model that has learnt nothing writes no verdict."""
    return [len(set(text)) / 8 for text in completions]


@pytest.mark.slow
def test_what_is_preferred_becomes_likelier_than_the_other(tmp_path, data):
    options = [*DPO, "dpo.pairs=verdicts", "dpo.steps=20", "dpo.beta=0.5", "dpo.batch_size=32"]
    run(tmp_path / "r", data, *options, "dpo.optimizer.learning_rate=1e-2")
    rows = steps(tmp_path / "r")
    assert rows[-1]["rewards/accuracies"] > 0.7 and rows[-1]["loss"] < 0.6 < rows[0]["loss"]


@pytest.mark.slow
def test_a_step_without_a_preference_moves_nothing_and_is_told(tmp_path, data):
    options = [*DPO, "dpo.steps=2", "sampling.max_new_tokens=2", "run.save_every=1"]
    run(tmp_path / "r", data, *options)  # nothing is well-formed: all are paid alike
    for row in steps(tmp_path / "r"):
        assert row["loss"] == row["grad_norm"] == 0.0 and row["frac_reward_zero_std"] == 1.0
    fates = {
        fate for line in audit.read(tmp_path / "r") for fates in line["fates"] for fate in fates
    }
    assert fates == {audit.SKIPPED}
    assert_equal_trees(final_params(tmp_path / "r"), final_params(tmp_path / "r"))


@pytest.mark.slow
def test_dpo_on_eight_devices_learns_what_one_does(tmp_path, data):
    options = [*DPO, "dpo.pairs=answers", "dpo.steps=2", "model.remat=dots"]
    run(tmp_path / "one", data, *options)
    run(tmp_path / "eight", data, *options, "mesh.data=2", "mesh.tensor=2", num_devices=8)
    both = (comparable(steps(tmp_path / name)) for name in ("one", "eight"))
    for one, eight in zip(*both, strict=True):
        for name in {n for n in one if not n.startswith("perf/")} - {"stage", "step"}:
            assert one[name] == pytest.approx(eight[name], abs=1e-4), name
