"""A model on a mesh and what it writes with: opened once, taken by every program and every writer.

A `Network` is all that programs are compiled from, so a plan and a benchmark need no tokenizer. A
`TextPolicy` adds the tokenizer: training and judging write text with it.
"""

from __future__ import annotations

import functools
import pathlib
from dataclasses import dataclass

from jax.sharding import Mesh

from jlrm.config import SamplingConfig, UsageError
from jlrm.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    end_ids,
    highest_id,
    load_tokenizer,
)
from jlrm.model.attention import TILE
from jlrm.model.qwen import QwenConfig
from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import Layout, rollout_layout, training_layout


@dataclass(frozen=True, eq=False)
class Network:
    """A model on a mesh, and the ids that it may write."""

    model: QwenConfig
    mesh: Mesh
    num_ids: int  # one more than the tokenizer's highest: the head may have more; 0: as the head
    end_ids: tuple[int, ...]

    @functools.cached_property  # a layout is hashed by identity: one each
    def training(self) -> Layout:
        """Where arrays lie in updates and log-probabilities."""
        return training_layout(self.mesh)

    @functools.cached_property
    def decoding(self) -> Layout:
        """Where arrays lie in rollouts."""
        return rollout_layout(self.mesh)

    @property
    def unit(self) -> int:
        """Slots of packed rows of which each segment begins at a multiple."""
        return TILE if self.model.exact else 1

    def distribution(self, sampling: SamplingConfig) -> Distribution:
        """Return what rollouts are drawn from and log-probabilities are taken under."""
        return Distribution(
            sampling.temperature, sampling.top_k, sampling.top_p, self.num_ids, sampling.exact
        )


@dataclass(frozen=True, eq=False)
class TextPolicy(Network):
    """A network that reads and writes text."""

    tokenizer: Tokenizer


def bare_network(model: QwenConfig, mesh: Mesh) -> Network:
    """Return a network without a tokenizer, for measuring: nothing that it draws ends a sequence.

    It draws every id but the head's last, and that one alone would end a sequence.

    Raises:
      UsageError: the mesh can't divide the model.
    """
    check_mesh(mesh, model)
    return Network(model, mesh, model.vocab_size - 1, (model.vocab_size - 1,))


def open_policy(model: QwenConfig, mesh: Mesh, directory: pathlib.Path) -> TextPolicy:
    """Return a policy with the tokenizer of a model's directory.

    Raises:
      UsageError: no tokenizer, more ids than the model has, or a mesh that can't divide the model.
    """
    tokenizer = load_tokenizer(directory)
    ends = end_ids(tokenizer, directory)
    check_vocabulary(tokenizer, model.vocab_size, ends)
    check_mesh(mesh, model)
    num_ids = 1 + max(highest_id(tokenizer), *ends)  # every id can be drawn, whatever the gaps
    return TextPolicy(model, mesh, num_ids, ends, tokenizer)


def check_positions(model: QwenConfig, longest: int, settings: str) -> None:
    """Refuse `longest` tokens in a row where the model has fewer positions, naming the settings.

    Raises:
      UsageError: if so.
    """
    if longest > model.max_position_embeddings:
        raise UsageError(
            f"Prompt and completion together can have {longest} tokens, the model has positions "
            f"for {model.max_position_embeddings}. Lower {settings}."
        )


def check_mesh(mesh: Mesh, model: QwenConfig) -> None:
    """Refuse models that the mesh can't divide, naming what would fit.

    Raises:
      UsageError: if so.
    """
    is_here = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if model.exact and not is_here:
        raise UsageError(
            f"sampling.exact=true holds on one CPU device. This is a mesh of {mesh.size}, of kind "
            f"{mesh.devices.flat[0].platform}. Leave it out: grpo.loss.importance_cap corrects for "
            "the gap."
        )
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    needs = {
        "num_attention_heads": ("mesh.tensor", tensor),
        "num_key_value_heads": ("mesh.tensor", tensor),
        "head_dim": ("mesh.fsdp", fsdp),
        "hidden_size": ("mesh.fsdp * mesh.tensor", fsdp * tensor),
        "num_experts": ("mesh.fsdp * mesh.tensor", fsdp * tensor),
        "intermediate_size": ("mesh.fsdp * mesh.tensor", 1 if model.num_experts else fsdp * tensor),
        "vocab_size": ("mesh.fsdp * mesh.tensor", fsdp * tensor),
    }
    for name, (axes, shards) in needs.items():
        size = getattr(model, name)
        if size % shards:
            fits = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % n == 0]
            raise UsageError(
                f"{axes}={shards} does not divide the model's {name}={size}. Use {axes} in {fits}."
            )
