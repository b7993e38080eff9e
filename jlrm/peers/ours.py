"""jlrm beside the others: what `python -m jlrm.train` runs.

The same programs, the same packing and the same work of the host. Rollouts are drawn as in a step
of training, and rewards are read from text. The layers' matrix products are kept for the backward
pass (`model.remat=dots`), as the others keep them.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from jlrm.config import AdvantageConfig, Config
from jlrm.model import qwen
from jlrm.rl.advantages import advantages
from jlrm.rl.losses import token_weights
from jlrm.rl.preferences import PairTargets
from jlrm.runtime.mesh import create_mesh, host_array
from jlrm.runtime.settings import from_dict
from jlrm.sampling.generate import fetch, make_generator
from jlrm.sampling.policy import Network
from jlrm.sampling.sampler import Rollout
from jlrm.sampling.stops import stop_tables
from jlrm.training import packing
from jlrm.training.packing import Group
from jlrm.training.programs import (
    Known,
    Minibatch,
    grpo_programs,
    pack_minibatch,
    rollout_settings,
    sft_programs,
)
from jlrm.training.recipes.pair_programs import (
    dpo_programs,
    reward_programs,
    scored_group,
    scoring,
)
from jlrm.training.recipes.reward_model import reward_targets
from jlrm.training.update import init_state
from jlrm.weights import hf, source

PACKAGES = ("jax", "flax")


def device_peak() -> int | None:
    """Return the most bytes of a GPU that were held; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Learner:
    """The programs of a GRPO run on the workload, and their state."""

    def __init__(self, work: Any) -> None:
        self.work = work
        config = settings(work, work.learning_rate)
        model = source.read_model(config)
        network = Network(model, create_mesh(config.mesh, jax.devices()[:1]), 0, ())
        self.network = network
        self.training = network.training
        self.programs = grpo_programs(config, network, work.prompt_tokens)
        stops = stop_tables({}, [], model.vocab_size)
        self.generate = make_generator(
            network,
            rollout_settings(config, network),
            stops,
            config.run.seed,
            work.rollouts,
            work.prompt_tokens,
        )
        params = hf.load_params(pathlib.Path(work.model), model, self.training)
        self.state = init_state(model, self.training, self.programs.optimizer, params)

    def draw(self, number: int) -> Rollout:
        """Lay the weights out, generate all completions and fetch them."""
        weights = self.programs.lay_out(self.state.weights)
        prompts = self.work.prompts
        begun = self.generate(weights, prompts, np.arange(len(prompts)), number)
        return fetch(begun, len(prompts))

    def groups(self, completions: np.ndarray) -> list[Group]:
        """Return the prompts with completions [B, T]."""
        parts = np.split(completions, len(self.work.prompts))
        return [
            Group(prompt, part.tolist())
            for prompt, part in zip(self.work.prompts, parts, strict=True)
        ]

    def pack(self, completions: np.ndarray, known: Known) -> Minibatch:
        """Pack completions and send them to the device."""
        sizes, groups = self.programs.sizes, self.groups(completions)
        return pack_minibatch(self.network, sizes, groups, known, "sequence_mean")

    def pack_batch(self) -> Minibatch:
        """Pack the batch of the workload."""
        batch = self.work.batch
        is_kept = np.ones(len(batch["advantages"]), bool)
        known = Known(batch["old_logps"], batch["advantages"], is_kept, batch["ref_logps"])
        return self.pack(batch["completion_ids"], known)

    def take_step(self, part: Minibatch, targets: Any) -> dict[str, Any]:
        """Take an optimiser step, wait for it, and return its metrics."""
        self.state, metrics = self.programs.update(self.state, part.rows, targets)
        jax.block_until_ready(self.state)
        return jax.device_get(metrics)


def settings(work: Any, rate: float) -> Config:
    """Return the workload as a config, with this rate of learning."""
    loss = {
        "clip_low": work.clip,
        "clip_high": work.clip,
        "kl_weight": work.kl_weight,
        "entropy_weight": 0.0,
        "aggregation": "sequence_mean",
    }
    optimizer = {
        "learning_rate": rate,
        "clip_norm": work.clip_norm,
        "weight_decay": 0.0,
    }
    grpo = {"prompts": len(work.prompts), "rollouts": work.rollouts}
    pairs = {"steps": 1, "batch_size": len(work.pairs["prompts"]), "optimizer": optimizer}
    return from_dict(
        {
            "run": {"dir": "unused"},
            "data": {"train": "unused", "max_prompt_tokens": work.prompt_tokens},
            "model": {"path": work.model, "compute_dtype": work.dtype, "remat": "dots"},
            "sampling": {"max_new_tokens": work.new_tokens},
            "sft": pairs,
            "dpo": {**pairs, "beta": work.beta},
            "reward_model": pairs,
            "grpo": {**grpo, "steps": 1, "loss": loss, "optimizer": optimizer},
        }
    )


def check(work: Any) -> tuple[np.ndarray, float]:
    """Return log-probabilities [B, T] of the batch, and its loss."""
    run, completions = Learner(work), work.batch["completion_ids"]
    part = run.pack_batch()
    packed = packing.pack(run.groups(completions), run.programs.sizes, 1)
    found = host_array(run.programs.logprobs(run.state.weights, part.rows)[0])
    logps = np.zeros(completions.shape, np.float32)
    where = packed.is_target
    logps[packed.completion[where], packed.offset[where]] = found[where]
    return logps, run.take_step(part, part.targets)["loss"]


def rollout(work: Any, turns: Any) -> None:
    """Draw completions."""
    run = Learner(work)
    for number in turns:
        turns.tokens = run.draw(number).tokens


def update(work: Any, turns: Any) -> None:
    """Take optimiser steps on the batch, which is packed each time."""
    run = Learner(work)
    for _ in turns:
        part = run.pack_batch()
        run.take_step(part, part.targets)


def iteration(work: Any, turns: Any) -> None:
    """Draw, pay, score by the reference, and take a step."""
    run = Learner(work)
    tokenizer = work.tokenizer()
    reference = run.programs.freeze(run.state.params)
    for number in turns:
        drawn = run.draw(number)
        rewards = np.reshape(
            work.reward(None, tokenizer.batch_decode(drawn.tokens)), (-1, work.rollouts)
        )
        gains = np.ravel(advantages(AdvantageConfig(eps=1e-4), {"reward": rewards}))
        known = Known(np.asarray(drawn.logps), gains, np.ones(len(gains), bool))
        part = run.pack(np.asarray(drawn.tokens), known)
        ref_logp, _ = run.programs.logprobs(reference, part.rows)
        run.take_step(part, part.targets._replace(ref_logp=ref_logp))


class StageLearner:
    """The programs of SFT, DPO or Bradley-Terry on the workload's pairs, and their state."""

    def __init__(self, work: Any, stage: str, rate: float) -> None:
        config = settings(work, rate)
        model = source.read_model(config)
        network = Network(model, create_mesh(config.mesh, jax.devices()[:1]), 0, ())
        params = hf.load_params(pathlib.Path(work.model), model, network.training)
        if stage == "bradley_terry":
            network = scoring(network, stage)
            params = _with_head(network, params, work.pairs["head"])
        make = {"sft": sft_programs, "dpo": dpo_programs, "bradley_terry": reward_programs}[stage]
        self.stage, self.layout = stage, network.training
        self.programs: Any = make(config, network, (work.prompt_tokens, work.new_tokens))
        self.state = init_state(network.model, self.layout, self.programs.optimizer, params)
        self.reference = self.programs.freeze(self.state.params) if stage == "dpo" else None
        self.pairs = [
            Group(prompt, answers)
            for prompt, *answers in zip(
                *(work.pairs[name].tolist() for name in ("prompts", "chosen", "rejected")),
                strict=True,
            )
        ]

    def take_step(self) -> float:
        """Pack the pairs, take an optimiser step, wait for it, and return its loss."""
        rows, targets = packing.to_devices(self.layout, self._pack())
        if self.reference is not None:
            ref_logp, _ = self.programs.logprobs(self.reference, rows)
            targets = targets._replace(ref_logp=ref_logp)
        self.state, metrics = self.programs.update(self.state, rows, targets)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def _pack(self) -> tuple[Any, Any]:
        sizes, count = self.programs.sizes, np.float32(len(self.pairs))
        if self.stage == "sft":
            chosen = [Group(pair.prompt, pair.completions[:1]) for pair in self.pairs]
            packed = packing.pack(chosen, sizes, 1)
            weights = token_weights(packed.is_target.reshape(1, -1))
            return packed.rows, weights.reshape(packed.is_target.shape)
        if self.stage == "dpo":
            packed = packing.pack(self.pairs, sizes, 1, is_whole=True)
            return packed.rows, PairTargets._make((None, packed.is_target, np.asarray(count)))
        groups = [scored_group(*pair) for pair in self.pairs]
        packed = packing.pack(groups, sizes, 1, is_whole=True)
        return packed.rows, reward_targets(packed, groups, [1] * len(groups))


def _with_head(network: Network, params: Any, head: np.ndarray) -> Any:
    """Return parameters with the head of a reward model in the place of the vocabulary's."""
    wanted = qwen.abstract_params(network.model, network.training)
    score = jax.device_put(head[:, None], wanted["score"].sharding)
    return {name: score if name == "score" else params[name] for name in wanted}


def losses(work: Any, stage: str) -> list[float]:
    """Return the loss of each of the first steps of a stage."""
    run = StageLearner(work, stage, work.check_rate)
    return [run.take_step() for _ in range(work.check_steps)]


def sft(work: Any, turns: Any) -> None:
    """Take optimiser steps of SFT."""
    _learn(StageLearner(work, "sft", work.learning_rate), turns)


def dpo(work: Any, turns: Any) -> None:
    """Take optimiser steps of DPO, each after the reference's log-probabilities."""
    _learn(StageLearner(work, "dpo", work.learning_rate), turns)


def bradley_terry(work: Any, turns: Any) -> None:
    """Take optimiser steps of a reward model."""
    _learn(StageLearner(work, "bradley_terry", work.learning_rate), turns)


def _learn(run: StageLearner, turns: Any) -> None:
    for _ in turns:
        run.take_step()
