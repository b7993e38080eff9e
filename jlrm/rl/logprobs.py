"""Log-probabilities under the sampling distribution, without ever holding `[B, C, V]`.

The LM head is applied to a chunk of positions at a time. Each device keeps its part of the
vocabulary for the whole call, and the states of a chunk travel to it: weights would be far more to
move, and moved again for every chunk. The vocabulary is spread over `tensor` and `fsdp`, not over
`data`, whose links between slices are slow. `summed_token_loss` takes its gradient in the pass that
takes its value, so that the chunk's logits are made once.

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
from jlrm.runtime.mesh import AXES, Layout

# Positions of a chunk on a device, over all its rows. With 152k ids that is 148 MiB of logits. On
# one CPU core, 256 reach 70 to 80 % of a bare product of matrices; 64 or 1024 take 10 to 20 % more.
CHUNK_POSITIONS = 256
VOCABULARY_AXES = ("fsdp", "tensor")  # as the training layout has V, so that the head stays put
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

    `states[b, c]` predicts `tokens[b, c]`, which counts among the kept ids. Positions from `count`
    on are padding in every row: their outputs are 0, and chunks of them are skipped. The number of
    chunks is known only at run time, so there is no reverse-mode gradient: training uses
    `summed_token_loss`. B must be divisible by the number of devices.
    """

    def local(share: _Share) -> tuple[Array, Array]:
        def step(start: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
            scored = share.score(start)
            return share.put(start, outputs, share.own(start, scored.logp, scored.entropy))

        zeros = jnp.zeros(share.tokens.shape, jnp.float32)
        return share.run(step, (zeros, zeros))

    logp, entropy = _spread(local, ROWS, states, head, tokens, count, None, distribution, layout)
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

    `token_loss(logp, entropy, data)` gets a chunk of positions, `[b, c]` of each, and of the arrays
    `[B, C, ...]` in `data`; it returns the chunk's part of the loss and of the other sums. It must
    hold no traced arrays of its own. A chunk may pass `count` and even C: there log-probability and
    entropy are 0 without a gradient, and beyond C `data` is 0 too, so give such positions no
    weight. The rest is as in `completion_logps`.

    The gradient is that of the loss alone, by `states` and `head`. It is made with the value, so
    that a chunk costs three products with the head instead of the four of recomputation; a call
    that is not differentiated costs one.
    """

    def local(share: _Share) -> Any:
        zeros = share.zero_sums(token_loss)
        step = partial(_add_value, token_loss, share)
        return jax.lax.psum(share.run(step, zeros), AXES)

    return _spread(local, WHOLE, states, head, tokens, count, data, distribution, layout)


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
    """Return what `summed_token_loss` does, and the loss's gradients by states and head."""

    def local(share: _Share) -> Any:
        gradients = jnp.zeros_like(share.states), jnp.zeros(share.head.shape[::-1], jnp.float32)
        step = partial(_add_gradients, token_loss, share)
        sums, by_states, by_head = share.run(step, (share.zero_sums(token_loss), *gradients))
        return jax.lax.psum(sums, AXES), by_states, jax.lax.psum(by_head, "data").T

    out_specs = (WHOLE, ROWS, HEAD_ROWS)
    sums, by_states, by_head = _spread(
        local, out_specs, states, head, tokens, count, data, distribution, layout
    )
    by_head = by_head[: head.shape[0]].astype(head.dtype)
    return sums, (by_states[:, : tokens.shape[1]], by_head)


def _backward(
    token_loss: TokenLoss,
    distribution: Distribution,
    layout: Layout,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, Any],
) -> tuple[Array | None, ...]:
    by_states, by_head = ((cotangents[0] * x).astype(x.dtype) for x in gradients)
    return by_states, by_head, None, None, None


summed_token_loss.defvjp(_forward, _backward)


def _add_value(token_loss: TokenLoss, share: _Share, start: Array, sums: Any) -> Any:
    """Add the loss and the sums of the chunk at `start`."""
    scored = share.score(start)
    own = share.own(start, scored.logp, scored.entropy)
    return _add(sums, token_loss(*own, share.at(start, share.data)))


def _add_gradients(token_loss: TokenLoss, share: _Share, start: Array, totals: Any) -> Any:
    """Add the loss, the sums and the gradients of the chunk at `start`.

    The head's gradient is summed as `[D, V]`: its product is 10 to 20 % faster on CPUs so.
    """
    sums, states_gradient, head_gradient = totals
    scored = share.score(start)

    def loss(logp: Array, entropy: Array) -> tuple[Array, dict[str, Array]]:
        return token_loss(*share.own(start, logp, entropy), share.at(start, share.data))

    value, pull, others = jax.vjp(loss, scored.logp, scored.entropy, has_aux=True)
    by_scores = share.vocabulary.sum_of_devices(pull(jnp.ones_like(value)))
    by_logits = scored.gradient(by_scores[0], by_scores[1], share.distribution, share.vocabulary)
    by_logits = by_logits.astype(share.states.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_states = share.vocabulary.scatter(product("RV,VD->RD", by_logits, share.head))
    by_states = by_states.astype(share.states.dtype).reshape(-1, share.chunk, by_states.shape[-1])
    by_head = product("RD,RV->DV", scored.states, by_logits)
    return (
        _add(sums, (value, others)),
        share.put(start, states_gradient, by_states),
        head_gradient + by_head,
    )


def _add(totals: Any, terms: Any) -> Any:
    return jax.tree.map(jnp.add, totals, terms)


class _ChunkLogits(NamedTuple):
    """A chunk of positions: its rows are those of all devices, its logits this device's.

    Rows and positions are one axis, `B·C`: with an axis of one row CPUs take thrice the time.
    """

    states: Float[Array, "B*C D"]
    tokens: Int[Array, "B*C 1"]
    logits: Float[Array, "B*C v"]
    log_mass: Float[Array, "B*C 1"]  # log of the sum of exp(logits)
    logp: Float[Array, "B*C 1"]
    entropy: Float[Array, "B*C 1"]

    def gradient(
        self, by_logp: Array, by_entropy: Array, distribution: Distribution, vocabulary: Vocabulary
    ) -> Float[Array, "B*C v"]:
        """Return a gradient by the head's logits, given those by log-probability and entropy.

        With p = exp(l): d logp / d logit = [id is the token] - p, dH / d logit = -p (l + H).
        """
        temperature = distribution.temperature or 1.0
        by_logp, by_entropy = by_logp / temperature, by_entropy / temperature
        # The logit of an id that doesn't exist is a constant.
        by_token = jnp.where(self.tokens < (distribution.num_ids or vocabulary.size), by_logp, 0.0)
        log_probs = self.logits - self.log_mass
        shared = by_logp + by_entropy * self.entropy + by_entropy * log_probs
        is_token = vocabulary.ids(self.logits) == self.tokens
        return jnp.where(is_token, by_token, 0.0) - jnp.exp(log_probs) * shared


@dataclass(frozen=True)
class _Share:
    """One device's part of a call, whose positions are padded to a whole number of chunks."""

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
        """Return the scores of this device's rows, 0 from `count` on."""
        positions = start + jnp.arange(self.chunk)[None, :]
        is_real = jnp.broadcast_to(positions < self.count, (self.tokens.shape[0], self.chunk))
        logp, entropy = (
            jnp.where(is_real, self.vocabulary.own(x, is_real.size).reshape(is_real.shape), 0.0)
            for x in (logp, entropy)
        )
        return logp, entropy

    def score(self, start: Array) -> _ChunkLogits:
        """Apply the head to the chunk at `start` of all devices that share the vocabulary."""
        vocabulary = self.vocabulary
        states, tokens = self.at(start, (self.states, self.tokens))
        states = vocabulary.gather(states.reshape(-1, states.shape[-1]))
        tokens = vocabulary.gather(tokens.reshape(-1, 1))
        logits = jnp.einsum("RD,VD->RV", states, self.head, preferred_element_type=jnp.float32)
        logits = kept_logits(logits, self.distribution, tokens[:, 0], vocabulary)
        highest = vocabulary.max(logits)
        shifted = logits - highest
        mass = jnp.exp(shifted)
        total, moment = vocabulary.sum(mass, mass * shifted)
        chosen = vocabulary.value_of(tokens, shifted)
        log_total = jnp.log(total)
        logp, entropy = chosen - log_total, log_total - moment / total
        return _ChunkLogits(states, tokens, logits, highest + log_total, logp, entropy)

    def zero_sums(self, token_loss: TokenLoss) -> Any:
        """Return a loss and sums of 0."""
        scores = self.at(0, jnp.zeros(self.tokens.shape, jnp.float32))
        shapes = jax.eval_shape(token_loss, scores, scores, self.at(0, self.data))
        return jax.tree.map(lambda _: jnp.float32(0), shapes)


def _spread(
    local: Callable[[_Share], Any],
    out_specs: Any,
    states: Array,
    head: Array,
    tokens: Array,
    count: Array,
    data: Any,
    distribution: Distribution,
    layout: Layout,
) -> Any:
    """Run `local` on every device with its share: rows over all of them, ids over most."""
    axes = tuple(axis for axis in VOCABULARY_AXES if layout.mesh.shape[axis] > 1)
    num_shards = math.prod(layout.mesh.shape[axis] for axis in axes)
    vocabulary = Vocabulary(head.shape[0], axes, num_shards)
    head = jnp.pad(head.astype(states.dtype), ((0, -head.shape[0] % num_shards), (0, 0)))

    def run(states: Array, head: Array, tokens: Array, count: Array, data: Any) -> Any:
        num_rows, num_positions = tokens.shape
        num_chunks = -(-num_positions // max(CHUNK_POSITIONS // num_rows, 1))
        chunk = -(-num_positions // num_chunks)

        def pad(x: Array) -> Array:
            missing = num_chunks * chunk - num_positions
            return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))

        states, tokens, data = jax.tree.map(pad, (states, tokens, data))
        return local(_Share(states, head, tokens, count, data, chunk, distribution, vocabulary))

    # Axes are not checked: of a loop with collectives, types of carries would have to be spelt out.
    spread = jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(ROWS, HEAD_ROWS, ROWS, WHOLE, ROWS),
        out_specs=out_specs,
        check_vma=False,
    )
    return spread(states, head, tokens, jnp.asarray(count, jnp.int32), data)
