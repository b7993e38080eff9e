"""Five steps of SFT, DPO and Bradley-Terry have the losses of TRL's trainers on the same rows."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
from conftest import GOLDEN, mesh_of

from jlrm.config import DPOConfig, OptimizerConfig
from jlrm.rl.distribution import Distribution
from jlrm.rl.losses import token_weights
from jlrm.rl.preferences import PairTargets
from jlrm.runtime.mesh import training_layout
from jlrm.training import packing, update
from jlrm.training.packing import Group
from jlrm.training.recipes.pair_programs import scored_group
from jlrm.training.recipes.reward_model import reward_targets
from jlrm.weights import hf, hf_config

pytestmark = pytest.mark.slow  # whole models are compiled

RECORDED = json.loads((GOLDEN / "trl_stages.json").read_text())
LAYOUT = training_layout(mesh_of(1, 1, 1))
MODEL = hf_config.read_config(GOLDEN / "qwen2_tied", compute_dtype="float32")
DPO = DPOConfig(beta=RECORDED["beta"])


def params() -> Any:
    return hf.load_params(GOLDEN / "qwen2_tied", MODEL, LAYOUT)


def pairs() -> list[Group]:
    return [Group(row["prompt"], [row["chosen"], row["rejected"]]) for row in RECORDED["rows"]]


def sft() -> tuple[Any, Any, Any]:
    packed = packing.pack([Group(p.prompt, p.completions[:1]) for p in pairs()], [128], 1)
    weights = token_weights(packed.is_target.reshape(1, -1)).reshape(packed.is_target.shape)
    return functools.partial(update.sft_update, MODEL), (packed.rows, weights), params()


def dpo() -> tuple[Any, Any, Any]:
    packed = packing.pack(pairs(), [128], 1, is_whole=True)
    score = jax.jit(functools.partial(update.logprobs, MODEL, LAYOUT, Distribution()))
    ref_logp, _ = score(params(), packed.rows)
    targets = PairTargets(ref_logp, packed.is_target, np.float32(len(pairs())))
    step = lambda layout, *rest: update.dpo_update(MODEL, layout, DPO, *rest)  # noqa: E731
    return step, (packed.rows, targets), params()


def bradley_terry() -> tuple[Any, Any, Any]:
    groups = [scored_group(*pair) for pair in pairs()]
    packed = packing.pack(groups, [128], 1, is_whole=True)
    targets = reward_targets(packed, groups, [1] * len(groups))
    model = dataclasses.replace(MODEL, num_labels=1)
    sine = 0.1 * np.sin(np.arange(MODEL.hidden_size, dtype=np.float32))
    begun = {**params(), "score": jax.numpy.asarray(sine[:, None])}
    step = lambda layout, *rest: update.reward_update(model, layout, "bradley_terry", *rest)  # noqa: E731
    return step, (packed.rows, targets), begun


@pytest.mark.parametrize("stage", [sft, dpo, bradley_terry], ids=lambda stage: stage.__name__)
def test_five_steps_are_those_of_trl_s_trainer(stage):
    update_, batch, begun = stage()
    wanted = RECORDED["losses"][stage.__name__]
    settings = OptimizerConfig(RECORDED["learning_rate"], weight_decay=0.0)
    optimizer = update.make_optimizer(settings, len(wanted))
    state = update.TrainState(begun, optimizer.init(begun), jax.numpy.int32(0))
    step, found = jax.jit(functools.partial(update_, LAYOUT, optimizer)), []
    for _ in wanted:
        state, metrics = step(state, *batch)
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
