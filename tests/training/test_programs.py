"""A plan compiles what training runs: the same programs, called with arguments of the same kind."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jlrm import train
from jlrm.data.comparisons import write_comparisons
from jlrm.data.worlds import toy
from jlrm.planning import phases
from jlrm.runtime.mesh import create_mesh
from jlrm.runtime.settings import from_dict
from jlrm.training.recipes import grpo, preference, reward_model, sft
from jlrm.weights.source import read_model

EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # also where XLA's part is in a cache
# Programs that need a few KiB beside their arguments, so that no plan need know them: random keys
# of a batch, copies of a save, a look at saved weights (weights/digests.py), weights of tokens.
SMALL = {"importance_weights", "rollout_keys", "stage", "_look", "_threefry_seed"}


GRPO = {"steps": 2, "prompts": 2, "rollouts": 2}
DPO = {"steps": 2, "batch_size": 4, "rollouts": 2}
OF_GRPO = ("grpo_update", "decode_params", "logprobs")
OF_DPO = ("dpo_update", "decode_params", "logprobs", "_freeze")
STAGES = {
    "kl": ({"grpo": {**GRPO, "loss": {"kl_weight": 0.01}}}, (*OF_GRPO, "_freeze")),
    "cap": ({"grpo": {**GRPO, "loss": {"kl_weight": 0.0, "importance_cap": 2.0}}}, OF_GRPO),
    "kl in the reward": (
        {"grpo": {**GRPO, "loss": {"kl_weight": 0.0}, "advantage": {"kl_weight": 0.01}}},
        (*OF_GRPO, "_freeze"),
    ),
    "tokens singled out": (
        {"grpo": {**GRPO, "loss": {"kl_weight": 0.01, "surrogate": "kl_cov"}}},
        (*OF_GRPO, "_freeze"),
    ),
    "greedy": (
        {"grpo": {**GRPO, "advantage": {"baseline": "greedy"}, "loss": {"kl_weight": 0.0}}},
        OF_GRPO[:2],
    ),
    "dpo": ({"dpo": DPO}, OF_DPO),
    "scores": ({"reward_model": {"steps": 2, "batch_size": 4}}, ("reward_update",)),
    "adapters": (
        {
            "lora": {"rank": 2, "base": "int8"},
            "dpo": DPO,
            "grpo": {**GRPO, "loss": {"kl_weight": 0.01}},
            "reward_model": {"steps": 2, "batch_size": 4},
        },
        (*OF_GRPO, *OF_DPO, "reward_update"),
    ),
}


def is_small(name: str) -> bool:
    """Whether it is one of JAX's own operations outside any program, on numbers a row."""
    plain = name.strip("_")
    is_jax = hasattr(jnp, plain) or hasattr(jax.lax, plain) or re.match("reduce_", plain)
    return name in SMALL or bool(is_jax)


def signature(tree):
    """Return what stays the same between the longest batch and any other."""
    return jax.tree.map(lambda leaf: (leaf.ndim, leaf.dtype), tree)


class Recorder:
    """What training compiles, by name, and the arguments of each call of its programs."""

    def __init__(self, monkeypatch) -> None:
        self.names: set[str] = set()
        self.calls: dict[str, list] = {}
        makers = {sft: "sft_programs", preference: "dpo_programs", grpo: "grpo_programs"}
        makers[reward_model] = "reward_programs"
        for module, make in makers.items():
            monkeypatch.setattr(module, make, self._recording(getattr(module, make)))

    def _recording(self, make):
        def made(*arguments):
            whole = make(*arguments)
            jitted = {name: field for name, field in whole._asdict().items() if is_jitted(field)}
            return whole._replace(**{name: self._wrap(field) for name, field in jitted.items()})

        return made

    def _wrap(self, program):
        def call(*arguments):
            self.calls.setdefault(program.__name__, []).append(signature(arguments))
            return program(*arguments)

        return call

    def listen(self, event: str, seconds: float, **details) -> None:
        if event == EVENT:
            self.names.add(re.fullmatch(r"jit\((.*)\)", details["fun_name"])[1])


def is_jitted(value) -> bool:
    return hasattr(value, "lower")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize(("stages", "called"), STAGES.values(), ids=STAGES)
def test_no_program_of_a_run_is_missing_from_its_plan(tmp_path, monkeypatch, stages, called):
    write_comparisons(toy.comparisons(seed=3, num_rows=32), tmp_path / "pairs.jsonl")
    data = {"train": str(tmp_path / "pairs.jsonl"), "prompt": "toy", "eval_rows": 4}
    config = from_dict(
        {
            "run": {"dir": str(tmp_path / "r"), "tensorboard": False},
            "model": {"preset": "toy", "tokenizer": "toy"},
            "data": {**data, "max_prompt_tokens": 64},
            "sampling": {"max_new_tokens": 8, "eval_batch_size": 8},
            "reward": {"plugins": {"training.recipes.test_dpo:pay": 1.0}},
            "sft": {"steps": 2, "batch_size": 4},
            **stages,
        }
    )
    recorder = Recorder(monkeypatch)
    jax.monitoring.register_event_duration_secs_listener(recorder.listen)
    try:
        train.train(config, jax.devices()[:1])
    finally:
        jax.monitoring.unregister_event_duration_listener(recorder.listen)
    mesh = create_mesh(config.mesh, jax.devices()[:1])
    planned = phases.plan(config, read_model(config), mesh).programs
    names = {each.call.program.__name__ for each in planned.values()}
    unknown = {name for name in recorder.names if not is_small(name)} - names
    assert not unknown, f"training compiles {unknown}, which no plan knows"
    assert names <= recorder.names, "a plan has programs that do not run"
    assert set(recorder.calls) == {"sft_update", *called}
    for name, calls in recorder.calls.items():
        wanted = [
            signature(each.call.arguments)
            for each in planned.values()
            if each.call.program.__name__ == name
        ]
        assert all(call in wanted for call in calls), name
        assert all(call in calls for call in wanted), name


def test_what_a_stage_has_is_one_row():
    """Adding a stage is a section, a recipe and a row: every other list is read from these."""
    from jlrm.config import stage_titles
    from jlrm.training.recipes.stages import STAGES

    assert list(STAGES) == list(stage_titles()) == ["sft", "dpo", "grpo", "reward_model"]
