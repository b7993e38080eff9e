"""Opening a run: a directory has one writer, and one config once it holds a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from jlrm.config import Config, RunError, UsageError
from jlrm.data.comparisons import write_comparisons
from jlrm.data.splits import read_splits
from jlrm.data.worlds import toy
from jlrm.runtime import storage
from jlrm.runtime.settings import from_dict, to_dict
from jlrm.training import setup
from jlrm.weights import steps


def settings(directory, **sections) -> Config:
    data = directory.parent / "pairs.jsonl"
    if not data.exists():
        write_comparisons(toy.comparisons(seed=3, num_rows=32), data)
    tree = {
        "run": {"dir": str(directory)},
        "model": {"preset": "toy", "tokenizer": "toy"},
        "data": {"train": str(data), "prompt": "toy", "max_prompt_tokens": 64, "eval_rows": 8},
        "sampling": {"max_new_tokens": 8},
        "grpo": {"steps": 4, "prompts": 4, "rollouts": 4},
    }
    names = {**tree, **sections}
    return from_dict({name: {**tree.get(name, {}), **sections.get(name, {})} for name in names})


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "r"


def opened(config: Config) -> setup.Run:
    with setup.open_run(config, jax.devices()[:1]) as run:
        return run


@pytest.mark.slow
def test_a_start_that_left_no_checkpoint_binds_nothing(run_dir):
    opened(settings(run_dir))
    (run_dir / "model" / "generation_config.json").write_text("{}")  # of another model
    run = opened(settings(run_dir, grpo={"rollouts": 8}))
    assert run.config.grpo.rollouts == 8 and not run.directory.is_trained
    assert not (run_dir / "model" / "generation_config.json").exists()
    assert "rollouts: 8" in (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text("no: config\n")
    opened(settings(run_dir))


def test_a_checkpoint_binds_the_directory_to_its_config(run_dir):
    opened(settings(run_dir))
    (run_dir / "checkpoints" / "grpo" / "2").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"another config \(grpo.rollouts 4 -> 8\)"):
        opened(settings(run_dir, grpo={"rollouts": 8}))
    assert opened(settings(run_dir, grpo={"steps": 6})).directory.is_trained


@pytest.mark.slow
def test_a_run_that_began_before_foldings_keeps_its_split_and_a_new_one_its_own(run_dir):
    """Two questions that differ by a comma: one question today, two when older runs began."""
    data = run_dir.parent / "pairs.jsonl"
    rows = toy.comparisons(seed=3, num_rows=64)
    texts = [f"Well{',' * (i % 2)} which is number {i // 2}?" for i in range(64)]
    asked = zip(rows, texts, strict=True)
    write_comparisons([dataclasses.replace(row, question=text) for row, text in asked], data)

    def held_out(config: Config) -> set[str]:
        return {row.question for row in read_splits(config.data, (1, 10), False).heldout.mine}

    by_words = held_out(opened(settings(run_dir)).config)
    assert all(
        {text.replace("Well,", "Well"), text.replace("Well ", "Well, ")} <= by_words
        for text in by_words
    )
    saved = run_dir / "config.yaml"
    (run_dir / "checkpoints" / "grpo" / "2").mkdir(parents=True)
    assert held_out(opened(settings(run_dir)).config) == by_words
    saved.write_text(saved.read_text().replace("  folding: words\n", ""))  # as older programs wrote
    by_text = held_out(opened(settings(run_dir)).config)
    assert by_text == held_out(settings(run_dir, data={"folding": "text"})) != by_words
    assert "folding: text" in saved.read_text()
    assert held_out(opened(settings(run_dir)).config) == by_text  # and so it stays
    saved.write_text(saved.read_text().replace("folding: text", "folding: words"))
    with pytest.raises(UsageError, match=r"data\.folding 'words' -> 'text'"):
        opened(settings(run_dir, data={"folding": "text"}))


def test_a_run_from_before_importance_terms_goes_on_with_all_or_not_at_all(run_dir):
    capped = {"loss": {"importance_cap": 2.0}}
    opened(settings(run_dir, grpo=capped))
    (run_dir / "checkpoints" / "grpo" / "2").mkdir(parents=True)
    path = run_dir / "config.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "importance_terms" not in line))
    with pytest.raises(UsageError, match=r"grpo\.importance_terms 'all' -> 'policy'"):
        opened(settings(run_dir, grpo=capped))
    opened(settings(run_dir, grpo={**capped, "importance_terms": "all"}))
    assert "importance_terms: all" in path.read_text()


def test_a_weight_of_a_term_that_no_reward_has_is_refused_before_anything_is_opened(run_dir):
    apart = {"terms": "apart", "term_weights": {"relatoin": 2.0}}
    with pytest.raises(UsageError, match=r"no term is named 'relatoin'\. Did you mean 'relation'"):
        opened(settings(run_dir, grpo={"advantage": apart}))


@pytest.mark.slow
def test_the_files_of_a_model_are_kept_once_training_has_begun_and_mended_if_they_are_gone(run_dir):
    opened(settings(run_dir))
    (run_dir / "checkpoints" / "grpo" / "2").mkdir(parents=True)
    file = run_dir / "model" / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "max_position_embeddings": 512}))
    assert opened(settings(run_dir)).policy.model.max_position_embeddings == 512
    for path in (run_dir / "model").iterdir():
        path.unlink()
    (run_dir / "model").rmdir()
    opened(settings(run_dir))
    assert json.loads(file.read_text()) == before


def saved_with(config: Config, stage: str, step: int) -> None:
    """Leave a checkpoint without weights, which only its config is read from."""
    directory = steps.absolute(config.run.dir) / "checkpoints" / stage / str(step)
    for item in ("params", "meta"):
        (directory / item).mkdir(parents=True)
        (directory / item / "metadata").write_text(json.dumps({"config": to_dict(config)}))


def test_a_config_that_was_emptied_is_not_one_that_is_missing(run_dir):
    config = settings(run_dir)
    opened(config)
    saved_with(config, "grpo", 2)
    for content in ("", " \n"):
        (run_dir / "config.yaml").write_text(content)
        with pytest.raises(UsageError, match=r"config\.yaml is empty: .* Remove it"):
            opened(config)
    (run_dir / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"another config \(grpo.rollouts 4 -> 8\)"):
        opened(settings(run_dir, grpo={"rollouts": 8}))
    opened(config)
    assert "rollouts: 4" in (run_dir / "config.yaml").read_text()


def test_a_stage_whose_checkpoints_are_gone_is_not_trained_under_a_later_one(run_dir):
    one = settings(run_dir)
    config = from_dict({**to_dict(one), "sft": {"steps": 7}})
    setup.refuse_to_begin_before(config, "sft")
    saved_with(config, "grpo", 2)
    setup.refuse_to_begin_before(config, "grpo")
    with pytest.raises(UsageError, match=r"checkpoints of grpo, and of sft before it none") as told:
        setup.refuse_to_begin_before(config, "sft")
    assert f"model.path={run_dir}@grpo/2 run.dir=NEW sft.steps=0" in str(told.value)


@pytest.mark.slow
def test_a_start_that_is_killed_leaves_no_half_of_a_model(run_dir, monkeypatch):
    opened(settings(run_dir))
    before = {path.name for path in (run_dir / "model").iterdir()}

    def die(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(setup.toy, "save_tokenizer", die)
        opened(settings(run_dir))
    assert {path.name for path in (run_dir / "model").iterdir()} == before
    opened(settings(run_dir))
    assert not (run_dir / "model.partial").exists()


@pytest.mark.slow
def test_a_directory_has_one_writer(run_dir):
    config = settings(run_dir / "run")
    with setup.open_run(config, jax.devices()[:1]):
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        with (
            pytest.raises(UsageError, match=f"is written by {owner}"),
            setup.open_directory(config),
        ):
            pass
    opened(config)


@pytest.mark.slow
def test_a_writer_that_was_killed_holds_nothing(run_dir):
    code = (
        "import os, pathlib, sys\nfrom jlrm.runtime.lock import sole_writer\n"
        "with sole_writer(pathlib.Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run_dir / "run")]).returncode == -9
    opened(settings(run_dir / "run"))


def test_a_directory_that_vanishes_is_waited_for_and_then_missed(run_dir, monkeypatch, caplog):
    waited = []
    monkeypatch.setattr(storage, "PAUSES", (1.0, 2.0))
    with setup.open_directory(settings(run_dir / "run")) as directory:
        directory.check()
        (run_dir / "run").rename(run_dir / "away")
        (run_dir / "run").mkdir()  # as a mount point without its disk

        def bring_back(pause: float) -> None:
            waited.append(pause)
            if len(waited) == 2:
                (run_dir / "run").rmdir()
                (run_dir / "away").rename(run_dir / "run")

        monkeypatch.setattr(setup.time, "sleep", bring_back)
        directory.check()
        assert waited == [1.0, 2.0] and "has vanished. Waiting for it" in caplog.text
        (run_dir / "run").rename(run_dir / "away")
        waited.append(0.0)
        with pytest.raises(RunError, match="has vanished, so this step is not written"):
            directory.check()


@pytest.mark.slow
def test_a_stage_begins_where_the_one_before_it_ended(run_dir, monkeypatch):
    run = opened(settings(run_dir))
    monkeypatch.setattr(setup.steps, "find_step", lambda series, step: f"{series}/{step}")
    monkeypatch.setattr(setup.reading, "restore_params", lambda source, _: source)
    assert set(setup.initial_params(run, "grpo", {})) >= {"embed", "layers"}
    both = settings(run_dir, grpo={"steps": 4})
    both = from_dict({**to_dict(both), "sft": {"steps": 7}})
    run = setup.Run(both, run.directory, run.policy, run.data)
    assert setup.initial_params(run, "grpo", {}) == f"{run_dir}/checkpoints/sft/7"
    assert set(setup.initial_params(run, "sft", {})) >= {"embed", "layers"}
