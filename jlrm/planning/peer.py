"""jlrm as one of several libraries that a harness times on one workload.

The harness gives a `spec`: a random model in Hugging Face layout (`spec.dir`), ragged prompts, a
fixed GRPO batch. It calls `rollout`, `update`, `iteration` and `check`; each method runs a phase
once for every `tick()` that returns True, its work finished. Everything below is what
`python -m jlrm.train` runs, in float32: the same programs, packing, and host work.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import spec as spec_lib  # pyright: ignore[reportMissingImports]  (the harness')

from jlrm import config as configs
from jlrm.rl.advantages import group_advantages
from jlrm.runtime.mesh import create_mesh, host_array
from jlrm.runtime.settings import from_dict
from jlrm.sampling.generate import fetch, make_generator
from jlrm.sampling.policy import Network
from jlrm.sampling.sampler import Rollout
from jlrm.sampling.stops import stop_tables
from jlrm.training import update
from jlrm.training.packing import Group
from jlrm.training.programs import Known, Minibatch, grpo_programs, pack_minibatch, rollout_settings
from jlrm.weights import hf, hf_config


def settings(spec: Any, pack_tokens: int) -> configs.Config:
    """Return the workload as a config of ours."""
    optimizer = {"learning_rate": spec.lr, "clip_norm": spec.max_grad_norm, "weight_decay": 0.0}
    loss = {
        "clip_low": spec.epsilon,
        "clip_high": spec.epsilon,
        "kl_weight": spec.beta,
        "entropy_weight": 0.0,
        "aggregation": "sequence_mean",
    }
    grpo = {
        "steps": 1000,
        "prompts": spec.prompts,
        "rollouts": spec.group,
        "loss": loss,
        "pack_tokens": pack_tokens,
        "optimizer": optimizer,
    }
    return from_dict(
        {
            "run": {"dir": "unused"},
            "data": {"train": "unused"},
            "model": {"path": str(spec.dir)},
            "sampling": {"max_new_tokens": spec.new_tokens, "temperature": spec.temperature},
            "grpo": grpo,
        }
    )


class Peer:
    def __init__(self, spec: Any, remat: str = "dots", pack_tokens: int = 0) -> None:
        self.spec, self.prompts = spec, spec_lib.prompt_ids(spec)
        self.versions = {"jax": jax.__version__}
        config = settings(spec, pack_tokens)
        model = hf_config.read_config(
            spec.dir, param_dtype="float32", compute_dtype="float32", remat=remat
        )
        network = Network(model, create_mesh(config.mesh, jax.devices()[:1]), 0, ())
        self.training = network.training
        self.programs = grpo_programs(config, network, spec.prompt_len)
        self.generate = make_generator(
            network,
            rollout_settings(config, network),
            stop_tables({}, [], spec.vocab),
            spec.seed,
            spec.group,
            spec.prompt_len,
        )
        params = hf.load_params(spec.dir, model, self.training)
        self.state = update.init_state(model, self.training, self.programs.optimizer, params)

    def rollout(self, tick: Callable[[], bool]) -> np.ndarray:
        number, tokens = 0, np.zeros(0)
        while tick():
            number += 1
            tokens = self._sample(number).tokens
        return np.asarray(tokens)

    def update(self, tick: Callable[[], bool]) -> None:
        while tick():
            part = self._fixed_batch()
            self.state, _ = self.programs.update(self.state, part.rows, part.targets)
            jax.block_until_ready(self.state)

    def iteration(self, tick: Callable[[], bool]) -> None:
        tokenizer = spec_lib.tokenizer(self.spec)
        reference = self.programs.freeze(self.state.params)
        number = 0
        while tick():
            number += 1
            sampled = self._sample(number)
            rewards = spec_lib.reward(None, tokenizer.batch_decode(sampled.tokens))
            advantages = group_advantages(np.reshape(rewards, (-1, self.spec.group)), eps=1e-4)
            part = self._pack(sampled.tokens, sampled.logps, np.asarray(advantages).reshape(-1))
            ref_logp, _ = self.programs.logprobs(reference, part.rows)
            targets = part.targets._replace(ref_logp=ref_logp)
            self.state, metrics = self.programs.update(self.state, part.rows, targets)
            jax.device_get(metrics)

    def check(self) -> dict[str, float]:
        part = self._fixed_batch()
        logps = host_array(self.programs.logprobs(self.state.params, part.rows)[0])
        logps = logps[host_array(part.targets.mask)].astype(np.float64)
        _, metrics = self.programs.update(self.state, part.rows, part.targets)
        return {"logp": float(logps.mean()), "loss": float(metrics["loss"])}

    def _sample(self, number: int) -> Rollout:
        weights = self.programs.lay_out(self.state.params)
        numbers = np.arange(len(self.prompts))
        begun = self.generate(weights, self.prompts, numbers, number)
        return fetch(begun, len(self.prompts))

    def _fixed_batch(self) -> Minibatch:
        batch = spec_lib.update_batch(self.spec)
        about = batch["old_logps"], batch["advantages"], batch["ref_logps"]
        return self._pack(batch["completion_ids"], *about)

    def _pack(
        self, tokens: Any, logps: Any, advantages: np.ndarray, ref_logps: Any = None
    ) -> Minibatch:
        size = self.spec.group
        groups = [
            Group(prompt, tokens[i * size : (i + 1) * size].tolist())
            for i, prompt in enumerate(self.prompts)
        ]
        known = Known(logps, advantages, np.ones(len(tokens), bool), ref_logps)
        return pack_minibatch(self.training, self.programs.sizes, groups, known, "sequence_mean")
