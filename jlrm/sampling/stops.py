"""Stop strings on the device: a byte automaton, lifted to whole tokens.

A judge is done after its second `</answer>`. A tokenizer splits that text in many ways, and joins
parts of it with the text around it. So the strings are recognised in bytes. A Knuth-Morris-Pratt
automaton counts occurrences. The host runs the bytes of every token through it from every state,
once per run. The result is a table `[states, V]`, which a decoding loop indexes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class StopTables(NamedTuple):
    """One automaton per stop string: it begins in state 0, and `accept[a]` ends the sequence.

    NumPy arrays on the host, JAX arrays inside a program.
    """

    tables: Int[Any, "A states V"]  # the state after a token
    accept: Int[Any, " A"]


def stop_tables(
    strings: Mapping[str, int], token_bytes: Sequence[bytes], vocab_size: int
) -> StopTables:
    """Build the tables of `{text: number of the occurrence that ends the sequence}`.

    Occurrences do not overlap. An id without bytes (beyond the tokenizer's) keeps the state.
    """
    automata = [_byte_automaton(text.encode(), count) for text, count in strings.items()]
    num_states = max((len(automaton) for automaton in automata), default=1)
    tables = np.zeros((len(automata), num_states, vocab_size), np.int16)
    for table, automaton in zip(tables, automata, strict=True):
        table[: len(automaton)] = _lift(automaton, token_bytes, vocab_size)
    return StopTables(tables, np.array([len(automaton) - 1 for automaton in automata], np.int16))


def has_ended(
    stops: StopTables,
    stop_ids: tuple[int, ...],
    states: Int[Array, "A P Z"],
    tokens: Int[Array, "P Z"],
) -> Bool[Array, "P Z"]:
    """Return which sequences end with these tokens; `states` are the automata's after them."""
    is_end = jnp.any(states == stops.accept[:, None, None], axis=0)
    if stop_ids:
        is_end |= jnp.any(tokens[..., None] == jnp.array(stop_ids)[None, None], axis=-1)
    return is_end


def _byte_automaton(pattern: bytes, count: int) -> Int[np.ndarray, "states 256"]:
    """Return transitions that count occurrences of `pattern`: state = count · len + matched."""
    size = len(pattern)
    within = np.zeros((size, 256), np.int16)
    fallback = 0  # the state of the longest proper suffix that is also a prefix
    for matched, byte in enumerate(pattern):
        within[matched] = within[fallback] if matched else 0
        within[matched, byte] = matched + 1
        if matched:
            fallback = within[fallback, byte]
    # A full match is state `size` of its block, which is state 0 of the next: no overlaps.
    blocks = [np.minimum(within + seen * size, size * count) for seen in range(count)]
    # The last state keeps itself: a sequence that has ended stays ended.
    return np.concatenate([*blocks, np.full((1, 256), size * count, np.int16)])


def _lift(
    automaton: Int[np.ndarray, "states 256"], token_bytes: Sequence[bytes], vocab_size: int
) -> Int[np.ndarray, "states V"]:
    """Return the state after a whole token, for every state before it."""
    num_states = len(automaton)
    lifted = np.tile(np.arange(num_states, dtype=np.int16)[:, None], (1, vocab_size))
    lengths = np.array([len(text) for text in token_bytes], np.int64)
    # Longest first: the tokens that have a byte at a given position come first in this order.
    order = np.argsort(-lengths, kind="stable")
    padded = np.zeros((len(token_bytes), int(lengths.max(initial=0))), np.uint8)
    for token, text in enumerate(token_bytes):
        padded[token, : len(text)] = np.frombuffer(text, np.uint8)
    for position in range(padded.shape[1]):
        active = order[: int(np.sum(lengths > position))]
        lifted[:, active] = automaton[lifted[:, active], padded[active, position][None]]
    return lifted
