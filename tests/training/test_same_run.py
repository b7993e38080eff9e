"""What may change between two starts of a run: settings that are free, and what is accepted."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
import typing

import pytest
from judges.test_local import write_model
from training.test_setup import opened, settings

from jlrm.config import Config, Part, UsageError
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.runtime.settings import load, to_dict
from jlrm.training import same_run, setup
from jlrm.training.same_run import HISTORY
from jlrm.weights import steps

ROOT = pathlib.Path(__file__).parent.parent.parent


def started(config: Config) -> setup.Run:
    """Start a run, and leave a checkpoint behind that says what it was made from."""
    run = opened(config)
    directory = steps.absolute(config.run.dir) / "checkpoints" / "grpo" / "2"
    meta = {
        "config": to_dict(run.config),
        "made_from": dict(run.made_from),
        "libraries": same_run.libraries(),
        "stage": "grpo",
        "step": 2,
    }
    for item in ("params", "meta"):
        (directory / item).mkdir(parents=True)
        (directory / item / "metadata").write_text(json.dumps(meta))
    return run


def history(directory: pathlib.Path) -> list[dict]:
    file = directory / HISTORY
    return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "r"


@pytest.mark.slow
def test_how_fast_and_how_long_it_learns_may_change_and_is_written_down(run_dir):
    started(settings(run_dir))
    opened(settings(run_dir))
    assert history(run_dir) == []
    rate = {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 1}
    changed = {"steps": 8, "optimizer": rate, "pack_tokens": 256}
    run = opened(settings(run_dir, grpo=changed, model={"remat": "dots"}))
    assert run.config.grpo.steps == 8
    (line,) = history(run_dir)
    assert line["after"] == "grpo/2" and line["changed"] == {
        "grpo.optimizer.learning_rate": [1e-6, 1e-3],
        "grpo.optimizer.schedule": ["constant", "linear"],
        "grpo.optimizer.warmup_steps": [0, 1],
        "grpo.pack_tokens": [0, 256],
        "grpo.steps": [4, 8],
        "model.remat": ["full", "dots"],
    }
    with pytest.raises(UsageError, match=r"another config \(grpo.optimizer.clip_norm 1.0 -> 2.0\)"):
        opened(settings(run_dir, grpo={"optimizer": {**rate, "clip_norm": 2.0}}))
    assert len(history(run_dir)) == 1


def other_rows(run_dir: pathlib.Path, config: Config) -> None:
    """Turn the gold of one training row round, in the file."""
    file = pathlib.Path(config.data.train)
    rows = list(map(json.loads, file.read_text().splitlines()))
    held_out = {row.question for row in opened(config).data.heldout.rows.mine}
    row = next(row for row in rows if row["question"] not in held_out)
    row["score_1"], row["score_2"] = row["score_2"], row["score_1"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_heldout(run_dir: pathlib.Path, config: Config) -> None:
    write_comparisons(toy.comparisons(seed=6, num_rows=8), pathlib.Path(config.data.eval))


def other_model(run_dir: pathlib.Path, config: Config) -> None:
    file = run_dir / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 5e5}))


def other_plugin(run_dir: pathlib.Path, config: Config) -> None:
    file = run_dir.parent / "my_reward.py"
    file.write_text(file.read_text().replace("1.0", "2.0"))


def other_base(run_dir: pathlib.Path, config: Config) -> None:
    file = next(pathlib.Path(config.model.path).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("train", other_rows),
        ("heldout", other_heldout),
        ("model", other_model),
        ("plugins", other_plugin),
        ("base", other_base),
    ],
)
def test_what_it_was_made_from_is_named_where_it_changed(part, change, run_dir, monkeypatch):
    own = {"data": {}, "model": {}, "reward": {}, "grpo": {"loss": {"kl_weight": 0.1}}}
    if part == "heldout":
        own["data"] = {"eval": str(run_dir.parent / "held.jsonl")}
        write_comparisons(toy.comparisons(seed=5, num_rows=8), run_dir.parent / "held.jsonl")
    if part == "base":
        base = run_dir.parent / "base"
        base.mkdir()
        write_model(base)
        own["model"] = {"path": str(base), "preset": "", "tokenizer": ""}
    if part == "plugins":
        text = "def pay(completions, **_):\n    return [1.0 for _ in completions]\n"
        (run_dir.parent / "my_reward.py").write_text(text)
        monkeypatch.syspath_prepend(run_dir.parent)
        own["reward"] = {"plugins": {"my_reward:pay": 1.0}}
    config = settings(run_dir, **own)
    started(config)
    opened(config)
    change(run_dir, config)
    with pytest.raises(UsageError, match=rf"newest checkpoint: {part} \(.*run.accept=\[{part}\]"):
        opened(config)
    assert history(run_dir) == []
    opened(settings(run_dir, **own, run={"dir": str(run_dir), "accept": [part]}))
    assert [line["accepted"] for line in history(run_dir)] == [[part]]


def test_a_base_that_nothing_reads_again_may_be_gone(run_dir):
    base = run_dir.parent / "base"
    base.mkdir()
    write_model(base)
    own = {"model": {"path": str(base), "preset": "", "tokenizer": ""}}
    own["grpo"] = {"loss": {"kl_weight": 0.0}}
    before = started(settings(run_dir, **own)).made_from
    other_base(run_dir, settings(run_dir, **own))
    assert opened(settings(run_dir, **own)).made_from == before
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    assert opened(settings(run_dir, **own)).made_from == before


def test_a_run_that_another_begins_from_is_taken_at_the_step_that_it_had(run_dir):
    earlier = run_dir.parent / "earlier"
    started(settings(earlier))
    own = {"model": {"path": str(earlier), "preset": "", "tokenizer": ""}}
    run = started(settings(run_dir, **own))
    assert run.config.model.path == f"{earlier}@grpo/2"
    later = earlier / "checkpoints" / "grpo"
    shutil.copytree(later / "2", later / "3")
    assert opened(settings(run_dir, **own)).config.model.path == f"{earlier}@grpo/2"
    for path in (f"{earlier}@2", f"{earlier}@best", f"{earlier}@grpo/2"):
        own["model"]["path"] = path
        assert opened(settings(run_dir, **own)).config.model.path == f"{earlier}@grpo/2"
    own["model"]["path"] = f"{earlier}@grpo/3"
    with pytest.raises(UsageError, match=r"another config \(model.path '.*@grpo/2' -> '.*@grpo/3'"):
        opened(settings(run_dir, **own))


def test_other_versions_of_what_computes_are_said_and_written_down(run_dir, monkeypatch, caplog):
    started(settings(run_dir))
    monkeypatch.setattr(same_run, "libraries", lambda: {"jax": "99.0"})
    with caplog.at_level(logging.WARNING):
        opened(settings(run_dir))
    assert "is 99.0: bits may differ" in caplog.text
    assert history(run_dir)[0]["libraries"]["jax"][1] == "99.0"


def test_the_parts_are_those_that_a_config_may_name():
    assert tuple(same_run.PARTS) == typing.get_args(Part)


@pytest.mark.parametrize("text", ["train,base", "[train, base]", "[ train , base ]", "train, base"])
def test_a_list_is_written_either_way(text):
    config = load(ROOT / "configs/quickstart.yaml", [f"run.accept={text}"])
    assert config.run.accept == ["train", "base"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rows", r"run.accept='rows' is not one of base, model, train, heldout, plugins"),
        ("{train: 1}", r"is not what was wanted: a list such as \[NAME, NAME\]"),
        ("3", r"a list such as"),
    ],
)
def test_a_wrong_list_is_one_sentence(text, said):
    with pytest.raises(UsageError, match=said):
        load(ROOT / "configs/quickstart.yaml", [f"run.accept={text}"])
