"""Expected scores: how probable each score was where a judge wrote one.

A score is a number in a text, and a tokenizer may have several ways to write it there: "10" as one
token or as "1" and "0", with the bracket before it or with the one behind it. So a place has a
tree. Its root is the text before the score, by the tokens that were written; where a token holds
the score and something before it, that something is a rest which the paths must spell too. A node
is a way to have written the rest and some digits. A number is complete when it can't grow into
another score, or when no digit follows:

    P("10") = P(1) P(0 | 1) + P(10)        P("1") = P(1) (1 - P(digit | 1))

Numbers that are no scores are left out and what remains is made to sum to 1. What follows a point
does not count: 7.5 is a 7 here.

All nodes are computed in one pass over prompt and judgement: what was written stands in the row
once, and the paths of the trees are branches behind it, which see the part that they leave
(`decode.Branches`). The head is applied to the nodes alone. Probabilities are the model's own: at
temperature 1, of all ids.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlrm.config import UsageError
from jlrm.model.qwen import Params
from jlrm.runtime.mesh import global_array, host_array, replicate
from jlrm.sampling import decode
from jlrm.sampling.decode import Branches
from jlrm.sampling.policy import Network
from jlrm.sampling.writer import widths

DIGITS = b"0123456789"
FEWEST_NODES, FEWEST_IDS = 4, 16  # of a program; more are filled up to a power of two
MOST_NODES = 256  # whose logits are held at once: 150 MiB with 152k ids


class Asked(NamedTuple):
    """A prompt, its completions, and where the scores of each begin, in bytes; none: no scores."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]
    places: Sequence[Sequence[int]]


@dataclass
class Node:
    """A way to have come to some digits of a number, and the tokens that may follow there."""

    path: tuple[int, ...]  # tokens behind the written ones
    score: int | None  # the score that stands if no digit follows
    ids: list[int] = field(default_factory=list)  # of tokens that matter
    ends: list[int | None] = field(default_factory=list)  # the score that each completes
    children: list[int | None] = field(default_factory=list)  # the node that each leads to
    digits: list[bool] = field(default_factory=list)  # whether each continues the number


class Expectation:
    """Computes expected scores of a model's judgements; `spelled` are the bytes of its tokens.

    Raises:
      UsageError: a scale with numbers below 0.
    """

    def __init__(self, network: Network, spelled: Sequence[bytes], scale: tuple[int, int]) -> None:
        if scale[0] < 0:
            raise UsageError(f"Expected scores need a scale from 0 on, got {scale[0]}.")
        self.spelled, self._network = spelled, network
        self._scores = {str(score).encode(): score for score in range(scale[0], scale[1] + 1)}
        self._prefixes = {text[:i] for text in self._scores for i in range(len(text))}
        self._by_first: dict[int, list[int]] = {}
        for token, text in enumerate(spelled[: network.num_ids or None]):
            if text:
                self._by_first.setdefault(text[0], []).append(token)
        self.tree = functools.cache(self._tree)
        self._program = jax.jit(partial(log_probabilities, network))

    def __call__(
        self, weights: Params, asked: Sequence[Asked]
    ) -> list[tuple[tuple[float, ...] | None, ...]]:
        """Return the expected score at each place of each completion; None where it has no places.

        weights: laid out for decoding. All that is asked runs in one pass.
        """
        layout = self._network.decoding
        rows = [self._row(each) for each in asked]
        if not any(row.nodes for row in rows):
            return [(None,) * len(each.completions) for each in asked]
        filled = [*rows, *[rows[-1]] * (-len(rows) % layout.num_shards("P"))]
        logps = host_array(replicate(layout, self._program(weights, *self._arrays(filled)))).astype(
            np.float64
        )
        return [
            tuple(self._expected(row, found, i) for i in range(len(each.completions)))
            for row, found, each in zip(rows, logps, asked, strict=False)
        ]

    def _tree(self, rest: bytes) -> list[Node]:
        """Return the nodes behind a context that `rest` and a number follow, the root first."""
        nodes, states = [Node((), None)], [(rest, b"")]
        for node, (rest, number) in zip(nodes, states, strict=True):  # both grow meanwhile
            for first in rest[:1] or DIGITS:
                for token in self._by_first.get(first, ()):
                    text = self.spelled[token]
                    is_inside = rest.startswith(text)
                    if not is_inside and not text.startswith(rest):
                        continue
                    left, said = rest[len(text) :], text[len(rest) :]
                    follows = said.lstrip(DIGITS)
                    whole = number + said[: len(said) - len(follows)]
                    goes_on = (is_inside and not said) or (not follows and whole in self._prefixes)
                    node.ids.append(token)
                    node.digits.append(not rest)
                    node.ends.append(None if goes_on else self._scores.get(whole))
                    node.children.append(len(nodes) if goes_on else None)
                    if goes_on:
                        score = None if left else self._scores.get(whole)
                        nodes.append(Node((*node.path, token), score))
                        states.append((left, whole))
        return nodes

    def _row(self, asked: Asked) -> _Row:
        """Lay out a prompt, what was written up to its last score, and the branches."""
        row = _Row(list(asked.prompt_ids))
        row.add_segment(len(row.tokens), 0, 0, 0)
        branches: list[tuple[Node, int, int, int, int]] = []
        for number, (ids, places) in enumerate(zip(asked.completions, asked.places, strict=True)):
            ends = np.cumsum([len(self.spelled[token]) for token in ids])
            at = [int(np.searchsorted(ends, place, side="right")) for place in places]
            begin = len(row.tokens)
            if at:
                row.tokens += ids[: max(at)]
                row.add_segment(max(at), begin, 0, 0, len(asked.prompt_ids))
            for order, (place, index) in enumerate(zip(places, at, strict=True)):
                start = int(ends[index - 1]) if index else 0
                rest = self.spelled[ids[index]][: place - start]
                for node in self.tree(rest):
                    key = number, order
                    context = begin + index - 1 if index else len(asked.prompt_ids) - 1
                    if not node.path:
                        row.nodes.append((key, node, context))
                    else:
                        branches.append((node, *key, begin, begin + index))
        for node, number, order, begin, limit in branches:
            own = len(row.tokens)
            row.tokens += node.path
            position = len(asked.prompt_ids) + limit - begin
            row.add_segment(len(node.path), own, begin, limit, position)
            row.nodes.append(((number, order), node, len(row.tokens) - 1))
        return row

    def _arrays(self, rows: Sequence[_Row]) -> tuple[Any, ...]:
        layout = self._network.decoding
        longest = max(len(row.tokens) for row in rows)
        width = next(w for w in widths(1 << longest.bit_length()) if w >= longest)
        num_nodes = _filled(max(len(row.nodes) for row in rows), FEWEST_NODES)
        listed = [[node.ids for _, node, _ in row.nodes] for row in rows]
        num_ids = _filled(max(len(ids) for own in listed for ids in own), FEWEST_IDS)
        slots = np.zeros((len(rows), num_nodes), np.int32)
        ids = np.zeros((len(rows), num_nodes, num_ids), np.int32)
        cells = np.zeros((5, len(rows), width), np.int32)
        for i, row in enumerate(rows):
            cells[0, i, : len(row.tokens)] = row.tokens
            cells[1:, i, : len(row.tokens)] = np.array(row.cells).T
            slots[i, : len(row.nodes)] = [slot for _, _, slot in row.nodes]
            for j, own in enumerate(listed[i]):
                ids[i, j, : len(own)] = own
        shared = np.array([row.num_shared for row in rows], np.int32)
        tokens, positions, begin, limit, own = (
            global_array(each, layout.activation("P T")) for each in cells
        )
        branches = Branches(
            positions, global_array(shared, layout.activation("P")), begin, limit, own
        )
        return (
            tokens,
            branches,
            global_array(slots, layout.activation("P -")),
            global_array(ids, layout.activation("P - -")),
        )

    def _expected(
        self, row: _Row, logps: Float[np.ndarray, "M ids"], number: int
    ) -> tuple[float, ...] | None:
        """Return the expected scores of a completion of a row."""
        trees: dict[int, list[tuple[Node, np.ndarray]]] = {}
        for (own, order), node, place in sorted(row.numbered(), key=lambda each: each[0]):
            if own == number:
                trees.setdefault(order, []).append((node, logps[place]))
        means = tuple(_mean(trees[order]) for order in sorted(trees))
        return means if means and not any(map(math.isnan, means)) else None


class _Row:
    """A row that is being laid out: its tokens, and of each slot position, begin, limit, own."""

    def __init__(self, prompt_ids: list[int]) -> None:
        self.tokens, self.num_shared = prompt_ids, len(prompt_ids)
        self.cells: list[tuple[int, int, int, int]] = []
        self.nodes: list[tuple[tuple[int, int], Node, int]] = []  # of a place, with its slot

    def add_segment(self, length: int, own: int, begin: int, limit: int, position: int = 0) -> None:
        """Say of the next `length` slots what they see."""
        self.cells += [(position + i, begin, limit, own) for i in range(length)]

    def numbered(self) -> list[tuple[tuple[int, int], Node, int]]:
        """Return the nodes, each with its number in the row in place of its slot."""
        return [(key, node, number) for number, (key, node, _) in enumerate(self.nodes)]


def log_probabilities(
    network: Network,
    params: Params,
    tokens: Int[Array, "P T"],
    branches: Branches,
    slots: Int[Array, "P M"],
    ids: Int[Array, "P M I"],
) -> Float[Array, "P M I"]:
    """Return the log-probabilities of some tokens behind some slots of a row, in float32."""
    model, layout = network.model, network.decoding
    hidden, _ = decode.prefill(model, layout, params, tokens, branches)
    states = jnp.take_along_axis(hidden, slots[..., None], axis=1)

    def of_part(part: tuple[Array, Array]) -> Array:
        states, ids = part
        logits = decode.logits(model, layout, params, states.reshape(-1, states.shape[-1]))
        if network.num_ids:  # the head may have more rows than there are ids
            is_id = jnp.arange(logits.shape[1])[None] < network.num_ids
            logits = jnp.where(is_id, logits, decode.MASKED)
        logps = jax.nn.log_softmax(logits, axis=-1).reshape(*ids.shape[:2], -1)
        return jnp.take_along_axis(logps, ids, axis=2)

    num_rows, num_nodes = slots.shape  # of nodes a power of two
    num_parts = min(_filled(-(-slots.size // MOST_NODES), 1), num_nodes)

    def parted(x: Array) -> Array:
        return x.reshape(num_rows, num_parts, -1, x.shape[-1]).swapaxes(0, 1)

    logps = jax.lax.map(of_part, (parted(states), parted(ids)))
    return logps.swapaxes(0, 1).reshape(ids.shape)


def _mean(tree: Sequence[tuple[Node, np.ndarray]]) -> float:
    """Return the mean score of a tree whose nodes are given with the tokens' log-probabilities."""
    mass: dict[int, float] = {}
    reached = [0.0] + [-math.inf] * (len(tree) - 1)  # log-probability of each node's path
    for i, (node, logps) in enumerate(tree):  # a node stands behind the one that leads to it
        for j, (end, child) in enumerate(zip(node.ends, node.children, strict=True)):
            if child is not None:
                reached[child] = reached[i] + logps[j]
            elif end is not None:
                mass[end] = mass.get(end, 0.0) + math.exp(reached[i] + logps[j])
        if node.score is not None:
            is_digit = np.array(node.digits, bool)
            more = float(np.exp(logps[: len(is_digit)])[is_digit].sum())
            rest = math.exp(reached[i]) * max(1 - more, 0.0)
            mass[node.score] = mass.get(node.score, 0.0) + rest
    total = math.fsum(mass.values())
    return math.fsum(score * part for score, part in mass.items()) / total if total else math.nan


def _filled(number: int, fewest: int) -> int:
    return max(fewest, 1 << (number - 1).bit_length())
