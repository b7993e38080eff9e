"""Configuration: every YAML loads, mistakes are answered, and no field is without effect."""

from __future__ import annotations

import ast
import dataclasses
import math
import pathlib
import re
import typing

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from jlrm import config
from jlrm.config import Config, LossConfig, UsageError
from jlrm.config.presets import PRESETS
from jlrm.runtime import settings
from jlrm.runtime.settings_help import all_meanings, describe_settings
from jlrm.studies import spec

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs/study").glob("judgelrm_*.yaml"))
# A slice in the head of a recipe: "#   v5e-8  --topology v5e:2x4  13.5 of 15.8  mesh.fsdp=4 ...",
# with more settings on lines that are set further in.
SLICE = re.compile(
    r"^#   (?:(\d) x )?v\S+ +--topology v\w+:(\S+)(?: --slices \d)? +\S+ of \S+"
    r"(.*(?:\n#     .*)*)$",
    re.M,
)
SMALLEST = {
    "run": {"dir": "somewhere"},
    "data": {"train": "toy"},
    "model": {"preset": "toy", "tokenizer": "toy"},
    "grpo": {"steps": 1},
}


def build(**sections) -> Config:
    merged = {name: {**SMALLEST.get(name, {}), **sections.get(name, {})} for name in SMALLEST}
    return settings.from_dict(
        {**merged, **{k: v for k, v in sections.items() if k not in SMALLEST}}
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_command_outcome_and_hardware(path):
    settings.load(path)
    head = path.read_text().split("\nrun:")[0]
    assert f"python -m jlrm.train --config configs/{path.name}" in head
    assert "Expected" in head and "Hardware" in head


def slices() -> list[tuple[pathlib.Path, int, str, list[str]]]:
    return [
        (path, int(number or 1), topology, words.replace("#", " ").split())
        for path in (*CONFIGS, *STUDIES)
        for number, topology, words in SLICE.findall(path.read_text())
    ]


@pytest.mark.parametrize(
    ("path", "number", "topology", "words"), slices(), ids=lambda each: str(each)[-30:]
)
def test_the_settings_of_a_slice_are_for_that_slice(path, number, topology, words):
    recipe = ROOT / spec.load(path).config if path in STUDIES else path
    mesh = settings.load(recipe, words).mesh
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    num_chips, given = number * math.prod(map(int, topology.split("x"))), math.prod(map(abs, sizes))
    assert mesh.data == number
    assert given == num_chips or (-1 in sizes and num_chips % given == 0)


def test_every_study_of_the_paper_names_a_slice():
    assert {path for path, *_ in slices()} >= set(STUDIES) and len(slices()) > 15


def test_saved_config_loads_back_equal(tmp_path):
    before = build(
        sampling={"stop_strings": {"</answer>": 2, "STOP": 1}}, grpo={"loss": {"clip_low": 0.3}}
    )
    settings.save(before, tmp_path / "c.yaml")
    assert settings.load(tmp_path / "c.yaml") == before


def test_numbers_that_yaml_reads_as_text_become_floats(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {dir: x}\ndata: {train: toy}\nmodel: {path: p}\n")
    loaded = settings.load(
        tmp_path / "c.yaml", ["grpo.steps=2", "grpo.optimizer.learning_rate=1e-6"]
    )
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
        (
            ["xyz=3"],
            "'xyz'. Known: run, data, model, lora, mesh, sampling, reward, sft, dpo, grpo, "
            "reward_model.",
        ),
        (["grpo.optimizer.lerning_rate=3"], "Did you mean 'learning_rate'?"),
        (["grpo.steps=many"], "grpo.steps='many' is not what was wanted: a whole number."),
        (["grpo.steps=1.5"], "grpo.steps=1.5 is not what was wanted: a whole number."),
        (["run.tensorboard=3"], "run.tensorboard=3 is not what was wanted: true or false."),
        (["run.seed=true"], "run.seed=True is not what was wanted: a whole number."),
        (["model.remat=some"], "model.remat='some' is not one of none, dots, attention, full."),
        (["steps"], "Got 'steps', wanted section.key=value"),
        (["run.dir.x=1"], "is not a section"),
        (["grpo=3"], "Section 'grpo' must hold keys and values, got 3."),
        (["grpo.steps=[1"], "is not valid YAML"),
        (["data.orders=both", "grpo.prompts=3"], "needs an even number of grpo.prompts"),
        (["reward.swap_consistency=1"], "set data.orders=both"),
        (["data.judging=single", "grpo.prompts=3"], "data.judging=single needs an even number"),
        (["data.judging=single", "data.orders=both"], "Set data.orders=given."),
        (["data.judging=single", "data.gold=majority"], "Set data.gold=given or shuffled."),
        (["preset=irpm", "reward.mode=judgelrm"], "reward.mode=judgelrm can't use"),
        (["preset=irpm", "dpo.steps=1"], "Set dpo.steps=0."),
        (["preset=remax", "grpo.zero_variance=skip"], "set grpo.zero_variance=keep"),
        (["data.judging=lists", "data.orders=both"], "lists of answers at once, which data.orders"),
        (["data.judging=lists", "data.gold=shuffled"], "Set data.gold=given."),
        (["data.judging=lists", "sft.swap=0.5"], "Set sft.swap=0."),
        (
            ["reward.swap_consistency=1", "data.orders=both", "reward.mode=none"],
            "withholds a reward, and reward.mode=none pays none",
        ),
        (["reward.mode=none"], "name a reward in reward.plugins"),
        (["reward.mode=judgelrm", "reward.brier=1"], "Use judgelrm_symmetric"),
        (["grpo.rollouts=1"], "grpo.rollouts=1 is too small: at least 2."),
        (["grpo.steps=-1"], "grpo.steps=-1 is too small"),
        (["grpo.steps=0"], "Nothing to train"),
        (["sampling.temperature=0"], "sampling.temperature=0"),
        (["grpo.steps=0", "dpo.steps=1", "sampling.temperature=0"], "and DPO learns nothing"),
        (["dpo.label_smoothing=0.5"], "Set it below 0.5."),
        (["dpo.label_smoothing=0.1", "dpo.loss=ipo"], "does not apply to dpo.loss=ipo"),
        (["sft.swap=1.5"], "sft.swap=1.5 is a share of the rows"),
        (["sft.reference=0.5"], "Set data.prompt=jlrm, or sft.reference=0."),
        (["dpo.beta=0"], "dpo.beta=0.0 is too small"),
        (["reward_model.steps=1", "run.best_metric=reward"], "a reward model writes none"),
        (["sampling.top_p=0"], "outside (0, 1]"),
        (["sampling.exact=true", "lora.rank=2"], "does not hold with adapters"),
        (["sampling.exact=true", "sampling.top_k=3"], "Set sampling.top_k=0"),
        (["sampling.exact=true", "sampling.slots=2"], "Set sampling.slots=0"),
        (["sampling.exact=true", "model.compute_dtype=float32"], "holds in bfloat16"),
        (["sampling.exact=true", "grpo.steps=0", "dpo.steps=1"], "is about GRPO"),
        (["grpo.minibatches=3"], "grpo.minibatches=3 does not divide grpo.prompts=16."),
        (["grpo.optimizer.nu_dtype=bfloat16"], "Lower b2 to 0.99, or keep float32."),
        (["sampling.weights=int8"], "set grpo.loss.importance_cap, e.g. 2.0."),
        (["grpo.ahead=stale"], "set grpo.loss.importance_cap, e.g. 2.0."),
        (
            ["grpo.ahead=stale", "grpo.loss.importance_cap=2", "grpo.zero_variance=resample"],
            "Set grpo.zero_variance to skip or keep.",
        ),
        (["grpo.loss.dual_clip=1.19"], "grpo.loss.dual_clip=1.19 must be 0 (off) or at least"),
        (
            ["grpo.loss.surrogate=cispo", "grpo.loss.dual_clip=3"],
            "does not apply to surrogate=cispo",
        ),
        (["grpo.loss.surrogate=geo_mean"], "set grpo.loss.ratio=sequence."),
        (
            ["grpo.loss.surrogate=clip_cov", "grpo.loss.ratio=sequence"],
            "clip_cov singles tokens out: set grpo.loss.ratio=token.",
        ),
        (["grpo.loss.gate_negative=0"], "gate_negative must be above 0"),
        (["grpo.loss.covariance_share=1.5"], "covariance_share=1.5 is above 1."),
        (["grpo.loss.importance_floor=0.5"], "is above grpo.loss.importance_cap=0.0."),
        (["grpo.advantage.kl_weight=1", "grpo.advantage.terms=apart"], "terms=summed, or use"),
        (["grpo.advantage.kl_weight=1", "grpo.loss.surrogate=kl_cov"], "Use grpo.loss.kl_weight."),
        (["grpo.advantage.orders=summed"], "set data.orders=both."),
        (["grpo.advantage.term_weights={format: 2}"], "set grpo.advantage.terms=apart."),
        (["preset=trll"], "preset='trll' is none. Did you mean 'trl'?"),
        (["preset="], "preset='' is none. Known: judgelrm, trl, verl, dapo,"),
        (["preset={trl: 1}"], "is none. Known: judgelrm"),
        (["preest=trl"], "Unknown key 'preest'. Did you mean 'preset'?"),
        (["preset=gspo", "grpo=3"], "Section 'grpo' must hold keys and values, got 3."),
        (["reward.overlong_share=0"], "outside (0, 1]"),
        (["grpo.surrogate=cispo"], "Unknown key 'grpo.surrogate'. Did you mean 'loss.surrogate'?"),
        (["grpo.loss=3"], "Section 'grpo.loss' must hold keys and values, got 3."),
        (["grpo={steps: 1, loss: 3, ratio: token}"], "Unknown key 'grpo.ratio'."),
        (["model.path=x"], "exactly one of model.path"),
        (["model.tokenizer="], "model.preset has no tokenizer"),
        (["data.gold=majority", "reward.mode=judgelrm"], "set reward.mode=judgelrm_symmetric."),
        (["reward.min_score=10"], "is not below"),
        (["sampling.stop_strings={'': 1}"], "stop_strings"),
        (["run.dir="], "run.dir is empty"),
        (["run.seed=-1"], "run.seed=-1 is too small: at least 0."),
        (["run.seed=100000000000000000000"], "run.seed is too large: at most 4294967295."),
        (["grpo.steps=3000000000"], "grpo.steps is too large: at most 2147483647."),
        (["grpo.steps=.inf"], "grpo.steps=inf is not what was wanted: a whole number."),
        (["grpo.steps=[1, 2]"], "grpo.steps=[1, 2] is not what was wanted: a whole number."),
        (["reward.format=.nan"], "reward.format=nan is not a finite number."),
        (["grpo.optimizer.learning_rate=.inf"], "learning_rate=inf is not a finite number."),
        (["data.columns=question"], "data.columns='question' is not pairs such as NAME=VALUE"),
        (["data.columns=3"], "data.columns=3 is not what was wanted: pairs such as {NAME: VALUE}"),
        (["run.dir=2001-99-99"], "is not valid YAML: month must be in 1..12"),
        (["run.dir=" + "[" * 2000], "The value of 'run.dir=[[["),
        (["run.best_metric=agreeement"], "run.best_metric='agreeement' is not one of agreement,"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(tmp_path, overrides, message):
    settings.save(build(), tmp_path / "c.yaml")
    with pytest.raises(UsageError) as error:
        settings.load(tmp_path / "c.yaml", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text", ["2024_05_01", "2024.10", "0100", "2024-05-01", "1:30", "0x10", "1e3", "007", "-0"]
)
def test_a_name_that_yaml_would_take_for_a_number_keeps_its_spelling(tmp_path, text):
    settings.save(build(), tmp_path / "c.yaml")
    config = settings.load(tmp_path / "c.yaml", [f"run.dir={text}", f"run.resume={text}"])
    assert (config.run.dir, config.run.resume) == (text, text)
    tree = settings.parse_yaml(f"run: {{dir: {text}}}", "a file")
    assert str(tree["run"]["dir"]) == text


@pytest.mark.parametrize(
    ("text", "value"), [("1_000", 1000), ("+5", 5), ("5", 5), ("-0", 0), ("1000", 1000)]
)
def test_a_number_may_be_spelt_as_python_does(tmp_path, text, value):
    settings.save(build(), tmp_path / "c.yaml")
    config = settings.load(tmp_path / "c.yaml", [f"grpo.steps={text}", "sft.steps=1"])
    assert config.grpo.steps == value
    for rate in ("1e-6", "1.0e-06", ".000001", "1E-6"):
        overrides = [f"grpo.optimizer.learning_rate={rate}"]
        assert settings.load(tmp_path / "c.yaml", overrides).grpo.optimizer.learning_rate == 1e-6


def test_missing_files_and_keys_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"Cannot read the config file .*none.yaml"):
        settings.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"'run\.dir' is not set"):
        settings.from_dict({"data": {"train": "toy"}})
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match="must hold sections"):
        settings.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("run: {dir: [}\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        settings.load(tmp_path / "broken.yaml")
    (tmp_path / "old.yaml").write_bytes("run: {dir: Prüfung}\n".encode("cp1252"))
    with pytest.raises(UsageError, match=r"old\.yaml is not UTF-8 text"):
        settings.load(tmp_path / "old.yaml")
    (tmp_path / "twice.yaml").write_text("grpo: {steps: 1}\nrun: {dir: x}\ngrpo: {prompts: 8}\n")
    with pytest.raises(UsageError, match=r"twice\.yaml, line 3 .*: the key 'grpo' stands twice\."):
        settings.load(tmp_path / "twice.yaml")
    with pytest.raises(UsageError, match=r"Cannot read the config file .*: Is a directory"):
        settings.load(tmp_path)


@pytest.mark.parametrize(
    "spelling",
    ["{answer_1: left, answer_2: right}", "answer_1=left,answer_2=right"],
)
def test_columns_have_two_spellings(tmp_path, spelling):
    settings.save(build(), tmp_path / "c.yaml")
    loaded = settings.load(tmp_path / "c.yaml", [f"data.columns={spelling}"])
    assert loaded.data.columns == {"answer_1": "left", "answer_2": "right"}
    assert settings.parse_pairs(spelling, "--columns") == loaded.data.columns


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    SCALARS | st.sampled_from(["grpo", "steps", "run", "1e-6", "a=b", "toy"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["steps", "optimizer", "dir", "train"]), inner)
        | st.dictionaries(SCALARS, inner, max_size=2)
    ),
    max_leaves=8,
)


def keys_of(section: type, where: str = "") -> list[str]:
    keys = []
    for name, kind in typing.get_type_hints(section).items():
        keys.append(config.dotted(where, name))
        keys += keys_of(kind, keys[-1]) if dataclasses.is_dataclass(kind) else []
    return keys


def check_config_or_sentence(path: pathlib.Path, overrides: tuple[str, ...] = ()) -> None:
    """Load; anything but a config or one short sentence is an error of the test."""
    try:
        assert isinstance(settings.load(path, overrides), Config)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


@pytest.mark.slow
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(key=st.sampled_from(keys_of(Config)), value=TREES)
def test_any_tree_is_a_config_or_a_sentence(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    tree = {name: dict(fields) for name, fields in SMALLEST.items()}
    *sections, name = key.split(".")
    inner: dict = tree
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    check_config_or_sentence(path)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(content=st.binary() | st.text().map(lambda text: text.encode(errors="replace")))
def test_any_file_is_a_config_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    check_config_or_sentence(path)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    key=st.sampled_from(keys_of(Config)) | st.text(max_size=6),
    value=st.text(max_size=12) | st.sampled_from(["!!int _", "2001-99-99", "&a [*a]", "1e999"]),
)
def test_any_override_is_a_config_or_a_sentence(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "smallest.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    check_config_or_sentence(path, (f"{key}={value}",))


def test_a_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    settings.save(build(), tmp_path / "c.yaml")
    before = (tmp_path / "c.yaml").read_bytes()

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError):
        settings.save(build(run={"seed": 3}), tmp_path / "c.yaml")
    assert (tmp_path / "c.yaml").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_the_dual_clip_may_be_as_low_as_the_upper_clip():
    assert build(grpo={"loss": {"dual_clip": 1.2}}).grpo.loss.dual_clip == 1.2


MOVED_VALUES = {
    "ratio": "sequence",
    "clip_low": 0.3,
    "clip_high": 0.4,
    "dual_clip": 5.0,
    "aggregation": "fixed_length",
    "importance_cap": 2.0,
    "mask_truncated": True,
    "kl_weight": 0.5,
    "entropy_weight": 0.25,
}


def test_settings_of_the_loss_are_read_under_their_old_names(tmp_path):
    present = build(grpo={"steps": 1, "loss": MOVED_VALUES})
    assert present.grpo.loss == dataclasses.replace(LossConfig(), **MOVED_VALUES)
    given = {"steps": 1, **MOVED_VALUES}
    assert build(grpo=given) == present
    assert given == {"steps": 1, **MOVED_VALUES}  # the caller's own stays as it was
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({**SMALLEST, "grpo": given}))
    assert settings.load(tmp_path / "old.yaml") == present
    settings.save(build(), tmp_path / "c.yaml")
    overrides = [f"grpo.{name}={value}" for name, value in MOVED_VALUES.items()]
    assert settings.load(tmp_path / "c.yaml", overrides) == present
    assert set(settings.MOVED) == {
        *(f"grpo.{name}" for name in MOVED_VALUES),
        "grpo.advantage_scale",
        "grpo.advantage_eps",
    }


def test_settings_of_the_advantage_are_read_under_their_old_names(tmp_path):
    present = build(grpo={"steps": 1, "advantage": {"scale": "batch", "eps": 0.5}})
    assert build(grpo={"steps": 1, "advantage_scale": "batch", "advantage_eps": 0.5}) == present
    settings.save(build(), tmp_path / "c.yaml")
    old = ["grpo.advantage_scale=batch", "grpo.advantage_eps=0.5"]
    assert settings.load(tmp_path / "c.yaml", old) == present
    with pytest.raises(UsageError, match=r"grpo\.advantage_eps is the old name of"):
        build(grpo={"advantage_eps": 1.0, "advantage": {"eps": 1.0}})


@pytest.mark.parametrize("in_file", ["clip_low: 0.3", "loss: {clip_low: 0.3}"])
@pytest.mark.parametrize("override", ["grpo.clip_low=0.1", "grpo.loss.clip_low=0.1"])
def test_an_override_wins_in_either_spelling(tmp_path, in_file, override):
    head = yaml.safe_dump({name: part for name, part in SMALLEST.items() if name != "grpo"})
    (tmp_path / "c.yaml").write_text(f"{head}grpo: {{steps: 1, {in_file}}}\n")
    assert settings.load(tmp_path / "c.yaml").grpo.loss.clip_low == 0.3
    assert settings.load(tmp_path / "c.yaml", [override]).grpo.loss.clip_low == 0.1


def test_one_file_may_not_use_both_names_of_a_setting():
    both = r"grpo\.clip_low is the old name of grpo\.loss\.clip_low, and both are given"
    with pytest.raises(UsageError, match=both):
        build(grpo={"clip_low": 0.3, "loss": {"clip_low": 0.3}})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config_that_differs_from_the_defaults(name):
    chosen = build(preset=name)
    assert chosen != build()
    flat = settings.flatten(settings.to_dict(chosen))
    assert {key: flat[key] for key in PRESETS[name]} == PRESETS[name]


def test_the_table_of_the_loss_names_every_preset():
    text = (ROOT / "README.md").read_text()
    table = text.partition("### The loss")[2].partition("\n\n* ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name.strip(" `") for row in rows for name in row.split(",")] == list(PRESETS)


def test_a_preset_gives_way_to_the_file_and_comes_before_other_overrides(tmp_path):
    head = {name: part for name, part in SMALLEST.items() if name != "grpo"}
    given = {"steps": 1, "loss": {"clip_high": 0.5}, "rollouts": 4}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**head, "preset": "dapo", "grpo": given}))
    loaded = settings.load(file)
    assert loaded.grpo.loss.clip_high == 0.5 and loaded.grpo.rollouts == 4  # the file's own
    assert loaded.grpo.loss.dual_clip == 10.0 and loaded.grpo.zero_variance == "resample"
    over = settings.load(file, ["grpo.loss.clip_low=0.1", "preset=trl"])
    assert over.grpo.loss.clip_high == 0.2 and over.grpo.rollouts == 8  # the preset over the file
    assert over.grpo.loss.clip_low == 0.1  # whatever the order
    assert over.grpo.zero_variance == "keep" and over.grpo.max_draws == 10


def test_of_several_presets_the_last_wins(tmp_path):
    both = build(preset=["trl", "gspo"])
    assert both.grpo.advantage.eps == 1e-4 and both.grpo.loss.clip_high == 4e-4
    assert build(preset="trl,gspo") == both
    settings.save(build(), tmp_path / "c.yaml")
    values = [f"{key}={value}" for key, value in (PRESETS["trl"] | PRESETS["gspo"]).items()]
    assert settings.load(tmp_path / "c.yaml", ["preset=trl,gspo"]) == settings.load(
        tmp_path / "c.yaml", values
    )


def test_a_saved_config_holds_what_its_preset_stood_for(tmp_path):
    settings.save(build(preset="verl"), tmp_path / "c.yaml")
    assert "preset: verl" not in (tmp_path / "c.yaml").read_text()
    assert settings.load(tmp_path / "c.yaml") == build(preset="verl")


def test_help_tells_every_setting_with_default_choices_and_meaning():
    text = "\n".join(describe_settings())
    for key in keys_of(Config):
        assert f"  {key}=" in text or f"  {key}." in text or f"{key}:\n" in text, key
    words = " ".join(text.split())
    assert "grpo.rollouts=8 Completions of each prompt (whole number, at least 2)" in words
    assert "sft.optimizer.learning_rate=2e-05" in words and "run.seed=0" in words
    assert "run.tensorboard=true" in words and "run.dir= " in words and "(must be set)" in words
    assert "data.overlong=skip" in words and "(skip | refuse)" in words
    assert "sampling.stop_strings={</answer>: 2}" in words
    assert max(map(len, text.splitlines())) <= 100


def test_every_setting_has_a_meaning():
    meanings = all_meanings()
    without = {key for key, meaning in meanings.items() if not meaning}
    sections = {("Config", field.name) for field in dataclasses.fields(Config)}
    stages = ("SFTConfig", "DPOConfig", "GRPOConfig", "RewardModelConfig")
    sections |= {*((stage, "optimizer") for stage in stages), ("GRPOConfig", "loss")}
    sections |= {("GRPOConfig", "advantage")}
    assert without <= sections


def test_every_field_is_read_by_some_code():
    """A field that nothing but config/ and its reader reads would have no effect."""
    read = set()
    for path in (ROOT / "jlrm").rglob("*.py"):
        if path.parent.name == "config" or path.name in ("settings.py", "settings_help.py"):
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
