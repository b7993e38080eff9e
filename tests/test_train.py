"""The whole recipe on a tiny model: it resumes exactly, compiles once, and says what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import COMPILE_FASTEST, mesh_of

from jlrm import config, evaluate, export, judge, train
from jlrm.config import RewardConfig, RunError, UsageError
from jlrm.data import audit
from jlrm.data.batches import Example
from jlrm.data.comparisons import Comparison, write_comparisons
from jlrm.data.worlds import lists, toy
from jlrm.judgement import prompts, rewards
from jlrm.judgement.verdict import preferred
from jlrm.model import qwen
from jlrm.reports.tracking import read_metrics
from jlrm.runtime import commands, devices
from jlrm.runtime.mesh import training_layout
from jlrm.runtime.settings import load
from jlrm.training import heldout as heldout_module
from jlrm.training import same_run, update
from jlrm.training.scoring import judge_responses
from jlrm.weights import hf, hf_config, reading
from jlrm.weights.source import read_params
from jlrm.weights.steps import find, read_digests, read_meta, saved_steps

pytestmark = pytest.mark.slow  # whole models are compiled

TIMES = ("time/", "perf/tokens")
# A long training that is no subject of saving: every second of its many steps would be saved.
SAVE_ONCE = "run.save_every=1000"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_comparisons(toy.comparisons(seed=3, num_rows=64), path)
    return path


@pytest.fixture(autouse=True, scope="module")
def pages():
    """Spare the seconds that pages take to draw; those who look at one switch them on."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = train.run_page.write_report
        patch.setattr(train.run_page, "write_report", lambda *_: None)
        yield drawn


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> list[str]:
    """Overrides that start from a model which already writes verdicts, so that rewards differ."""
    directory = tmp_path_factory.mktemp("warm") / "run"
    run(
        directory,
        "toy",
        "sft.steps=120",
        "sft.batch_size=16",
        "sft.optimizer.learning_rate=4e-3",
        "grpo.steps=0",
        SAVE_ONCE,
    )
    path = f"model.path={directory}"
    return [path, "model.preset=", "model.tokenizer=", "sampling.max_new_tokens=32"]


def settings(run_dir: pathlib.Path, data: pathlib.Path, *overrides: str) -> config.Config:
    """A run of seconds: toy shapes, float32, one device unless overridden."""
    fixed = {
        "run": {"dir": str(run_dir), "eval_every": 0, "save_every": 2, "tensorboard": False},
        "model": {"preset": "toy", "tokenizer": "toy", "compute_dtype": "float32"},
        "data": {"train": str(data), "prompt": "toy", "max_prompt_tokens": 48, "eval_rows": 8},
        "sampling": {"max_new_tokens": 8, "eval_batch_size": 8},
        "grpo": {"steps": 4, "prompts": 4, "rollouts": 4, "optimizer": {"learning_rate": 1e-3}},
        "sft": {"batch_size": 8, "max_target_tokens": 48},
    }
    path = run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fixed))
    return load(path, overrides)


def run(run_dir: pathlib.Path, data: pathlib.Path, *overrides: str, num_devices: int = 1):
    return train.train(settings(run_dir, data, *overrides), jax.devices()[:num_devices])


def final_params(run_dir: pathlib.Path):
    model = hf_config.read_config(run_dir / "model", compute_dtype="float32")
    abstract = qwen.abstract_params(model, training_layout(mesh_of(1, 1, 1)))
    return reading.restore_params(find(str(run_dir)), abstract)


def comparable(rows: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith((*TIMES, "eval/", "perf/compiles"))}
        for row in rows
    ]


def assert_same_record(one: pathlib.Path, other: pathlib.Path) -> None:
    """Compare metrics, and what was drawn, which must add up."""
    assert comparable(read_metrics(one)) == comparable(read_metrics(other))
    lines = audit.read(one)
    assert lines == audit.read(other)
    assert lines and not any(stage.faults for stage in audit.check(lines))


def steps(run_dir: pathlib.Path) -> list[dict]:
    """The metrics of training steps alone, without those of an evaluation before the first."""
    return [row for row in read_metrics(run_dir) if "loss" in row]


def assert_equal_trees(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_what_is_compiled_ahead_is_all_that_any_step_needs(tmp_path, data, monkeypatch):
    monkeypatch.setattr(train.run_page, "write_report", lambda directory: None)
    compiled = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event == devices.COMPILE_EVENT and about["fun_name"] in OF_STEPS:
            compiled.append(len(read_metrics(tmp_path / "r")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    config = settings(
        tmp_path / "r",
        data,
        "run.precompile=always",
        *("run.eval_every=2", "sft.steps=3", "grpo.loss.kl_weight=0.1", "grpo.steps=4"),
        *("sft.pack_tokens=256", "grpo.pack_tokens=256", "grpo.epochs=2"),
    )
    train.train(config, jax.devices()[:2])
    # Before the first step of a stage, and never after one: by the number of steps logged then.
    assert set(compiled) == {0, 3}
    num_shapes = len({row["perf/row_tokens"] for row in read_metrics(tmp_path / "r")})
    assert len(compiled) > 2 * num_shapes


OF_STEPS = [f"jit({name})" for name in ("sft_update", "grpo_update", "logprobs", "generate")]


def test_a_run_writes_what_it_promises_and_its_second_step_compiles_nothing(
    tmp_path, data, pages, monkeypatch
):
    monkeypatch.setattr(train.run_page, "write_report", pages)
    several = ["grpo.epochs=2", "grpo.minibatches=2", "grpo.pack_tokens=128", "sft.pack_tokens=128"]
    several += ["grpo.rollouts=16"]
    summary = run(tmp_path / "r", data, "sft.steps=4", *several, "run.completions_every=2")
    rows = read_metrics(tmp_path / "r")
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("sft", "grpo") for step in (1, 2, 3, 4)
    ]
    for stage in ("sft", "grpo"):
        # The last step evaluates, which compiles the evaluation's sampler.
        compiles = [row["perf/compiles"] for row in rows if row["stage"] == stage][:3]
        assert compiles[0] > 0 and compiles[1] == compiles[2] == compiles[0], compiles
        assert all(row["perf/row_tokens"] == 128 for row in rows if row["stage"] == stage)
    names = set(rows[-1])
    for name in ("reward", "reward_std", "rewards/relation/mean", "frac_reward_zero_std", "kl"):
        assert name in names
    for name in ("entropy", "clip_ratio/low_mean", "completions/clipped_ratio", "judge/parse_rate"):
        assert name in names
    for name in (
        "rollout/logprob_gap",
        "grad_norm",
        "learning_rate",
        "time/rollout",
        "time/update",
    ):
        assert name in names
    assert all(row["rollout/logprob_gap"] < 1e-5 for row in rows if row["stage"] == "grpo")
    written = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "completions", "model"} <= written
    assert {"report.html", "report.png", "summary.json"} <= written
    assert json.loads((tmp_path / "r" / "summary.json").read_text()) == summary
    assert set(summary["grpo"]) >= {"agreement", "parse_rate", "reward"}
    assert summary["steps"] == 8 and summary["tokens"] > 0
    made_from = {
        json.dumps(read_meta(find(f"{tmp_path}/r@{stage}/4"))["made_from"])
        for stage in ("sft", "grpo")
    }
    assert len(made_from) == 1 and json.loads(made_from.pop()).keys() == same_run.PARTS.keys()


def test_a_run_says_what_it_compiles_and_judges_and_when_nothing_can_be_read(
    tmp_path, data, capsys
):
    small = ["grpo.prompts=2", "grpo.rollouts=2", "sampling.max_new_tokens=4"]
    run(tmp_path / "r", data, *small, "grpo.steps=6", "run.save_every=10")
    said = capsys.readouterr().err
    assert "grpo: the first step compiles rollout, log-probabilities, update" in said
    assert "judging 8 held-out pairs after grpo step 6: 16/16" in said
    assert said.count("no completion of the last 5 steps holds a verdict") == 1
    assert "(100 % were cut at sampling.max_new_tokens)" in said
    assert "parsed=0" in said


@pytest.mark.usefixtures("shared_programs")
def test_an_alarm_ends_a_run_that_asks_for_it_and_the_same_command_goes_on(tmp_path, data):
    small = ["grpo.prompts=2", "grpo.rollouts=2", "sampling.max_new_tokens=4", "grpo.steps=6"]
    with pytest.raises(UsageError, match="no alarm 'silence'"):
        run(tmp_path / "r", data, *small, "run.stop_on=[silence]")
    asked = [*small, "run.save_every=10", "run.stop_on=[kl,no_verdict]"]
    with pytest.raises(RunError, match=r"Stopped after grpo step 5, and saved: .* no_verdict"):
        run(tmp_path / "r", data, *asked)
    assert saved_steps(tmp_path / "r")["grpo"] == [5]
    run(tmp_path / "r", data, *asked)
    run(tmp_path / "whole", data, *small)
    assert_same_record(tmp_path / "r", tmp_path / "whole")


@pytest.mark.usefixtures("shared_programs")
def test_a_run_that_goes_on_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, data, warm):
    options = [*warm, "sft.steps=2"]
    run(tmp_path / "whole", data, *options)
    run(tmp_path / "broken", data, *options, "grpo.steps=2")
    run(tmp_path / "broken", data, *options, "grpo.steps=4")
    assert any(row.get("reward_std", 0) > 0.1 for row in read_metrics(tmp_path / "whole"))
    assert_same_record(tmp_path / "whole", tmp_path / "broken")
    assert_equal_trees(final_params(tmp_path / "whole"), final_params(tmp_path / "broken"))


LORA = ["lora.rank=3", "sft.optimizer.learning_rate=1e-2", "grpo.optimizer.learning_rate=1e-2"]


@pytest.mark.usefixtures("shared_programs")
def test_a_run_of_adapters_goes_on_bit_for_bit_and_is_read_merged(tmp_path, data, warm):
    options = [*warm, *LORA, "sft.steps=2", "grpo.loss.kl_weight=0.1"]
    run(tmp_path / "whole", data, *options)
    run(tmp_path / "broken", data, *options, "grpo.steps=2")
    run(tmp_path / "broken", data, *options, "grpo.steps=4")
    assert_same_record(tmp_path / "whole", tmp_path / "broken")
    (saved,) = {
        frozenset(str(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree))
        for tree in (saved_params(tmp_path / "whole"), saved_params(tmp_path / "broken"))
    }
    assert saved and all("_lora_" in name for name in saved), "the base is saved too"
    assert_equal_trees(saved_params(tmp_path / "whole"), saved_params(tmp_path / "broken"))
    rows = [row for row in steps(tmp_path / "whole") if row["stage"] == "grpo"]
    assert abs(rows[0]["kl"]) < 1e-6 < rows[-1]["kl"]  # against what GRPO began from

    model = hf_config.read_config(tmp_path / "whole/model", compute_dtype="float32")
    layout = training_layout(mesh_of(1, 1, 1))
    found = read_params(str(tmp_path / "whole"), model, layout)
    base = read_params(str(pathlib.Path(warm[0].partition("=")[2])), model, layout)
    adapters = saved_params(tmp_path / "whole")["layers"]["mlp"]
    moved = np.einsum("Liu,Lou->Lio", adapters["gate_lora_a"], adapters["gate_lora_b"])
    wanted = np.asarray(base["layers"]["mlp"]["gate"]) + 32 / 3 * moved
    np.testing.assert_allclose(found["layers"]["mlp"]["gate"], wanted, atol=1e-5)
    np.testing.assert_array_equal(found["embed"], base["embed"])
    # A run goes on from the merged weights, with adapters of its own.
    start = [f"model.path={tmp_path / 'whole'}", *warm[1:], *LORA, "grpo.steps=1"]
    run(tmp_path / "next", data, *start)


def test_adapters_beneath_which_the_base_has_changed_are_refused(tmp_path, data):
    run(tmp_path / "first", data, "sft.steps=1", "grpo.steps=0")
    export.export_to_hf(str(tmp_path / "first"), tmp_path / "hf", "float32")
    start = [f"model.path={tmp_path / 'hf'}", "model.preset=", "model.tokenizer=", *LORA]
    run(tmp_path / "r", data, *start, "sft.steps=1", "grpo.steps=0")
    config = hf_config.read_config(tmp_path / "r/model")
    weights = tmp_path / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match=r"holds adapters of model.path=.*Bring them back"):
        read_params(str(tmp_path / "r"), config, training_layout(mesh_of(1, 1, 1)))
    with pytest.raises(UsageError, match=r"base \(the weights of model.path\)"):
        run(tmp_path / "r", data, *start, "sft.steps=2", "grpo.steps=0")


def saved_params(run_dir: pathlib.Path):
    step = find(str(run_dir))
    names = read_digests(step)["params"]
    tree: dict = {}
    for name in names:
        *path, last = name.removeprefix("params.").split(".")
        leaf = tree
        for part in path:
            leaf = leaf.setdefault(part, {})
        leaf[last] = reading.read_tensor(step, ".".join([*path, last]))
    return tree


@pytest.mark.parametrize("more", [[], ["lora.rank=3"]], ids=["all weights", "adapters"])
def test_eight_devices_learn_what_one_does(tmp_path, data, warm, more):
    options = [*warm, *more, "sft.steps=2", "grpo.steps=2"]
    run(tmp_path / "one", data, *options)
    run(tmp_path / "eight", data, *options, "mesh.data=2", "mesh.tensor=2", num_devices=8)
    for one, eight in zip(
        comparable(read_metrics(tmp_path / "one")),
        comparable(read_metrics(tmp_path / "eight")),
        strict=True,
    ):
        assert one.keys() == eight.keys()
        for name in {n for n in one if not n.startswith("perf/")} - {"stage", "step"}:
            assert one[name] == pytest.approx(eight[name], abs=1e-4), name


def test_the_held_out_set_is_judged_as_evaluate_judges_it(tmp_path, data, warm, capsys):
    heldout = tmp_path / "heldout.jsonl"
    write_comparisons(toy.comparisons(seed=8, num_rows=40), heldout)
    held_out = [f"data.eval={heldout}", "data.eval_rows=40", "data.max_prompt_tokens=64"]
    held_out += ["run.best_metric=f1", "grpo.steps=1"]
    found = run(tmp_path / "r", data, *warm, *held_out)["grpo"]
    assert 0 < found["agreement"] < 100 and 0 < found["parse_rate"] <= 100
    command = ["--model", str(tmp_path / "r"), "--benchmark", "pairs", "--data", str(heldout)]
    command += ["--policy", "aggregation=first_order", "--parser", "strict"]
    command += ["--compute-dtype", "float32"]
    command += ["--max-prompt-tokens", "64", "--max-new-tokens", "32", "--out", str(tmp_path / "e")]
    evaluate.main([*command, "--mesh", "data=8", "fsdp=1", "--no-report", "--json"])
    judged = json.loads(capsys.readouterr().out)["pairs"]
    for theirs, ours in heldout_module.METRICS.items():
        assert found[ours] == pytest.approx(judged[theirs])
    assert found["parse_rate"] == pytest.approx(100 * (1 - judged["parse_failures"] / 80))


def test_without_kl_no_reference_is_scored(tmp_path, data, monkeypatch):
    def score(*_: object) -> None:
        raise AssertionError("something was scored")

    monkeypatch.setattr(update, "logprobs", score)
    run(tmp_path / "r", data, "grpo.loss.kl_weight=0", "grpo.steps=1")
    (row,) = read_metrics(tmp_path / "r")
    assert "kl" not in row


@pytest.mark.usefixtures("shared_programs")
def test_training_from_a_hugging_face_directory_and_from_a_run(tmp_path, data):
    run(tmp_path / "first", data, "sft.steps=1", "grpo.steps=0")
    export.export_to_hf(str(tmp_path / "first"), tmp_path / "hf", "float32")
    before = final_params(tmp_path / "first")
    model = hf_config.read_config(tmp_path / "hf")
    loaded = hf.load_params(tmp_path / "hf", model, training_layout(mesh_of(1, 1, 1)))
    assert_equal_trees(before, loaded)
    rows = {}
    for name, source in {"a": tmp_path / "hf", "b": tmp_path / "first"}.items():
        no_preset = [f"model.path={source}", "model.preset=", "model.tokenizer="]
        run(tmp_path / name, data, *no_preset, "grpo.steps=1")
        rows[name] = comparable(read_metrics(tmp_path / name))
    assert rows["a"] == rows["b"]


@pytest.fixture
def command(tmp_path, data):
    """Run the command with a config that works but for the overrides, expecting a refusal."""

    def refuse(capsys, *overrides: str) -> str:
        settings(tmp_path / "r", data)
        argv = ["--config", str(tmp_path / "r.yaml"), *overrides]
        assert commands.run(lambda: train.main(argv)) == 2
        return capsys.readouterr().err

    return refuse


def test_wrong_input_is_one_clear_sentence_and_exit_code_2(tmp_path, data, command, capsys):
    def file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    good = data.read_text().splitlines()[0]
    (tmp_path / "empty").mkdir()
    cases = {
        f"data.train={tmp_path}/nothing.jsonl": "Cannot read the data file",
        f"data.train={file('empty.jsonl', '')}": "is empty",
        f"data.train={file('torn.jsonl', good + chr(10) + good[:40])}": "line 2 is not valid JSON",
        f"data.train={file('list.jsonl', '[1]')}": "row 1 must be a JSON object",
        f"data.train={file('field.jsonl', '{}')}": "line 1 has no field 'question'",
        f"data.train={file('many.jsonl', json.dumps({**json.loads(good), 'score_1': 'many'}))}": (
            "line 1: the scores must be two numbers"
        ),
        f"data.train={tmp_path}/empty": "Cannot read the dataset",
        "data.eval_rows=10000": "would hold",
        "data.max_prompt_tokens=3": "longer than data.max_prompt_tokens=3",
        "data.overlong=refuse data.max_prompt_tokens=30": "the prompt has",
        "data.prompt=toyy": "Did you mean 'toy'?",
        "model.preset=qwen2.5-7": "Did you mean 'qwen2.5-7b'?",
        f"model.preset= model.path={tmp_path}/none": "No model directory at",
        f"model.preset= model.path={tmp_path}": "config.json",
        f"model.tokenizer={tmp_path}": "holds no tokenizer.json",
        "sampling.max_new_tokens=4000": "positions for",
        "mesh.tensor=3": "does not fit",
        "mesh.fsdp=1 mesh.data=1": "does not fit 8 devices",
        "mesh.tensor=8": "does not divide the model's num_attention_heads=4",
        "sft.steps=1 sft.max_target_tokens=3": "nothing to imitate",
    }
    for overrides, message in cases.items():
        error = command(capsys, *overrides.split(" "))
        assert message in error, (overrides, error)
        assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error, error


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, data, command, capsys):
    run(tmp_path / "small", data, "sft.steps=1", "grpo.steps=0")
    fields = json.loads((tmp_path / "small/model/config.json").read_text())
    (tmp_path / "small/model/config.json").write_text(json.dumps({**fields, "vocab_size": 96}))
    error = command(capsys, f"model.path={tmp_path}/small", "model.preset=", "model.tokenizer=")
    assert "ids, but the model's vocabulary 96" in error


def test_a_run_directory_belongs_to_one_config(tmp_path, data, command, capsys):
    run(tmp_path / "r", data, "grpo.steps=1")
    error = command(capsys, "grpo.rollouts=8", "mesh.fsdp=8")
    assert "another config (grpo.rollouts 4 -> 8)" in error


def test_a_reward_that_fails_stops_the_run_and_names_the_row():
    row = Comparison("row-7", "q", "a", "b", score_1="8", score_2=4.0)  # as no reader gives it
    text = "</think><answer>8</answer><answer>4</answer>"
    template = prompts.PAIR_TEMPLATES["judgelrm_train"]
    prompt = prompts.fill(template, question="q", answer_1="a", answer_2="b")
    with pytest.raises(RunError, match="The reward of row row-7 failed"):
        judge_responses(rewards.JUDGELRM, [], [Example(row, prompt, [1])], [text], [[1, 2, 3]], 8)
    unusable = dataclasses.replace(row, score_1=-1.0)
    with pytest.raises(UsageError, match="Row row-7: gold="):
        judge_responses(
            RewardConfig(), [], [Example(unusable, prompt, [1])], [text], [[1, 2, 3]], 8
        )


@pytest.mark.usefixtures("shared_programs")
def test_when_the_next_rollout_begins_changes_nothing_unless_it_is_before_the_update(
    tmp_path, data, warm
):
    ways = {
        "none": ["grpo.ahead=none"],
        "next": ["grpo.ahead=next"],
        "capped": ["grpo.ahead=next", "grpo.loss.importance_cap=2"],
        "stale": ["grpo.ahead=stale", "grpo.loss.importance_cap=2"],
        "int8": ["sampling.weights=int8", "grpo.loss.importance_cap=2"],
    }
    rows = {}
    for name, overrides in ways.items():
        run(tmp_path / name, data, *warm, *overrides)
        rows[name] = comparable(steps(tmp_path / name))
    assert rows["next"] == rows["none"]
    gaps = {name: [row["rollout/logprob_gap"] for row in rows[name]] for name in ways}
    assert max(gaps["next"] + gaps["capped"]) < 1e-5
    # On-policy the weights are 1 up to rounding.
    for one, other in zip(rows["capped"], rows["next"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    # One step off-policy begins on-policy, and then samples from weights a step old.
    assert gaps["stale"][0] < 1e-5 < 1e-3 < min(gaps["stale"][1:])
    assert rows["stale"][0]["reward"] == rows["next"][0]["reward"]
    assert min(gaps["int8"]) > 1e-4 and max(gaps["int8"]) < 0.2


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.campaign)]
)
def test_a_stopped_run_loses_nothing_and_goes_on(tmp_path, data, warm, signum):
    options = [
        *warm,
        "grpo.steps=6",
        "run.save_every=1",
        "mesh.fsdp=8",
        "sampling.eval_batch_size=8",
    ]
    run(tmp_path / "whole", data, *options, num_devices=8)
    settings(tmp_path / "r", data)
    argv = [sys.executable, "-m", "jlrm.train", "--config", str(tmp_path / "r.yaml"), *options]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": COMPILE_FASTEST}
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(saved_steps(tmp_path / "r").get("grpo", [])) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    if signum == signal.SIGINT:
        assert process.returncode == 130, error
        assert "Stopped after grpo step" in error and "The same command goes on" in error
    assert len(read_metrics(tmp_path / "r")) < 6
    run(tmp_path / "r", data, *options, num_devices=8)
    assert_same_record(tmp_path / "r", tmp_path / "whole")
    assert_equal_trees(final_params(tmp_path / "r"), final_params(tmp_path / "whole"))


@pytest.mark.campaign  # tests/weights/test_checkpoint.py restores on other meshes without a run
def test_mesh_config_is_free_to_change_between_starts(tmp_path, data):
    run(tmp_path / "r", data, "grpo.steps=1", num_devices=8)
    summary = run(tmp_path / "r", data, "grpo.steps=2", "mesh.tensor=2", num_devices=2)
    assert summary["steps"] == 2


def test_both_orders_of_a_pair_are_one_group_and_consistency_is_paid(tmp_path, data, warm):
    options = ["data.orders=both", "reward.swap_consistency=1", "grpo.steps=2"]
    run(tmp_path / "r", data, *warm, *options)
    for row in steps(tmp_path / "r"):
        assert row["rewards/swap_consistency/mean"] <= 0
        assert 0 <= row["judge/swap_consistency"] <= 100
    (file, _) = sorted((tmp_path / "r/completions").glob("*.parquet"))
    rows = pq.read_table(file).to_pylist()
    columns = {"question", "answer_1", "answer_2", "response", "reasoning", "verdict", "gold"}
    columns |= {"status", "reward", "rewards/swap_consistency", "advantage", "order"}
    assert columns <= rows[0].keys()
    pairs = [rows[i : i + 8] for i in range(0, 16, 8)]
    for group in pairs:  # 4 rollouts of each order
        assert len({row["id"] for row in group}) == 1
        assert len({row["prompt"] for row in group}) == 2
        assert [row["order"] for row in group] == ["given"] * 4 + ["swapped"] * 4
        assert group[0]["answer_1"] == group[4]["answer_2"] in group[0]["prompt"]
        rewards_of = np.array([row["reward"] for row in group])
        advantages = np.array([row["advantage"] for row in group])
        if np.ptp(rewards_of):
            wanted = (rewards_of - rewards_of.mean()) / (rewards_of.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(advantages, wanted, atol=1e-5)


@pytest.mark.usefixtures("shared_programs")
def test_remax_compares_with_the_greedy_completion_of_the_prompt(tmp_path, data, warm):
    options = [*warm, "preset=remax", "run.save_every=1"]
    run(tmp_path / "whole", data, *options, "grpo.steps=2")
    run(tmp_path / "broken", data, *options, "grpo.steps=1")
    run(tmp_path / "broken", data, *options, "grpo.steps=2")
    assert_same_record(tmp_path / "whole", tmp_path / "broken")
    (file, _) = sorted((tmp_path / "whole/completions").glob("*.parquet"))
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 16
    baselines = []
    for start in range(0, 16, 4):
        group = rows[start : start + 4]
        found = [row["reward"] - row["advantage"] for row in group]
        assert max(found) - min(found) < 1e-5
        baselines.append((found[0], sum(row["reward"] for row in group) / 4))
    assert any(abs(greedy - mean) > 0.01 for greedy, mean in baselines), "the group's own mean"
    cold = [*options, "sampling.temperature=1e-4", "grpo.steps=1"]  # all are the greedy one
    run(tmp_path / "cold", data, *cold)
    (file,) = (tmp_path / "cold/completions").glob("*.parquet")
    found = pq.read_table(file).to_pylist()
    assert {row["id"] for row in found} == {row["id"] for row in rows}
    assert all(abs(row["advantage"]) < 1e-5 for row in found)
    for row, (greedy, _) in zip(found[::4], baselines, strict=True):
        assert row["reward"] == pytest.approx(greedy, abs=1e-5)


@pytest.fixture(scope="module")
def warm_single(tmp_path_factory) -> list[str]:
    """As `warm`, of a model that scores single answers."""
    directory = tmp_path_factory.mktemp("warm") / "single"
    fast = ["sft.batch_size=16", "sft.optimizer.learning_rate=4e-3", "grpo.steps=0", SAVE_ONCE]
    run(directory, "lists-single", "preset=irpm", "sft.steps=120", *fast)
    path = f"model.path={directory}"
    own = ["preset=irpm", "sampling.max_new_tokens=32"]
    return [path, "model.preset=", "model.tokenizer=", *own]


def test_single_answers_are_scored_alone_and_paid_by_those_of_the_other(tmp_path, warm_single):
    run(tmp_path / "r", "lists-single", *warm_single, "grpo.steps=2")
    (file, _) = sorted((tmp_path / "r/completions").glob("*.parquet"))
    rows = pq.read_table(file).to_pylist()
    is_paid = False
    for start in range(0, 16, 8):  # 4 rollouts of either answer
        group = rows[start : start + 8]
        assert len({row["id"] for row in group}) == 1
        for own, other in ((group[:4], group[4:]), (group[4:], group[:4])):
            theirs = [each["verdict"][0] for each in other if each["verdict"]]
            for row in own:
                assert row["answer_1"] in row["prompt"] and row["answer_2"] not in row["prompt"]
                if not row["verdict"]:
                    continue
                sides = [preferred(row["verdict"][0], each) == row["label"] for each in theirs]
                assert row["rewards/preference"] == pytest.approx(np.mean(sides)), row
                is_paid = True
            rewards_of = np.array([row["reward"] for row in own])
            if np.ptp(rewards_of):
                wanted = (rewards_of - rewards_of.mean()) / (rewards_of.std(ddof=1) + 1e-6)
                np.testing.assert_allclose([row["advantage"] for row in own], wanted, atol=1e-5)
    assert is_paid


def test_a_judge_of_single_answers_is_evaluated_as_it_was_trained(tmp_path, warm_single, capsys):
    heldout = tmp_path / "heldout.jsonl"
    rows = list(lists.rows("lists-single", "heldout"))[:24]
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [f"data.eval={heldout}", "data.eval_rows=24", "grpo.steps=1"]
    found = run(tmp_path / "r", "lists-single", *warm_single, *held_out)["grpo"]
    evaluate.main(
        [
            *("--model", str(tmp_path / "r"), "--benchmark", "pairs", "--json", "--no-report"),
            *("--data", str(heldout), "--out", str(tmp_path / "out")),
            *("--policy", "aggregation=first_order", "--parser", "strict"),
            *("--max-prompt-tokens", "48", "--max-new-tokens", "32", "--compute-dtype", "float32"),
        ]
    )
    said = json.loads(capsys.readouterr().out)["pairs"]
    for theirs, ours in heldout_module.METRICS.items():
        assert said[theirs] == pytest.approx(found[ours]), ours
    responses = (tmp_path / "out/pairs/responses.jsonl").read_text().splitlines()
    assert len(responses) == 1 + 2 * 24  # each answer once, though both orders are counted
    with pytest.raises(UsageError, match="has seen no pairs"):
        judge.main([str(heldout), "--model", str(tmp_path / "r"), "--out", str(tmp_path / "j")])
    assert not (tmp_path / "j").exists()


def test_lists_are_judged_at_once_and_paid_by_their_pairs(tmp_path):
    fast = ["sft.steps=80", "sft.batch_size=20", "sft.optimizer.learning_rate=4e-3"]
    stop = "sampling.stop_strings={</answer>: 4}"
    own = ["data.judging=lists", "data.max_prompt_tokens=112", "sampling.max_new_tokens=48"]
    heldout = ["data.eval=lists-many#heldout", "data.eval_rows=24"]
    directory = tmp_path / "r"
    with pytest.raises(UsageError, match="there are lists of 4 answers"):
        run(directory, "lists-many", *own, *heldout, *fast)
    found = run(directory, "lists-many", stop, *own, *heldout, *fast, "grpo.steps=2", SAVE_ONCE)
    assert found["grpo"]["pairs"] == 24 and found["grpo"]["parse_rate"] > 20
    (file, _) = sorted((directory / "completions").glob("*.parquet"))
    known = {row["id"]: row for row in lists.rows("lists-many", "train")}
    sizes = set()
    for row in pq.read_table(file).to_pylist():
        answers, gold = known[row["id"]]["answers"], known[row["id"]]["scores"]
        assert all(f"{i}: {answer}" in row["prompt"] for i, answer in enumerate(answers, 1))
        if not row["verdict"]:
            assert row["is_right"] == 0 and row["status"] != "ok"
            continue
        said = row["verdict"]
        assert len(said) == len(answers)
        places = itertools.combinations(range(len(answers)), 2)
        agreed = [preferred(said[i], said[j]) == preferred(gold[i], gold[j]) for i, j in places]
        assert row["is_right"] == pytest.approx(np.mean(agreed))
        wanted = np.mean([2.0 if each else -1.5 for each in agreed])
        assert row["rewards/relation"] == pytest.approx(wanted)
        sizes.add(len(answers))
    assert sizes == {3, 4}


def test_rows_that_are_swapped_already_are_not_swapped_back(tmp_path):
    rows = toy.comparisons(seed=4, num_rows=64)
    swapped = [dataclasses.replace(row.swapped(), id=f"{row.id}/swapped") for row in rows]
    write_comparisons([*rows, *swapped], tmp_path / "swapped.jsonl")
    with pytest.raises(UsageError, match="holds swapped rows already"):
        run(tmp_path / "r", tmp_path / "swapped.jsonl", "data.orders=both")


def test_a_run_on_preferences_alone(tmp_path, warm):
    rows = [
        dataclasses.replace(row, score_1=None, score_2=None, preference=row.label)
        for row in toy.comparisons(seed=4, num_rows=64)
    ]
    write_comparisons(rows, tmp_path / "preferences.jsonl")
    summary = run(tmp_path / "r", tmp_path / "preferences.jsonl", *warm, "grpo.steps=2")
    row = read_metrics(tmp_path / "r")[-1]
    assert "rewards/preference/mean" in row and "rewards/relation/mean" not in row
    assert 0 <= summary["grpo"]["agreement"] <= 100
    with pytest.raises(UsageError, match="can use, only preferences"):
        run(tmp_path / "s", tmp_path / "preferences.jsonl", *warm, "reward.mode=judgelrm")


def test_a_run_on_rows_without_a_label_is_paid_by_their_majority(tmp_path, warm):
    made = toy.comparisons(seed=4, num_rows=80)
    rows = [
        dataclasses.replace(row, id=f"bare-{i}", score_1=None, score_2=None) if i < 64 else row
        for i, row in enumerate(made)
    ]
    write_comparisons(rows[:64], tmp_path / "bare.jsonl")
    write_comparisons(rows[64:], tmp_path / "gold.jsonl")
    held_out = [f"data.eval={tmp_path}/gold.jsonl", "data.eval_rows=16", "run.completions_every=1"]
    own = [*warm, *held_out, "data.gold=majority", "grpo.rollouts=5"]
    summary = run(tmp_path / "r", tmp_path / "bare.jsonl", *own, "grpo.steps=2")
    assert 0 <= summary["grpo"]["agreement"] <= 100
    row = steps(tmp_path / "r")[-1]
    assert "judge/agreement" not in row and "rewards/relation/mean" not in row
    assert "rewards/preference/mean" in row and 0 <= row["completions/unpaid_ratio"] < 1
    (file, _) = sorted((tmp_path / "r/completions").glob("*.parquet"))
    for judged in pq.read_table(file).to_pylist():
        assert judged["id"].startswith("bare-")
        assert judged["label"] is None and judged["is_right"] is None
    with pytest.raises(UsageError, match="all were left out: 64 without a label"):
        run(tmp_path / "s", tmp_path / "bare.jsonl", *warm, *held_out, "grpo.steps=1")
    with pytest.raises(UsageError, match="None of the 64 rows"):
        run(tmp_path / "t", tmp_path / "bare.jsonl", *warm, "data.gold=majority", "grpo.steps=1")


PREFERENCES = [
    {"question": row.question + f" ({i})", "preference": row.label, "id": row.id}
    | {"answer_1": row.answer_1, "answer_2": row.answer_2}
    for i, row in enumerate(toy.comparisons(seed=4, num_rows=60))
]


def test_the_config_for_pairs_trains_on_a_few_preferences(tmp_path):
    """The first command of a newcomer, on 60 rows of the simplest form, but for the model."""
    lines = "".join(json.dumps(row) + "\n" for row in PREFERENCES)
    (tmp_path / "pairs.jsonl").write_text(lines)
    small = ["model.path=", "model.preset=toy", "model.tokenizer=toy", "data.prompt=toy"]
    small += ["grpo.steps=1", "sampling.max_new_tokens=8", "sampling.eval_batch_size=8"]
    small += [f"run.dir={tmp_path}/r", f"data.train={tmp_path}/pairs.jsonl", "mesh.fsdp=1"]
    small += ["run.eval_every=0", "run.tensorboard=false", "grpo.rollouts=2"]
    small += ["data.max_prompt_tokens=64"]
    path = pathlib.Path(__file__).parents[1] / "configs/judge_pairs_0.5b.yaml"
    summary = train.train(load(path, small), jax.devices()[:1])
    assert summary["steps"] == 1 and 0 <= summary["grpo"]["agreement"] <= 100
    with pytest.raises(UsageError, match=r"nothing to imitate: none of 48 rows.*sft\.steps=0"):
        again = [*small, f"run.dir={tmp_path}/s", "sft.steps=1"]
        train.train(load(path, again), jax.devices()[:1])


def test_what_it_begins_with_is_judged_first_unless_only_the_end_is(tmp_path, data, warm):
    judged = {}
    for every in (0, 9):
        ends = run(tmp_path / f"{every}", data, *warm, "grpo.steps=1", f"run.eval_every={every}")
        rows = read_metrics(tmp_path / f"{every}")
        judged[every] = [row["step"] for row in rows if "eval/agreement" in row]
        assert ("start" in ends) == bool(every)
    assert judged == {0: [1], 9: [0, 1]}


@pytest.mark.usefixtures("shared_programs")
def test_a_summary_counts_the_steps_that_were_taken(tmp_path, data):
    run(tmp_path / "r", data, "grpo.steps=2")
    assert run(tmp_path / "r", data, "grpo.steps=1")["steps"] == 2


@pytest.mark.usefixtures("shared_programs")
def test_a_run_keeps_its_held_out_rows_where_their_number_is_left_open(tmp_path, data):
    """As a run that was begun when 200 rows were held out, however few there were."""
    options = ["grpo.steps=2", "data.eval_rows=40"]
    whole = run(tmp_path / "whole", data, *options)
    run(tmp_path / "r", data, "grpo.steps=1", "data.eval_rows=40")
    goes_on = run(tmp_path / "r", data, "grpo.steps=2", "data.eval_rows=0")
    assert goes_on["grpo"] == whole["grpo"]
    assert_same_record(tmp_path / "r", tmp_path / "whole")
    saved = load(tmp_path / "r/config.yaml")
    assert saved.data.eval_rows == 40
    with pytest.raises(UsageError, match=r"data\.eval_rows 40 -> 9"):
        run(tmp_path / "r", data, "grpo.steps=2", "data.eval_rows=9")


@pytest.fixture
def parity(tmp_path, monkeypatch):
    """A plug-in that pays rollouts of every second row alike, and the others differently."""
    (tmp_path / "parity_reward.py").write_text(
        "def parity(completions, id, **columns):\n"
        "    number = [int(name.rsplit('-', 1)[1]) for name in id]\n"
        "    return [float(i) if n % 2 else 1.0 for i, n in enumerate(number)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return ["reward.mode=none", "reward.plugins={parity_reward:parity: 1.0}"]


def test_groups_of_equal_rewards_are_kept_masked_or_drawn_anew(tmp_path, data, warm, parity):
    options = [
        *warm,
        *parity,
        "grpo.steps=3",
        "grpo.loss.kl_weight=0",
        "grpo.loss.entropy_weight=0",
    ]
    for choice in ("keep", "skip", "resample"):
        run(tmp_path / choice, data, *options, f"grpo.zero_variance={choice}")
    kept, skipped, resampled = (steps(tmp_path / choice) for choice in ("keep", "skip", "resample"))
    assert any(0 < row["frac_reward_zero_std"] < 1 for row in kept)
    assert "groups/draws" not in kept[0] and "rewards/relation/mean" not in kept[0]
    for row in skipped:
        assert row["groups/draws"] == 1 and row["groups/discarded"] == 0
        assert row["groups/masked"] == 4 * row["frac_reward_zero_std"]
    assert skipped[0]["frac_reward_zero_std"] == kept[0]["frac_reward_zero_std"]
    assert [row["grad_norm"] for row in skipped] != [row["grad_norm"] for row in kept]
    for row in resampled:
        assert 1 < row["groups/draws"] <= 4
        assert row["groups/discarded"] == 4 * (row["groups/draws"] - 1)
        assert (
            row["perf/compiles"] == resampled[1]["perf/compiles"]
            or row is resampled[0]
            or (row is resampled[-1])
        )
    enough = [row for row in resampled if row["groups/masked"] == 0]
    assert enough


@pytest.mark.usefixtures("shared_programs")
def test_resampling_goes_on_exactly_after_a_stop(tmp_path, data, warm, parity):
    options = [*warm, *parity, "grpo.zero_variance=resample"]
    run(tmp_path / "whole", data, *options)
    run(tmp_path / "broken", data, *options, "grpo.steps=2")
    run(tmp_path / "broken", data, *options)
    assert_same_record(tmp_path / "whole", tmp_path / "broken")


def test_dropped_rows_are_listed_in_the_run_directory(tmp_path, data):
    lines = data.read_text().splitlines()
    failed = json.dumps({**json.loads(lines[0]), "id": "bad", "score_1": -1.0, "score_2": -1.0})
    unwritten = json.dumps({**json.loads(lines[0]), "id": "unwritten", "meta": {}})
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, failed, unwritten]))
    options = ["sft.steps=1", "grpo.steps=1", "data.max_prompt_tokens=40"]
    run(tmp_path / "r", tmp_path / "x.jsonl", *options)
    listed = [json.loads(line) for line in (tmp_path / "r/dropped.jsonl").read_text().splitlines()]
    assert {"failed_review", "overlong"} == {row["reason"] for row in listed}
    (bad,) = [row for row in listed if row["id"] == "bad"]
    assert bad["where"] == f"{tmp_path}/x.jsonl, line 65"
    (line,) = (tmp_path / "r/dropped_sft.jsonl").read_text().splitlines()
    where = f"{tmp_path}/x.jsonl, line 66"
    assert json.loads(line) == {"where": where, "id": "unwritten", "reason": "no_judgement"}
