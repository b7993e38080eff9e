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
from functools import partial
from typing import Any

import jax
import numpy as np

from jlrm import packing, rollout, update
from jlrm.config import MeshConfig, OptimizerConfig
from jlrm.mesh import compiler_options, create_mesh, global_array, rollout_layout, training_layout
from jlrm.model import hf, hf_config
from jlrm.model.decode import decode_params
from jlrm.packing import Group, Packed
from jlrm.rl.advantages import group_advantages
from jlrm.rl.logprobs import Distribution
from jlrm.rl.losses import PolicyLoss, PolicyTargets, token_weights
from jlrm.rollout import Sampler


class Peer:
    def __init__(self, spec: Any, remat: str = "dots", pack_tokens: int = 0) -> None:
        self.spec = spec
        self.versions = {"jax": jax.__version__}
        self.model = hf_config.read_config(
            spec.dir, param_dtype="float32", compute_dtype="float32", remat=remat
        )
        mesh = create_mesh(MeshConfig(), jax.devices()[:1])
        self.training, self.layout = training_layout(mesh), rollout_layout(mesh)
        self.prompts = self._prompts()
        self.sizes = packing.row_sizes(
            spec.prompt_len,
            spec.new_tokens,
            spec.prompts * (spec.prompt_len + spec.group * spec.new_tokens),
            pack_tokens,
            self.training.platform,
        )
        distribution = Distribution(spec.temperature)
        sampler = Sampler(distribution, spec.new_tokens, (), spec.group)
        optimizer = update.make_optimizer(
            OptimizerConfig(learning_rate=spec.lr, clip_norm=spec.max_grad_norm, weight_decay=0.0),
            1000,
        )
        loss = PolicyLoss(spec.epsilon, spec.epsilon, kl_weight=spec.beta)
        fixed = self.model, self.training, distribution
        self.lay_out = jax.jit(partial(decode_params, self.model, self.layout))
        self.generate = jax.jit(partial(rollout.generate, self.model, self.layout, sampler))
        self.keys = jax.jit(partial(rollout.rollout_keys, spec.seed, num_rollouts=spec.group))
        options = compiler_options(mesh)
        self.score = jax.jit(partial(update.score, *fixed), compiler_options=options)
        self.step = jax.jit(
            partial(update.grpo_update, *fixed, loss, optimizer),
            donate_argnums=0,
            compiler_options=options,
        )
        params = hf.load_params(spec.dir, self.model, self.training)
        self.state = update.init_state(self.model, self.training, optimizer, params)

    def rollout(self, tick: Callable[[], bool]) -> np.ndarray:
        number, tokens = 0, np.zeros(0)
        while tick():
            number += 1
            tokens = self._sample(number)[0]
        return tokens

    def update(self, tick: Callable[[], bool]) -> None:
        batch = self.spec_batch()
        while tick():
            packed = self._pack(batch["completion_ids"])
            targets = self._targets(
                packed, batch["old_logps"], batch["ref_logps"], batch["advantages"]
            )
            rows, targets = packing.to_devices(self.training, (packed.rows, targets))
            self.state, _ = jax.block_until_ready(self.step(self.state, rows, targets))

    def iteration(self, tick: Callable[[], bool]) -> None:
        import spec as spec_lib  # pyright: ignore[reportMissingImports]

        tokenizer = spec_lib.tokenizer(self.spec)
        reference = jax.tree.map(lambda x: x + 0, self.state.params)
        number = 0
        while tick():
            number += 1
            tokens, logps = self._sample(number)
            rewards = spec_lib.reward(None, tokenizer.batch_decode(tokens))
            advantages = group_advantages(np.reshape(rewards, (-1, self.spec.group)), eps=1e-4)
            packed = self._pack(tokens)
            targets = self._targets(packed, logps, logps, np.asarray(advantages).reshape(-1))
            rows, targets = packing.to_devices(self.training, (packed.rows, targets))
            targets = targets._replace(ref_logp=self.score(reference, rows)[0])
            self.state, metrics = self.step(self.state, rows, targets)
            jax.device_get(metrics)

    def check(self) -> dict[str, float]:
        batch = self.spec_batch()
        packed = self._pack(batch["completion_ids"])
        rows = packing.to_devices(self.training, packed.rows)
        logps = np.asarray(self.score(self.state.params, rows)[0], np.float64)
        targets = self._targets(packed, batch["old_logps"], batch["ref_logps"], batch["advantages"])
        _, metrics = self.step(self.state, rows, packing.to_devices(self.training, targets))
        return {"logp": float(logps[packed.is_target].mean()), "loss": float(metrics["loss"])}

    def spec_batch(self) -> dict[str, np.ndarray]:
        """Return the harness' fixed batch."""
        import spec as spec_lib  # pyright: ignore[reportMissingImports]

        return spec_lib.update_batch(self.spec)

    def _prompts(self) -> list[list[int]]:
        import spec as spec_lib  # pyright: ignore[reportMissingImports]

        return spec_lib.prompt_ids(self.spec)

    def _sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        spec = self.spec
        tokens = np.zeros((spec.prompts, spec.prompt_len), np.int32)
        for row, ids in zip(tokens, self.prompts, strict=True):
            row[: len(ids)] = ids
        lengths = np.array([len(ids) for ids in self.prompts], np.int32)
        tables = np.zeros((0, 1, spec.vocab), np.int16), np.zeros(0, np.int16)
        result = self.generate(
            self.lay_out(self.state.params),
            global_array(tokens, self.layout.activation("P T")),
            global_array(lengths, self.layout.activation("P")),
            self.keys(np.int32(number), np.arange(spec.prompts, dtype=np.int32)),
            *tables,
        )
        shape = spec.batch, spec.new_tokens
        return np.asarray(result.tokens).reshape(shape), np.asarray(result.logps).reshape(shape)

    def _pack(self, completions: np.ndarray) -> Packed:
        size = self.spec.group
        groups = [
            Group(prompt, completions[i * size : (i + 1) * size].tolist())
            for i, prompt in enumerate(self.prompts)
        ]
        return packing.pack(groups, self.sizes, 1)

    def _targets(
        self, packed: Packed, old_logps: Any, ref_logps: Any, advantages: np.ndarray
    ) -> PolicyTargets:
        mask = np.ones((self.spec.batch, self.spec.new_tokens), bool)
        return PolicyTargets(
            packed.take(old_logps),
            packed.take(ref_logps),
            packed.take(advantages),
            packed.take(np.ones(self.spec.batch, bool)),
            packed.take(token_weights(mask, "sequence_mean")),
        )
