"""What a GRPO step must compute and move, by arithmetic: FLOPs and bytes of its phases.

Counted is what any implementation needs: real tokens only, each prompt once, exact causal
attention, the head only where it is used, of experts those that a token chose, a backward pass at
twice its forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jlrm.model.qwen import QwenConfig


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of a GRPO batch, in tokens."""

    prompts: tuple[int, ...]  # the length of each
    rollouts: int  # of each prompt
    new_tokens: int  # of each rollout

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all completions."""
        return len(self.prompts) * self.rollouts * self.new_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, and of each prompt once."""
        return sum(self.prompts) + self.num_completion_tokens

    @property
    def num_plain_tokens(self) -> int:
        """Tokens of a layout in which each rollout has a prompt of its own."""
        return sum(self.prompts) * self.rollouts + self.num_completion_tokens

    def split(self, num_parts: int) -> list[BatchSizes]:
        """Return equal parts of whole groups."""
        size = len(self.prompts) // num_parts
        return [
            dataclasses.replace(self, prompts=self.prompts[i * size : (i + 1) * size])
            for i in range(num_parts)
        ]


class Cost(NamedTuple):
    """What a piece of work computes and moves; pieces run one after the other, so times add."""

    flops: float
    bytes: float


def layer_weights(config: QwenConfig, num_tokens: int | None = None) -> int:
    """Return how many weights the matrices of one layer hold: q, k, v, o, gate, up, down, a router.

    Args:
      num_tokens: of experts, count those that so many tokens choose where all are equally likely.
    """
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    num_mlps: float = config.num_experts or 1
    if config.num_experts and num_tokens is not None:
        share = config.num_experts_per_tok / config.num_experts
        num_mlps *= 1 - (1 - share) ** num_tokens
    inner = round(3 * config.intermediate_size * num_mlps)
    return config.hidden_size * (heads * config.head_dim + inner + config.num_experts)


def head_weights(config: QwenConfig) -> int:
    """Return how many weights the output embedding holds."""
    return config.vocab_size * config.hidden_size


def forward_flops(config: QwenConfig, num_tokens: int, num_pairs: int, num_logits: int) -> int:
    """Return the FLOPs of matrix products in a forward pass.

    A product costs 2 FLOPs a weight and token. A token and one that it sees, itself included, cost
    4 N H a layer: a score, and a weighted value. The head costs 2 V D for each position that
    predicts. Norms, rotary angles, activations and softmax are not counted, nor is looking up an
    embedding; a backward pass costs twice as much, and recomputing for it (`remat`) counts nothing.
    """
    pair = 4 * config.num_attention_heads * config.head_dim
    of_layer = 2 * layer_weights(config, 1) * num_tokens + pair * num_pairs
    return config.num_hidden_layers * of_layer + 2 * head_weights(config) * num_logits


def causal_pairs(num_tokens: int, num_before: int = 0) -> int:
    """Return how many pairs tokens make with those they see: `num_before`, and earlier of them."""
    return num_tokens * num_before + num_tokens * (num_tokens + 1) // 2


def batch_flops(config: QwenConfig, batch: BatchSizes) -> int:
    """Return the FLOPs of one forward pass, each prompt run once.

    The last token of a completion predicts nothing and is not run.
    """
    num_run = batch.new_tokens - 1
    return forward_flops(
        config,
        sum(length + batch.rollouts * num_run for length in batch.prompts),
        sum(
            causal_pairs(length) + batch.rollouts * causal_pairs(num_run, length)
            for length in batch.prompts
        ),
        batch.num_completion_tokens,
    )


def rollout_costs(config: QwenConfig, batch: BatchSizes, num_slots: int = 0) -> list[Cost]:
    """Return the costs of a rollout: of prefill, and of each step of decoding.

    All read the weights once; a step reads besides them the keys and values of every prompt once,
    and those of each rollout's own tokens. With `num_slots` rollouts of a prompt at once (0: all)
    there are several waves of steps.
    """
    size = np.dtype(jnp.dtype(config.compute_dtype)).itemsize

    def weights(num_tokens: int) -> int:
        of_layers = config.num_hidden_layers * layer_weights(config, num_tokens)
        return size * (of_layers + head_weights(config))

    of_token = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    num_prompts, num_prompt_tokens = len(batch.prompts), sum(batch.prompts)
    pairs = sum(map(causal_pairs, batch.prompts))
    firsts = num_prompts * batch.rollouts  # the logits of each rollout's first token
    flops = forward_flops(config, num_prompt_tokens, pairs, firsts)
    costs = [Cost(flops, weights(num_prompt_tokens))]
    slots = num_slots or batch.rollouts
    for begun in range(0, batch.rollouts, slots):
        wave = min(slots, batch.rollouts - begun)
        num_rows = num_prompts * wave
        for own in range(1, batch.new_tokens):
            pairs = wave * num_prompt_tokens + num_rows * own
            flops = forward_flops(config, num_rows, pairs, num_rows)
            caches = of_token * (num_prompt_tokens + num_rows * own)
            costs.append(Cost(flops, weights(num_rows) + caches))
    return costs


def logprobs_costs(config: QwenConfig, batch: BatchSizes) -> list[Cost]:
    """Return the cost of scoring: a forward pass, which reads the weights once."""
    size = np.dtype(jnp.dtype(config.compute_dtype)).itemsize
    return [Cost(batch_flops(config, batch), size * _num_weights(config))]


def update_costs(config: QwenConfig, batch: BatchSizes, moment_bytes: int) -> list[Cost]:
    """Return the costs of one optimiser step: of its gradient, and then of its application.

    The gradient reads weights in both passes and is written once. The optimiser reads it, and reads
    and writes the weights and both moments, which take `moment_bytes` a weight together.
    """
    num_weights = _num_weights(config)
    size = np.dtype(jnp.dtype(config.compute_dtype)).itemsize
    if config.lora is not None:  # frozen weights have no gradient, and adapters are a hundredth
        return [Cost(2 * batch_flops(config, batch), 2 * size * num_weights)]
    at_rest = np.dtype(jnp.dtype(config.param_dtype)).itemsize + moment_bytes
    return [
        Cost(3 * batch_flops(config, batch), 3 * size * num_weights),
        Cost(0, (size + 2 * at_rest) * num_weights),
    ]


def least_seconds(costs: Sequence[Cost], flops_rate: float, bytes_rate: float) -> float:
    """Return the time that the pieces take on a machine that reaches its limits."""
    return sum(max(cost.flops / flops_rate, cost.bytes / bytes_rate) for cost in costs)


def _num_weights(config: QwenConfig) -> int:
    """Return how many weights the matrices hold; norms and biases are a thousandth of them."""
    num_tables = 1 if config.tie_word_embeddings else 2
    of_layers = config.num_hidden_layers * layer_weights(config)
    return of_layers + num_tables * head_weights(config)
