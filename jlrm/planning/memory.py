"""What is in a device's memory during a run, by kind and in bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlrm.model import qwen
from jlrm.model.qwen import QwenConfig
from jlrm.planning.slices import shard_bytes
from jlrm.runtime.mesh import Layout
from jlrm.sampling import decode, sampler
from jlrm.sampling.policy import Network
from jlrm.sampling.sampler import SamplerSettings
from jlrm.training.update import TrainState

WEIGHTS, MOMENTS, REFERENCE = "master weights", "optimiser", "reference"
LAID_OUT, CACHES, BATCH, TEMPORARY = "rollout weights", "KV caches", "batch", "temporary"
CODE = "programs"
KINDS = (WEIGHTS, MOMENTS, REFERENCE, LAID_OUT, CACHES, BATCH, TEMPORARY, CODE)

Held = Mapping[str, int]  # bytes of one device, by kind


class Point(NamedTuple):
    """A moment of a phase: a program that runs (empty: none), and what else is there."""

    program: str
    beside: Held


def total(*parts: Held) -> dict[str, int]:
    """Add what several things hold, kind by kind."""
    held: dict[str, int] = {}
    for part in parts:
        for kind, number in part.items():
            held[kind] = held.get(kind, 0) + number
    return held


def state_kinds(state: TrainState) -> dict[str, int]:
    """Return what a training state holds."""
    return {WEIGHTS: shard_bytes(state.weights), MOMENTS: shard_bytes(state.opt_state)}


def laid_out_bytes(network: Network, form: str) -> int:
    """Return what one device holds of the weights laid out for decoding."""
    layout = network.decoding
    # Quantised matrices are widened; adapters are merged, or lie beside them.
    beside = network.model.lora if form == "unmerged" else None
    beside = beside and dataclasses.replace(beside, base="stored")
    params = qwen.abstract_params(dataclasses.replace(network.model, lora=beside), layout)
    placed = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        jax.eval_shape(partial(qwen.to_compute_dtype, network.model), params),
        params,
    )
    if form != "int8":
        return shard_bytes(placed)
    held = shard_bytes({**placed, "layers": {}})
    held += shard_bytes(qwen.head(network.model, placed)) // 2  # a copy of its own
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed["layers"]):
        is_matrix = path[-1].key in decode.INPUTS
        held += shard_bytes(leaf) // (2 if is_matrix else 1)
    return held


def cache_bytes(model: QwenConfig, layout: Layout, prompts: Any, slots: int, num_new: int) -> int:
    """Return a device's keys and values of all layers: of prompts, and the last loop's caches.

    Args:
      prompts: abstract array `[P, T]`.
      slots: rollouts of a prompt that run at once, each with up to `num_new` tokens.
    """
    heads, size = model.num_key_value_heads, model.head_dim
    num_prompts, width = prompts.shape
    shapes = (
        ("P K T H", (num_prompts, heads, width, size)),
        ("P R K S H", (num_prompts, slots, heads, num_new, size)),
    )
    arrays = [
        jax.ShapeDtypeStruct(
            shape, jnp.dtype(model.compute_dtype), sharding=layout.activation(letters)
        )
        for letters, shape in shapes
    ]
    return 2 * model.num_hidden_layers * shard_bytes(arrays)


def host_bytes(params: Any, state: Held) -> dict[str, int]:
    """Return what a VM holds in its own memory for each of its devices, by phase.

    Reading takes one parameter at a time, as the file has it and as the device gets it. A save
    copies the weights and the moments, and writes the copy beside the steps that follow.
    """
    largest = max(shard_bytes(leaf) for leaf in jax.tree.leaves(params))
    return {"load": 2 * largest, "checkpoint": state[WEIGHTS] + state[MOMENTS]}


def num_slots(settings: SamplerSettings, num_rollouts: int) -> int:
    """Return how many rollouts of a prompt run at once."""
    return min(settings.num_slots or num_rollouts, num_rollouts)


def decode_turns(settings: SamplerSettings, num_rollouts: int) -> list[int]:
    """Return the turns of a rollout's successive loops if no completion ends early."""
    waves = math.ceil(num_rollouts / num_slots(settings, num_rollouts))
    num_turns = waves * settings.max_new_tokens
    ends = [*sampler.cache_sizes(settings.max_new_tokens)[:-1], num_turns - 1]
    return np.diff([0, *ends]).tolist()
