"""Reward models of every kind: they resume, learn, and judge alike in training and elsewhere."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from test_train import assert_equal_trees, assert_same_record, comparable, run, saved_params, steps

from jlrm import evaluate, export
from jlrm.config import UsageError
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.training.heldout import METRICS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pages")]  # whole models are compiled

KINDS = ("bradley_terry", "cross", "classes")
OPTIONS = ["grpo.steps=0", "reward_model.batch_size=8", "reward_model.optimizer.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_comparisons(toy.comparisons(seed=3, num_rows=96), path)
    return path


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize(("kind", "rank"), [*((kind, 0) for kind in KINDS), ("bradley_terry", 3)])
def test_a_reward_model_goes_on_bit_for_bit_where_it_stopped(tmp_path, data, kind, rank):
    options = [*OPTIONS, f"reward_model.kind={kind}", "run.save_every=1", "sft.steps=1"]
    options += [f"lora.rank={rank}"]
    run(tmp_path / "whole", data, *options, "reward_model.steps=3")
    run(tmp_path / "broken", data, *options, "reward_model.steps=1")
    run(tmp_path / "broken", data, *options, "reward_model.steps=3")
    assert_same_record(tmp_path / "whole", tmp_path / "broken")
    weights = [saved_params(tmp_path / name) for name in ("whole", "broken")]
    assert_equal_trees(*weights)
    assert "head" not in weights[0] and np.abs(np.asarray(weights[0]["score"])).max() > 0
    first = next(row for row in steps(tmp_path / "whole") if row["stage"] == "reward_model")
    assert first["loss"] == pytest.approx(np.log(3 if kind == "classes" else 2), abs=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_reward_model_judges_in_training_as_a_run_and_exported(tmp_path, data, capsys, rank):
    heldout = tmp_path / "heldout.jsonl"
    write_comparisons(toy.comparisons(seed=8, num_rows=24), heldout)
    options = [*OPTIONS, "reward_model.steps=25", f"data.eval={heldout}", "data.eval_rows=24"]
    options += ["reward_model.batch_size=32", "data.max_prompt_tokens=64", f"lora.rank={rank}"]
    found = run(tmp_path / "r", data, *options)["reward_model"]
    rows = steps(tmp_path / "r")
    assert rows[-1]["loss"] < 0.66 < rows[0]["loss"]  # longer answers are often better
    assert 0 < found["agreement"] < 100 and found["swap_consistency"] == 100
    export.main(
        ["--checkpoint", str(tmp_path / "r"), "--out", str(tmp_path / "hf"), "--dtype", "float32"]
    )
    described = json.loads((tmp_path / "hf/config.json").read_text())
    assert described["architectures"][0].endswith("ForSequenceClassification")
    card = (tmp_path / "hf/README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "a reward model of the kind" in card
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(program, "card", "exec")
    for number, model in enumerate((tmp_path / "r", tmp_path / "hf")):
        command = ["--model", str(model), "--benchmark", "pairs", "--data", str(heldout)]
        command += ["--policy", "aggregation=first_order", "--compute-dtype", "float32"]
        command += ["--out", str(tmp_path / f"e{number}"), "--no-report", "--json"]
        command += ["--max-prompt-tokens", "200"]
        evaluate.main([*command, "--mesh", "data=8", "fsdp=1"])
        judged = json.loads(capsys.readouterr().out.splitlines()[-1])["pairs"]
        for theirs, ours in METRICS.items():
            assert found[ours] == pytest.approx(judged[theirs]), ours
    # What writes no text is refused where text is wanted.
    with pytest.raises(UsageError, match="is a reward model, which writes no text"):
        run(
            tmp_path / "next",
            data,
            f"model.path={tmp_path}/hf",
            "model.preset=",
            "model.tokenizer=",
        )


def test_a_reward_model_on_eight_devices_learns_what_one_does(tmp_path, data):
    options = [*OPTIONS, "reward_model.steps=2"]
    run(tmp_path / "one", data, *options)
    run(tmp_path / "eight", data, *options, "mesh.data=2", "mesh.tensor=2", num_devices=8)
    both = (comparable(steps(tmp_path / name)) for name in ("one", "eight"))
    for one, eight in zip(*both, strict=True):
        for name in {n for n in one if not n.startswith("perf/")} - {"stage", "step"}:
            assert one[name] == pytest.approx(eight[name], abs=1e-4), name
