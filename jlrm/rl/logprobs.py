"""Log-probabilities under the sampling distribution, without ever holding `[B, C, V]`.

The LM head is applied to one chunk of positions at a time. Each device keeps its part of the
vocabulary for the whole call, and the hidden states of a chunk are sent to all parts. Sending
weights instead would cost more, and again for every chunk (compiled for 7B on v5e-16: 8.1 GiB
gathered in chunks of 256, against 0.44 GiB of states). The vocabulary is spread over `tensor` and
`fsdp`, not over `data`: the links between slices are slow. `summed_token_loss` takes its gradient
in the same pass as its value, so that a chunk's logits are computed once.

Letters as in mesh.py, with C over the positions that predict a completion token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlrm.rl.distribution import Distribution, Vocabulary, kept_logits
from jlrm.runtime import exact
from jlrm.runtime.mesh import AXES, Layout

# Positions in a chunk of one device, over all its rows. With 152k ids they are 148 MiB of logits.
# On one CPU core 256 reach 70 to 80 % of the speed of a bare matrix product; 64 or 1024 take 10 to
# 20 % longer.
CHUNK_POSITIONS = 256
VOCABULARY_AXES = ("fsdp", "tensor")  # V in the training layout too, so the head does not move
ROWS, HEAD_ROWS, WHOLE = PartitionSpec(AXES), PartitionSpec(VOCABULARY_AXES), PartitionSpec()

TokenLoss = Callable[[Array, Array, Any], tuple[Array, dict[str, Array]]]


def completion_logps(
    states: Float[Array, "B C D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B C"],
    count: Int[Array, ""],
    distribution: Distribution,
    layout: Layout,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Return each token's log-probability and the entropy of its distribution, in nats (float32).

    `states[b, c]` predicts `tokens[b, c]`. Top-k and top-p never remove that token. Positions from
    `count` on are padding in every row: their outputs are 0, and chunks of them are skipped. The
    number of chunks is known only at run time, so there is no reverse-mode gradient: training uses
    `summed_token_loss`. The number of devices must divide B.
    """

    def local(share: _Share) -> tuple[Array, Array]:
        def step(start: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
            chunk = share.apply_head(start)
            return share.put(start, outputs, share.own(start, chunk.logp, chunk.entropy))

        zeros = jnp.zeros(share.tokens.shape, jnp.float32)
        return share.run(step, (zeros, zeros))

    arrays = _Arrays(states, head, tokens, count, None)
    logp, entropy = _spread(local, ROWS, arrays, distribution, layout)
    # Chunks are whole, so outputs may be longer than C.
    return logp[:, : tokens.shape[1]], entropy[:, : tokens.shape[1]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def summed_token_loss(
    token_loss: TokenLoss,
    states: Float[Array, "B C D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B C"],
    count: Int[Array, ""],
    data: Any,
    distribution: Distribution,
    layout: Layout,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return a loss that is a sum over tokens, and further sums over tokens, all in float32.

    `token_loss(logp, entropy, data)` gets one chunk of positions: `[b, c]` of log-probabilities, of
    entropies and of each array `[B, C, ...]` in `data`. It returns the chunk's part of the loss and
    of the other sums. It must not close over traced arrays. A chunk may reach past `count`, and
    past C. Log-probability and entropy are 0 there, without a gradient, and past C `data` is 0 too:
    such positions must get no weight. The rest is as in `completion_logps`.

    The head may have a leading axis over slices, a copy for each (model/gradient_sums.py): then so
    has its gradient, which is not summed over them.

    The gradient is that of the loss alone, by `states` and `head`. It is computed with the value: a
    chunk then costs three products with the head, where recomputation costs four. A call that is
    not differentiated costs one.
    """

    def local(share: _Share) -> Any:
        zeros = share.zero_sums(token_loss)
        step = partial(_add_value, token_loss, share)
        # One sum over devices a call, not one a chunk.
        return jax.lax.psum(share.run(step, zeros), AXES)

    arrays = _Arrays(states, head, tokens, count, data)
    return _spread(local, WHOLE, arrays, distribution, layout)


def _forward(
    token_loss: TokenLoss,
    states: Array,
    head: Array,
    tokens: Array,
    count: Array,
    data: Any,
    distribution: Distribution,
    layout: Layout,
) -> tuple[Any, tuple[Array, Array]]:
    """Return the outputs of `summed_token_loss`, and the loss's gradients by states and head."""

    def local(share: _Share) -> Any:
        # The head's gradient adds up over all chunks, so it is float32. Each position's state
        # belongs to one chunk, so its gradient keeps the dtype of the states.
        gradients = jnp.zeros_like(share.states), jnp.zeros(share.head.shape[::-1], jnp.float32)
        step = partial(_add_gradients, token_loss, share)
        sums, by_states, by_head = share.run(step, (share.zero_sums(token_loss), *gradients))
        # Each device has gathered the states of all that share its vocabulary; `data` is left.
        by_head = by_head.T[None] if head.ndim == 3 else jax.lax.psum(by_head, "data").T
        return jax.lax.psum(sums, AXES), by_states, by_head

    out_specs = (WHOLE, ROWS, _head_spec(head))
    arrays = _Arrays(states, head, tokens, count, data)
    sums, by_states, by_head = _spread(local, out_specs, arrays, distribution, layout)
    # The head was padded to a whole number of rows per device.
    by_head = by_head[..., : head.shape[-2], :].astype(head.dtype)
    return sums, (by_states[:, : tokens.shape[1]], by_head)


def _backward(
    token_loss: TokenLoss,
    distribution: Distribution,
    layout: Layout,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, Any],
) -> tuple[Array | None, ...]:
    # The loss is a scalar, so the gradient of any function of it is a multiple of what is stored.
    by_states, by_head = ((cotangents[0] * x).astype(x.dtype) for x in gradients)
    return by_states, by_head, None, None, None


summed_token_loss.defvjp(_forward, _backward)


def _add_value(token_loss: TokenLoss, share: _Share, start: Array, sums: Any) -> Any:
    """Add the loss and the sums of the chunk at `start`."""
    chunk = share.apply_head(start)
    own = share.own(start, chunk.logp, chunk.entropy)
    return _add(sums, token_loss(*own, share.at(start, share.data)))


def _add_gradients(token_loss: TokenLoss, share: _Share, start: Array, totals: Any) -> Any:
    """Add the loss, the sums and the gradients of the chunk at `start`."""
    sums, states_gradient, head_gradient = totals
    chunk = share.apply_head(start)

    def loss(logp: Array, entropy: Array) -> tuple[Array, dict[str, Array]]:
        return token_loss(*share.own(start, logp, entropy), share.at(start, share.data))

    # Autodiff goes through the token loss only; below it the formulas of `gradient` take over.
    value, pull, others = jax.vjp(loss, chunk.logp, chunk.entropy, has_aux=True)
    # Each device knows the derivatives of its own rows (0 for others); summed, all know all rows.
    by_logp, by_entropy = share.vocabulary.sum_of_devices(pull(jnp.ones_like(value)))
    by_logits = chunk.gradient(by_logp, by_entropy, share.distribution, share.vocabulary)
    # The products run in compute dtype and accumulate in float32, as everywhere in the model.
    by_logits = by_logits.astype(share.states.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    # A device sees only its ids, so the gradient by a state is a sum over devices.
    by_states = share.vocabulary.scatter(product("RV,VD->RD", by_logits, share.head))
    by_states = by_states.astype(share.states.dtype).reshape(-1, share.chunk, by_states.shape[-1])
    # Summed as [D, V], which makes this product 10 to 20 % faster on CPUs.
    by_head = product("RD,RV->DV", chunk.states, by_logits)
    return (
        _add(sums, (value, others)),
        share.put(start, states_gradient, by_states),
        head_gradient + by_head,
    )


def _add(totals: Any, terms: Any) -> Any:
    return jax.tree.map(jnp.add, totals, terms)


class _ChunkLogits(NamedTuple):
    """A chunk of positions: rows of all devices that share the vocabulary, ids of this one.

    Rows and positions are one axis, `B·C`: with a separate axis of one row, CPUs take three times
    as long.
    """

    states: Float[Array, "B*C D"]
    tokens: Int[Array, "B*C 1"]
    logits: Float[Array, "B*C v"]
    log_mass: Float[Array, "B*C 1"]  # log of the sum of exp(logits) over all ids
    logp: Float[Array, "B*C 1"]
    entropy: Float[Array, "B*C 1"]

    def gradient(
        self, by_logp: Array, by_entropy: Array, distribution: Distribution, vocabulary: Vocabulary
    ) -> Float[Array, "B*C v"]:
        """Return the gradient by the head's logits, given those by log-probability and entropy.

        With l = log p: d logp / d logit = [id is the token] - p, dH / d logit = -p (l + H).
        """
        # The head's logits were divided by the temperature; this is the chain rule.
        temperature = distribution.temperature or 1.0
        by_logp, by_entropy = by_logp / temperature, by_entropy / temperature
        # The logit of an id that does not exist is a constant, so it has no gradient.
        by_token = jnp.where(self.tokens < (distribution.num_ids or vocabulary.size), by_logp, 0.0)
        # A removed id (logit -1e30) has p = 0 exactly, so it gets no gradient here.
        log_probs = self.logits - self.log_mass
        shared = by_logp + by_entropy * self.entropy + by_entropy * log_probs
        is_token = vocabulary.ids(self.logits) == self.tokens
        return jnp.where(is_token, by_token, 0.0) - jnp.exp(log_probs) * shared


class _Arrays(NamedTuple):
    """The arrays of a call, as `summed_token_loss` takes them."""

    states: Float[Array, "B C D"]
    head: Float[Array, "V D"]
    tokens: Int[Array, "B C"]
    count: Array | int
    data: Any


@dataclass(frozen=True)
class _Share:
    """One device's part of a call; its positions are padded to a whole number of chunks."""

    states: Float[Array, "b C D"]
    head: Float[Array, "v D"]
    tokens: Int[Array, "b C"]
    count: Int[Array, ""]
    data: Any
    chunk: int  # positions
    distribution: Distribution
    vocabulary: Vocabulary

    def run(self, step: Callable[[Array, Any], Any], initial: Any) -> Any:
        """Fold `step(start, carry)` over the chunks that begin before `count`."""
        # `count` is the same on all devices: each must call the collectives of `step` as often.
        count = jnp.minimum(self.count, self.tokens.shape[1])
        num_chunks = (count + self.chunk - 1) // self.chunk
        return jax.lax.fori_loop(0, num_chunks, lambda i, x: step(i * self.chunk, x), initial)

    def at(self, start: Array | int, tree: Any) -> Any:
        """Return the chunk at `start` of each array."""
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.chunk, axis=1), tree
        )

    def put(self, start: Array, tree: Any, parts: Any) -> Any:
        """Write the chunk at `start` of each array."""
        return jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=1), tree, parts
        )

    def own(self, start: Array, logp: Array, entropy: Array) -> tuple[Array, Array]:
        """Return log-probability and entropy of this device's rows, 0 from `count` on."""
        positions = start + jnp.arange(self.chunk)[None, :]
        is_real = jnp.broadcast_to(positions < self.count, (self.tokens.shape[0], self.chunk))
        logp, entropy = (
            jnp.where(is_real, self.vocabulary.own(x, is_real.size).reshape(is_real.shape), 0.0)
            for x in (logp, entropy)
        )
        return logp, entropy

    def apply_head(self, start: Array) -> _ChunkLogits:
        """Apply the head to the chunk at `start` of all devices that share the vocabulary."""
        vocabulary = self.vocabulary
        states, tokens = self.at(start, (self.states, self.tokens))
        states = vocabulary.gather(states.reshape(-1, states.shape[-1]))
        tokens = vocabulary.gather(tokens.reshape(-1, 1))
        logits = jnp.einsum("RD,VD->RV", states, self.head, preferred_element_type=jnp.float32)
        # The token is kept whatever top-k says: an update may have moved it out (`kept_logits`).
        logits = kept_logits(logits, self.distribution, tokens[:, 0], vocabulary)
        highest = vocabulary.max(logits)
        shifted = logits - highest
        mass = jnp.exp(shifted)
        # H = log sum(e^x) - sum(x e^x) / sum(e^x): both sums in one exchange between devices.
        total, moment = vocabulary.sum(mass, mass * shifted)
        chosen = vocabulary.value_of(tokens, shifted)
        is_exact = self.distribution.exact
        log_total = exact.log_total(mass)[..., None] if is_exact else jnp.log(total)
        logp, entropy = chosen - log_total, log_total - moment / total
        return _ChunkLogits(states, tokens, logits, highest + log_total, logp, entropy)

    def zero_sums(self, token_loss: TokenLoss) -> Any:
        """Return a loss and sums of 0."""
        # Which sums there are, only the token loss knows; it is asked without computing anything.
        zeros = self.at(0, jnp.zeros(self.tokens.shape, jnp.float32))
        shapes = jax.eval_shape(token_loss, zeros, zeros, self.at(0, self.data))
        return jax.tree.map(lambda _: jnp.float32(0), shapes)


def _spread(
    local: Callable[[_Share], Any],
    out_specs: Any,
    arrays: _Arrays,
    distribution: Distribution,
    layout: Layout,
) -> Any:
    """Run `local` on every device with its share: rows over all axes, ids over VOCABULARY_AXES."""
    states, head, tokens, count, data = arrays
    # Without axes of size 1, so that programs of one device hold no collectives.
    axes = tuple(axis for axis in VOCABULARY_AXES if layout.mesh.shape[axis] > 1)
    num_shards = math.prod(layout.mesh.shape[axis] for axis in axes)
    vocabulary = Vocabulary(head.shape[-2], axes, num_shards)
    # Padded ids are past `vocabulary.size`, so `kept_logits` removes them.
    padding = ((0, 0),) * (head.ndim - 2) + ((0, -head.shape[-2] % num_shards), (0, 0))
    head = jnp.pad(head.astype(states.dtype), padding)

    def run(states: Array, head: Array, tokens: Array, count: Array, data: Any) -> Any:
        num_rows, num_positions = tokens.shape
        num_chunks = -(-num_positions // max(CHUNK_POSITIONS // num_rows, 1))
        # Even chunks: of 300 positions two of 150, not 256 and 44 filled up to 256.
        chunk = -(-num_positions // num_chunks)

        def pad(x: Array) -> Array:
            missing = num_chunks * chunk - num_positions
            return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))

        head = head[0] if head.ndim == 3 else head
        states, tokens, data = jax.tree.map(pad, (states, tokens, data))
        return local(_Share(states, head, tokens, count, data, chunk, distribution, vocabulary))

    # check_vma: checked, each carry of the loops would have to declare the axes it varies over.
    spread = jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(ROWS, _head_spec(head), ROWS, WHOLE, ROWS),
        out_specs=out_specs,
        check_vma=False,
    )
    return spread(states, head, tokens, jnp.asarray(count, jnp.int32), data)


def _head_spec(head: Array) -> PartitionSpec:
    return PartitionSpec("data", VOCABULARY_AXES) if head.ndim == 3 else HEAD_ROWS
