"""Configuration: every YAML loads, mistakes are answered, and no field is without effect."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import typing

import pytest

from jlrm import config
from jlrm.config import Config, UsageError

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALLEST = {
    "run": {"dir": "somewhere"},
    "data": {"train": "toy"},
    "model": {"preset": "toy", "tokenizer": "toy"},
    "grpo": {"steps": 1},
}


def build(**sections) -> Config:
    merged = {name: {**SMALLEST.get(name, {}), **sections.get(name, {})} for name in SMALLEST}
    return config.from_dict({**merged, **{k: v for k, v in sections.items() if k not in SMALLEST}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_its_command(path):
    config.load(path)
    head = path.read_text().split("\nrun:")[0]
    assert f"configs/{path.name}" in head and "Expected" in head


def test_saved_config_loads_back_equal(tmp_path):
    before = build(sampling={"stop_strings": {"</answer>": 2, "STOP": 1}}, grpo={"clip_low": 0.3})
    config.save(before, tmp_path / "c.yaml")
    assert config.load(tmp_path / "c.yaml") == before


def test_numbers_that_yaml_reads_as_text_become_floats(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {dir: x}\ndata: {train: toy}\nmodel: {path: p}\n")
    loaded = config.load(tmp_path / "c.yaml", ["grpo.steps=2", "grpo.optimizer.learning_rate=1e-6"])
    assert loaded.grpo.optimizer.learning_rate == 1e-6


def test_a_section_keeps_its_own_defaults_when_one_field_is_given():
    loaded = build(sft={"optimizer": {"warmup_steps": 3}})
    assert loaded.sft.optimizer.learning_rate == 2e-5
    assert loaded.grpo.optimizer.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.stesp=3"], "Unknown key 'grpo.stesp'. Did you mean 'steps'?"),
        (["grp.steps=3"], "Unknown key 'grp'. Did you mean 'grpo'?"),
        (["grpo.optimizer.lerning_rate=3"], "Did you mean 'learning_rate'?"),
        (["grpo.steps=many"], "grpo.steps='many' is not what was wanted: a whole number."),
        (["grpo.steps=1.5"], "grpo.steps=1.5 is not what was wanted: a whole number."),
        (["run.tensorboard=3"], "run.tensorboard=3 is not what was wanted: true or false."),
        (["run.seed=true"], "run.seed=True is not what was wanted: a whole number."),
        (["model.remat=some"], "model.remat='some' is not one of none, dots, full."),
        (["steps"], "Got 'steps', wanted section.key=value"),
        (["run.dir.x=1"], "is not a section"),
        (["grpo=3"], "Section 'grpo' must hold keys and values, got 3."),
        (["grpo.steps=[1"], "is not valid YAML"),
        (["data.orders=both", "grpo.prompts=3"], "needs an even number of grpo.prompts"),
        (["reward.swap_consistency=1"], "set data.orders=both"),
        (
            ["reward.swap_consistency=1", "data.orders=both", "reward.mode=none"],
            "takes back what reward.mode=none does not pay",
        ),
        (["reward.mode=none"], "name a reward in reward.plugins"),
        (["reward.mode=judgelrm", "reward.brier=1"], "Use judgelrm_symmetric"),
        (["grpo.rollouts=1"], "grpo.rollouts=1 is too small: at least 2."),
        (["grpo.steps=-1"], "grpo.steps=-1 is too small"),
        (["grpo.steps=0"], "Nothing to train"),
        (["sampling.temperature=0"], "sampling.temperature=0"),
        (["sampling.top_p=0"], "outside (0, 1]"),
        (["grpo.minibatches=3"], "grpo.minibatches=3 does not divide grpo.prompts=16."),
        (["grpo.optimizer.nu_dtype=bfloat16"], "Lower b2 to 0.99, or keep float32."),
        (["sampling.weights=int8"], "set grpo.importance_cap, e.g. 2.0."),
        (["grpo.ahead=stale"], "set grpo.importance_cap, e.g. 2.0."),
        (
            ["grpo.ahead=stale", "grpo.importance_cap=2", "grpo.zero_variance=resample"],
            "Use skip or keep.",
        ),
        (["grpo.dual_clip=1.1"], "grpo.dual_clip=1.1"),
        (["model.path=x"], "exactly one of model.path"),
        (["model.tokenizer="], "model.preset has no tokenizer"),
        (["reward.min_score=10"], "is not below"),
        (["sampling.stop_strings={'': 1}"], "stop_strings"),
        (["run.dir="], "run.dir is empty"),
        (["run.best_metric=agreeement"], "run.best_metric='agreeement' is not one of agreement,"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(tmp_path, overrides, message):
    config.save(build(), tmp_path / "c.yaml")
    with pytest.raises(UsageError) as error:
        config.load(tmp_path / "c.yaml", overrides)
    assert message in str(error.value)


def test_missing_files_and_keys_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"Cannot read the config file .*none.yaml"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"'run\.dir' is not set"):
        config.from_dict({"data": {"train": "toy"}})
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match="must hold sections"):
        config.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("run: {dir: [}\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        config.load(tmp_path / "broken.yaml")


def test_every_field_is_read_by_some_code():
    """A field that no code outside config.py reads would be a setting without effect."""
    read = set()
    for path in (ROOT / "jlrm").rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    fields = set()
    sections = [Config]
    while sections:
        section = sections.pop()
        for name, kind in typing.get_type_hints(section).items():
            if dataclasses.is_dataclass(kind):
                sections.append(kind)
            fields.add(name)
    assert fields - read == set()
