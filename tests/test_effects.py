"""Every setting has an effect: each field of the config is changed, and what is observed changes.

`CHANGES` says for each field to which value, and what else must be set for it to matter (in both
observations). A field without an entry fails. Nearly all are observed by a whole run of a tiny
model: its directory, the numbers it logs, and the programs it compiles. The tables of rewards and
optimisers, sections that a run hands on whole, are observed by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from programs import Programs
from safetensors.numpy import save_file

from jlrm import train
from jlrm.config import Config, MeshConfig, OptimizerConfig, RewardConfig, RunError, UsageError
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.judgement import rewards
from jlrm.runtime import hosts
from jlrm.runtime import mesh as mesh_module
from jlrm.runtime.settings import load
from jlrm.training import same_run, update
from jlrm.training.stage import is_compiled_ahead
from jlrm.weights import presets

QUICKSTART = pathlib.Path(__file__).parent.parent / "configs/quickstart.yaml"


class Change(NamedTuple):
    """Another value of a field, and overrides without which it would not matter."""

    to: Any
    given: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # overrides that the other value needs, and the first can't have
    by_programs: bool = False  # the numbers stay as they are: what is compiled changes


def pay(completions: list[str], **_: Any) -> list[float]:
    """Pay any text, so that rewards differ: a model that has learnt nothing writes no verdict."""
    return [len(set(text)) / 8 for text in completions]


def pay_more(completions: list[str], **_: Any) -> list[float]:
    return [1.0 + 2.0 * value for value in pay(completions)]


EVERY_STEP = ("run.save_every=1", "run.eval_every=1", "grpo.steps=3")
DPO = ("dpo.steps=2", "dpo.batch_size=2", "grpo.steps=1")
WRITTEN = (*DPO, "dpo.pairs=verdicts")
SCORED = ("reward_model.steps=2", "reward_model.batch_size=2", "grpo.steps=1")
REFERENCES = (
    *("data.train={folder}/references.jsonl", "model.tokenizer={folder}/chat", "data.prompt=jlrm"),
    *("data.max_prompt_tokens=700", "grpo.steps=0"),
)
NO_REWARDS = ("reward.plugins={{}}",)  # all groups are uniform
TWO_REWARDS = ("reward.plugins={{'test_effects:pay': 1.0, 'test_effects:pay_more': 1.0}}",)
CLIP_COV = ("grpo.loss.surrogate=clip_cov", "grpo.loss.covariance_share=1")
JUDGELM = ("data.train={folder}/judgelm.jsonl",)
OPTIMIZER = {
    "learning_rate": Change(0.5),
    "schedule": Change("cosine"),
    "warmup_steps": Change(3),
    "b1": Change(0.5),
    "b2": Change(0.5),
    "mu_dtype": Change("bfloat16"),
    "nu_dtype": Change("bfloat16", ("b2=0.9",)),
    "eps": Change(0.1),
    "weight_decay": Change(0.5),
    "clip_norm": Change(0.01),
}
STAGES = ("sft", "dpo", "grpo", "reward_model")
REWARD = {
    "mode": Change("judgelrm"),
    "format": Change(3.0),
    "out_of_range": Change(3.0),
    "malformed": Change(3.0),
    "no_verdict": Change(3.0),
    "relation": Change(3.0),
    "wrong_relation": Change(3.0),
    "preference": Change(3.0),
    "wrong_preference": Change(3.0),
    "absolute_exact": Change(3.0),
    "absolute_near": Change(3.0),
    "near_distance": Change(4.0),
    "confidence": Change(3.0),
    "brier": Change(0.5),
    "certain_margin": Change(2.0, ("brier=0.5",)),
    "swap_consistency": Change(0.5),
    "length": Change(0.2),
    "length_tokens": Change(10, ("length=0.2",)),
    "overlong": Change(-1.0),
    "overlong_share": Change(1.0, ("overlong=-1.0",)),
    "limit": Change(-1.0),
    "min_score": Change(3),
    "max_score": Change(7),
}
CHANGES = {
    "run.dir": Change("{folder}/elsewhere"),
    "run.seed": Change(1),
    "run.save_every": Change(1),
    "run.accept": Change("[train]"),
    "run.resume": Change("grpo/1"),  # where nothing is saved
    "run.keep_last": Change(1, ("run.save_every=1", "run.keep_best=0", "grpo.steps=3")),
    "run.keep_best": Change(0, (*EVERY_STEP, "run.keep_last=1", "run.best_metric=reward")),
    "run.best_metric": Change("reward", (*EVERY_STEP, "run.keep_last=1")),
    "run.eval_every": Change(1),
    "run.completions_every": Change(0),
    "run.stop_on": Change("[no_verdict]", ("grpo.steps=6",)),
    "run.host_timeout": Change(7),
    "run.precompile": Change("always"),
    "run.tensorboard": Change(True),
    "run.wandb_project": Change("somewhere"),
    "model.path": Change("{earlier}", also=("model.preset=", "model.tokenizer=")),
    "model.preset": Change("wider"),
    "model.adapter": Change(
        "{folder}/adapter", ("model.path={earlier}", "model.preset=", "model.tokenizer=")
    ),
    "model.tokenizer": Change("{tokenizer}"),
    "model.param_dtype": Change("bfloat16"),
    "model.compute_dtype": Change("bfloat16"),
    "model.remat": Change("none", by_programs=True),
    "lora.rank": Change(2),
    "lora.alpha": Change(1.0, ("lora.rank=2",)),
    "lora.rank_stabilised": Change(True, ("lora.rank=2",)),
    "lora.targets": Change("[q, down]", ("lora.rank=2",)),
    "lora.base": Change("nf4", ("lora.rank=2",)),
    "lora.magnitude": Change(True, ("lora.rank=2",)),
    "mesh.data": Change(2),
    "mesh.fsdp": Change(1, also=("mesh.data=-1",)),
    "mesh.tensor": Change(2),
    "data.train": Change("{folder}/other.jsonl"),
    "data.eval": Change("{folder}/other.jsonl"),
    "data.eval_rows": Change(3),
    "data.folding": Change("text"),
    "data.gold": Change("shuffled"),
    "data.columns": Change("{{answer_1: answer_2, answer_2: answer_1}}"),
    "data.values": Change(
        "{{0: 0, 1: 2, 2: 1}}", ("data.train={folder}/preferences.jsonl", "sft.steps=0")
    ),
    "data.scores": Change(
        "score_w_reference", ("data.train={folder}/judgelm.jsonl", "sft.steps=0")
    ),
    "data.rescale": Change("{{0: 1, 5: 10}}"),
    "data.prompt": Change("jlrm", ("data.max_prompt_tokens=700", "grpo.steps=0")),
    "data.orders": Change("both"),
    "data.judging": Change("single", ("sft.steps=0",)),
    "data.max_prompt_tokens": Change(36),
    "data.overlong": Change("refuse", ("data.max_prompt_tokens=36",)),
    "sampling.max_new_tokens": Change(7),
    "sampling.temperature": Change(0.7),
    "sampling.top_k": Change(3),
    "sampling.top_p": Change(0.5),
    "sampling.weights": Change("int8", ("grpo.loss.importance_cap=2",)),
    "sampling.slots": Change(1, by_programs=True),
    "sampling.exact": Change(True, ("model.compute_dtype=bfloat16", "grpo.epochs=1")),
    # A model that has learnt nothing never ends its reasoning, behind which they count.
    "sampling.stop_strings": Change("{{a: 1, e: 1, o: 1}}", by_programs=True),
    "sampling.eval_temperature": Change(1.0),
    "sampling.eval_batch_size": Change(2, by_programs=True),
    "reward.plugins": Change("{{'test_effects:pay_more': 1.0}}"),
    "sft.steps": Change(2),
    "sft.batch_size": Change(2),
    "sft.pack_tokens": Change(128),
    "sft.max_target_tokens": Change(20),
    "sft.reasoning": Change("after"),
    "sft.swap": Change(0.9),
    "sft.reference": Change(0.9, REFERENCES),
    "dpo.steps": Change(1, ("dpo.batch_size=2", "dpo.rollouts=2")),
    "dpo.pairs": Change("answers", DPO),
    "dpo.batch_size": Change(3, DPO),
    "dpo.rollouts": Change(3, DPO),
    "dpo.pack_tokens": Change(256, (*WRITTEN, "dpo.batch_size=6", "dpo.max_target_tokens=32")),
    "dpo.max_target_tokens": Change(12, (*DPO, "dpo.pairs=answers")),
    "dpo.loss": Change("ipo", WRITTEN),
    "dpo.beta": Change(0.5, WRITTEN),
    "dpo.label_smoothing": Change(0.2, WRITTEN),
    "dpo.reference": Change("none", WRITTEN),
    "reward_model.steps": Change(1),
    "reward_model.kind": Change("cross", SCORED),
    "reward_model.batch_size": Change(3, SCORED),
    "reward_model.pack_tokens": Change(128, (*SCORED, "reward_model.batch_size=12")),
    "reward_model.max_target_tokens": Change(8, SCORED),
    "grpo.steps": Change(1),
    "grpo.prompts": Change(4),
    "grpo.rollouts": Change(3),
    "grpo.epochs": Change(1),
    "grpo.minibatches": Change(2),
    "grpo.pack_tokens": Change(128, ("grpo.prompts=8",)),
    "grpo.advantage.baseline": Change("leave_one_out"),
    "grpo.advantage.scale": Change("none"),
    "grpo.advantage.eps": Change(0.1),
    "grpo.advantage.whiten": Change("rows"),
    "grpo.advantage.orders": Change("summed", ("data.orders=both",)),
    "grpo.advantage.kl_weight": Change(0.5),
    "grpo.advantage.terms": Change("apart", TWO_REWARDS),
    "grpo.advantage.term_weights": Change("{{pay: 3.0}}", ("grpo.advantage.terms=apart",)),
    "grpo.zero_variance": Change("skip"),
    "grpo.max_draws": Change(2, ("grpo.zero_variance=resample", *NO_REWARDS)),
    "grpo.importance_terms": Change("all", ("grpo.loss.importance_cap=0.5",)),
    "grpo.ahead": Change("stale", ("grpo.loss.importance_cap=2",)),
    "grpo.loss.surrogate": Change("cispo"),
    "grpo.loss.ratio": Change("sequence"),
    "grpo.loss.clip_low": Change(0.01),
    "grpo.loss.clip_high": Change(0.01),
    "grpo.loss.dual_clip": Change(1.21),
    "grpo.loss.gate_positive": Change(3.0, ("grpo.loss.surrogate=sapo",)),
    "grpo.loss.gate_negative": Change(3.0, ("grpo.loss.surrogate=sapo",)),
    "grpo.loss.covariance_share": Change(0.5, ("grpo.loss.surrogate=kl_cov",)),
    "grpo.loss.covariance_low": Change(0.0, CLIP_COV),
    "grpo.loss.covariance_high": Change(0.0, (*CLIP_COV, "grpo.loss.covariance_low=-9")),
    "grpo.loss.covariance_kl": Change(9.0, ("grpo.loss.surrogate=kl_cov",)),
    "grpo.loss.aggregation": Change("sequence_sum"),
    "grpo.loss.importance_cap": Change(0.5),
    "grpo.loss.importance_floor": Change(1.5, ("grpo.loss.importance_cap=2",)),
    "grpo.loss.importance_outside": Change("mask", ("grpo.loss.importance_cap=0.5",)),
    "grpo.loss.importance_ratio": Change(
        "sequence", ("grpo.ahead=stale", "grpo.loss.importance_cap=2")
    ),
    "grpo.loss.mask_truncated": Change(True),
    "grpo.loss.kl_weight": Change(0.5),
    "grpo.loss.kl_estimator": Change("k2"),
    "grpo.loss.kl_correction": Change("ratio"),
    "grpo.loss.entropy_weight": Change(0.5),
    **{f"reward.{name}": change for name, change in REWARD.items()},
    **{f"{s}.optimizer.{name}": c for s in STAGES for name, c in OPTIMIZER.items()},
}


def fields(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field."""
    for name, kind in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


# --- Observing a whole run ---


class Recorded(Programs):
    """Equal programs are compiled once, and what they are, recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def made(self, function: Callable, options: Any) -> Any:
        return self._recording(super().made(function, options))

    def _recording(self, program: Any) -> Any:
        texts: dict[Any, str] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            form = tree, tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
            if form not in texts:
                text = str(program.trace(*args, **kwargs).jaxpr)
                texts[form] = hashlib.sha256(re.sub("0x[0-9a-f]+", "", text).encode()).hexdigest()
            self.used.add(texts[form])
            return program(*args, **kwargs)

        call.lower = program.lower  # type: ignore[attr-defined]
        return call


@pytest.fixture(scope="module")
def observe(tmp_path_factory):
    """Return a function: overrides -> what a run with them shows, each run only once."""
    base = tmp_path_factory.mktemp("effects")
    with pytest.MonkeyPatch.context() as patch:
        programs = Recorded()
        patch.setattr(jax, "jit", programs)
        patch.setattr(update, "make_optimizer", functools.cache(update.make_optimizer))
        patch.setattr(train.run_page, "write_report", lambda *_: None)  # two seconds of drawing
        tiny = dataclasses.replace(
            presets.PRESETS["toy"], num_hidden_layers=1, hidden_size=16, intermediate_size=16,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )  # fmt: skip
        wider = dataclasses.replace(tiny, intermediate_size=32)
        patch.setattr(presets, "PRESETS", {"toy": tiny, "wider": wider})
        patch.setitem(sys.modules, "wandb", wandb(base))
        write_files(base)
        seen: dict[tuple[str, ...], dict[str, Any]] = {}
        numbers = itertools.count()

        def observe(*overrides: str) -> dict[str, Any]:
            if overrides not in seen:
                programs.used = set()
                folder = base / f"run{next(numbers)}"
                folder.mkdir()
                seen[overrides] = observed(folder, base, programs, overrides)
            return seen[overrides]

        observe()
        (base / "earlier").symlink_to(base / "run0" / "run")
        yield observe


def wandb(base: pathlib.Path) -> types.ModuleType:
    """A stand-in that leaves a file in the folder of the run."""
    module = types.ModuleType("wandb")

    def init(*, dir: Any = None, **_: Any) -> Any:
        (pathlib.Path(dir) / "was_told").touch()
        ignore = lambda *_, **__: None  # noqa: E731
        return types.SimpleNamespace(log=ignore, finish=ignore, define_metric=ignore, id="0")

    module.init = init  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    return module


def write_files(base: pathlib.Path) -> None:
    rows = toy.comparisons(seed=3, num_rows=24)
    write_comparisons(rows, base / "train.jsonl")
    write_comparisons(toy.comparisons(seed=5, num_rows=24), base / "other.jsonl")
    known = [
        dataclasses.replace(row, meta={**row.meta, "reference": "All the words."}) for row in rows
    ]
    write_comparisons(known, base / "references.jsonl")
    labels = [
        dataclasses.replace(row, score_1=None, score_2=None, preference=row.label) for row in rows
    ]
    write_comparisons(labels, base / "preferences.jsonl")
    judgelm = [
        {
            "question_id": i,
            "question_body": row.question,
            "answer1_body": row.answer_1,
            "answer2_body": row.answer_2,
            "score": [{"logprobs": None}, *row.scores][1:],
            "score_w_reference": [row.scores[1] + 1, row.scores[0]],
        }
        for i, row in enumerate(rows)
    ]
    lines = [json.dumps(row) for row in judgelm]
    (base / "judgelm.jsonl").write_text("\n".join(lines) + "\n")
    toy.save_tokenizer(base / "chat")
    chat = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    (base / "chat/chat_template.jinja").write_text(chat)
    (base / "adapter").mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (base / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    held = {f"{name}A.weight": np.ones((2, 16), np.float32)}
    held[f"{name}B.weight"] = np.ones((16, 2), np.float32)
    save_file(held, base / "adapter" / "adapter_model.safetensors")
    (base / "tokenizer").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "VOCAB_SIZE", 400)
        toy.save_tokenizer(base / "tokenizer")


def observed(folder, base, programs, overrides) -> dict[str, Any]:
    settings = {
        "run": {"dir": str(folder / "run"), "eval_every": 0, "tensorboard": False},
        "model": {"preset": "toy", "tokenizer": "toy", "compute_dtype": "float32"},
        "data": {"train": str(base / "train.jsonl"), "prompt": "toy", "max_prompt_tokens": 48,
                 "eval_rows": 2},
        "sampling": {"max_new_tokens": 8, "eval_batch_size": 8},
        "reward": {"plugins": {"test_effects:pay": 1.0}},
        "sft": {"steps": 1, "batch_size": 3, "max_target_tokens": 48},
        "grpo": {"steps": 2, "prompts": 2, "rollouts": 2, "epochs": 2,
                 "optimizer": {"learning_rate": 3e-2, "eps": 1e-4}},
    }  # fmt: skip
    (folder / "settings.yaml").write_text(json.dumps(settings))
    places = {"folder": base, "earlier": base / "earlier", "tokenizer": base / "tokenizer"}
    overrides = [text.format(**places, own=folder) for text in overrides]
    config = load(folder / "settings.yaml", overrides)
    message = ""
    try:
        train.train(config, jax.devices()[:1])
    except (UsageError, RunError) as error:
        message = str(error)
    run_dir = pathlib.Path(config.run.dir)
    return {
        "error": message.replace(str(run_dir), ""),
        "values": {
            "files": files(run_dir),
            "where": run_dir.name,
            "metrics": metrics(run_dir / "metrics.jsonl"),
            "texts": [table(path) for path in sorted(run_dir.glob("completions/*.parquet"))],
            "dropped": [path.read_text() for path in sorted(run_dir.glob("dropped*.jsonl"))],
        },
        "programs": set(programs.used),
    }


def files(run_dir: pathlib.Path) -> list[str]:
    """Two levels of names, and the steps of checkpoints."""
    paths = [*run_dir.glob("*"), *run_dir.glob("*/*"), *run_dir.glob("checkpoints/*/*")]
    names = {str(path.relative_to(run_dir)) for path in paths if path.suffix != ".lock"}
    return sorted(name for name in names if "tfevents" not in name)


def metrics(path: pathlib.Path) -> list[dict[str, float]]:
    lines = path.read_text().splitlines() if path.exists() else []
    aside = ("time", "perf/tokens_per_second", "perf/compiles")
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(aside)}
        for line in lines
    ]


def table(path: pathlib.Path) -> str:
    return repr(pq.read_table(path).to_pylist())


# --- Observing what a run hands on whole ---


def observed_rewards(*overrides: str) -> Any:
    """Return the terms of texts of every kind, for both kinds of label."""
    config = of_section(RewardConfig, overrides)
    texts = [judgement(*pair) for pair in ((7, 4), (8, 2), (4, 7), (6, 5), (5, 5), (11, 2), (2, 9))]
    texts += ["", "no verdict", judgement("seven", "four")]
    labels = [([7, 4], None), ([5, 5], None), (None, 1), (None, 0)]
    if config.mode == "judgelrm":
        labels = labels[:2]
    given = [(text, *label, num) for text in texts for label in labels for num in (5, 20, 200)]
    verdicts = [rewards.read(config, "Assistant: <think>", text) for text, *_ in given]
    terms = [
        rewards.pay(
            config, verdict, gold=gold, preference=preference, num_tokens=num, max_tokens=200
        )
        for verdict, (_, gold, preference, num) in zip(verdicts, given, strict=True)
    ]
    lost = [
        rewards.withhold(config, *each, verdicts[0]) for each in zip(terms, verdicts, strict=True)
    ]
    return terms, lost


def judgement(score_1: object, score_2: object) -> str:
    return f"so</think><answer>{score_1}</answer><answer>{score_2}</answer>"


def observed_optimizer(*overrides: str) -> Any:
    """Return weights after a few steps, and the precision of what is kept between them."""
    config = of_section(OptimizerConfig, ("learning_rate=0.1", *overrides))
    optimizer = update.make_optimizer(config, 6)
    params = {"w": jax.numpy.arange(1.0, 5.0)}
    state = optimizer.init(params)
    for step in range(5):
        gradient = {"w": jax.numpy.array([1.0, -2.0, 0.01, 3.0]) * (1 + step)}
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jax.numpy.add, params, updates)
    return params["w"].tolist(), [str(leaf.dtype) for leaf in jax.tree.leaves(state)]


def of_section(section: type, overrides: tuple[str, ...]) -> Any:
    values = dict(text.split("=") for text in overrides)
    kinds = {name: type(getattr(section(), name)) for name in values}
    return section(**{name: kinds[name](value) for name, value in values.items()})


def observed_mesh(*overrides: str) -> Any:
    config = of_section(MeshConfig, overrides)
    return dict(mesh_module.create_mesh(config, jax.devices()[:2]).shape)


def observed_timeout(*overrides: str) -> Any:
    """Return what the command tells the watchdog."""
    told = []

    class StopHere(Exception):
        pass

    def joined(_: Any, __: Any, timeout: float) -> Any:
        told.append(timeout)
        raise StopHere

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "joined", joined)
        command = ["--config", str(QUICKSTART), *(f"run.{text}" for text in overrides)]
        with pytest.raises(StopHere):
            train.main(command)
    return told


def observed_acceptance(*overrides: str) -> Any:
    """Return what a run says whose training rows have changed."""
    config = load(QUICKSTART, [f"run.{text}" for text in overrides])
    try:
        return same_run.check_made_from(config, {"train": "a"}, {"train": "b"})
    except UsageError as error:
        return str(error)


def observed_compiling(*overrides: str) -> bool:
    """Return whether a run on one host compiles ahead; test_train.py holds what it compiles."""
    return is_compiled_ahead(load(QUICKSTART, [f"run.{text}" for text in overrides]).run)


def observer(name: str) -> Callable[..., Any] | None:
    """Return what observes a field by itself; None: a run does."""
    section, _, field = name.rpartition(".")
    if name == "run.host_timeout":
        return observed_timeout
    if name == "run.accept":
        return observed_acceptance
    if name == "run.precompile":
        return observed_compiling
    if section == "reward" and field in REWARD:
        return observed_rewards
    if section == "mesh":
        return observed_mesh
    return observed_optimizer if section.endswith("optimizer") else None


# --- The tests ---


def test_every_field_has_an_entry():
    assert set(fields()) - CHANGES.keys() == set(), "say in CHANGES what a change of it shows"
    assert CHANGES.keys() - set(fields()) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHANGES if observer(name)])
def test_a_setting_of_a_section_has_an_effect(name):
    change, look = CHANGES[name], observer(name)
    section = name.rpartition(".")[0]
    after = (*change.given, *change.also, f"{name}={change.to}")
    before, after = (
        [text.removeprefix(f"{section}.") for text in overrides]
        for overrides in (change.given, after)
    )
    assert look(*before) != look(*after)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHANGES if not observer(name)])
def test_a_setting_of_a_run_has_an_effect(observe, name):
    change = CHANGES[name]
    before = observe(*change.given)
    after = observe(*change.given, *change.also, f"{name}={change.to}")
    assert not before["error"]
    if change.by_programs:
        assert before["programs"] != after["programs"]
    else:
        assert before["values"] != after["values"] or after["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [*(f"{stage}.optimizer.learning_rate=0.5" for stage in STAGES), "reward.malformed=3"],
)
def test_a_run_hands_on_the_sections_that_are_observed_by_themselves(observe, override):
    given = {"dpo": WRITTEN, "reward_model": SCORED}.get(override.partition(".")[0], ())
    assert observe(*given)["values"] != observe(*given, override)["values"]


@pytest.mark.slow
def test_equal_settings_show_the_same(observe):
    """Without this, no test here could fail."""
    first, second = observe(), observe("run.seed=0")
    assert first["values"] == second["values"] and first["programs"] == second["programs"]
