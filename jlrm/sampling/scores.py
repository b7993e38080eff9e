"""Scores of a reward model: what its head gives the state at the last token of each text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlrm.model import qwen
from jlrm.model.qwen import Params
from jlrm.model.visibility import BLOCK, Packing
from jlrm.runtime.mesh import compiler_options, global_array, host_array, replicate
from jlrm.sampling.policy import Network


class Scorer:
    """Scores texts in batches of one size; each width, a multiple of BLOCK, is one program."""

    def __init__(self, network: Network, batch_size: int) -> None:
        self._network = network
        self._size = -(-batch_size // network.mesh.size) * network.mesh.size
        self._program = scores_program(network)

    def __call__(
        self, params: Params, texts: Sequence[Sequence[int]]
    ) -> Float[np.ndarray, "N labels"]:
        """Return the scores of each text, given as token ids, in their order.

        params: as in training, and of a model with `num_labels`.
        """
        scores = np.zeros((len(texts), self._network.model.num_labels), np.float32)
        places = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(places), self._size):
            own = places[start : start + self._size]
            scores[own] = self._batch(params, [texts[i] for i in own])
        return scores

    def _batch(self, params: Params, texts: Sequence[Sequence[int]]) -> np.ndarray:
        layout = self._network.training
        width = -(-max(map(len, texts)) // BLOCK) * BLOCK
        tokens, lengths = np.zeros((self._size, width), np.int32), np.ones(self._size, np.int32)
        for i, text in enumerate(texts):
            tokens[i, : len(text)], lengths[i] = text, len(text)
        rows = global_array(tokens, layout.activation("B -"))
        scores = self._program(params, rows, global_array(lengths, layout.activation("B")))
        return host_array(replicate(layout, scores))[: len(texts)]


def scores_program(network: Network) -> Any:
    """Return the program params, tokens, lengths -> scores."""
    options = compiler_options(network.mesh, network.model.exact)
    return jax.jit(partial(last_scores, network), compiler_options=options)


def abstract_texts(network: Network, num_texts: int, longest: int) -> tuple[Any, Any]:
    """Return a batch of texts of so many tokens as abstract arrays: tokens and lengths."""
    layout, size = network.training, network.mesh.size
    shape = -(-num_texts // size) * size, -(-longest // BLOCK) * BLOCK
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.activation("B -"))
    return tokens, jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=layout.activation("B"))


def last_scores(
    network: Network, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Float[Array, "B labels"]:
    """Return the scores of right-padded texts."""
    config, layout = network.model, network.training
    params = qwen.to_compute_dtype(config, params)
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    group = (slots < lengths[:, None]).astype(jnp.int32)
    packing = Packing(group, jnp.zeros_like(group), jnp.full_like(lengths, tokens.shape[1]))
    hidden = qwen.hidden_states(config, layout, params, tokens, slots, packing)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return qwen.scores(params, last)[:, 0]
