"""Stop strings on the device: a byte automaton, lifted to whole tokens.

A judge is done after its second `</answer>`. A tokenizer splits that text in many ways, and joins
parts of it with the text around it. So the strings are recognised in bytes. A Knuth-Morris-Pratt
automaton counts occurrences. The host runs the bytes of every token through it from every state,
once per run. The result is a table `[states, V]`, which a decoding loop indexes.

What a judge drafts or quotes while it reasons ends nothing: occurrences count from the end of its
reasoning, `</think>`. Another `</think>` starts the count again, because a reader takes the verdict
after the last one (judgement/verdict.py): where a text stops, its reader finds what stopped it.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class StopTables(NamedTuple):
    """One automaton per stop string: it begins in state 0, and from `accept[a]` on it has ended.

    NumPy arrays on the host, JAX arrays inside a program. There sequences may have ends of their
    own (`ends`): `accept[a, p]`.
    """

    tables: Int[Any, "A states V"]  # the state after a token
    accept: Int[Any, "A *P"]


def stop_tables(
    strings: Mapping[str, int],
    token_bytes: Sequence[bytes],
    vocab_size: int,
    after: str = "",
) -> StopTables:
    """Build the tables of `{text: number of the occurrence that ends the sequence}`.

    Occurrences do not overlap. An id without bytes (beyond the tokenizer's) keeps the state.

    after: occurrences count only behind the last one of this text; "": from the start.
    """
    found = [_byte_automaton(text.encode(), n, after.encode()) for text, n in strings.items()]
    automata = [automaton for automaton, _ in found]
    num_states = max((len(automaton) for automaton in automata), default=1)
    tables = np.zeros((len(automata), num_states, vocab_size), np.int16)
    for table, automaton in zip(tables, automata, strict=True):
        table[: len(automaton)] = _lift(automaton, token_bytes, vocab_size)
    return StopTables(tables, np.array([firsts[-1] for _, firsts in found], np.int16))


def ends(strings: Mapping[str, int], most: int, after: str = "") -> Int[np.ndarray, "N A"]:
    """Return other `accept` for the tables of these strings: `[n - 1]` ends at occurrence n.

    most: of n, and the number of each string.
    """
    assert all(count == most for count in strings.values())
    found = [_byte_automaton(text.encode(), most, after.encode())[1] for text in strings]
    return np.array([[firsts[n] for firsts in found] for n in range(most)], np.int16)


def follow(
    stops: StopTables, states: Int[Array, "A P Z"], tokens: Int[Array, "P Z"]
) -> Int[Array, "A P Z"]:
    """Return the automata's states after these tokens."""
    return jax.vmap(lambda table, states: table[states, tokens])(stops.tables, states)


def has_ended(
    stops: StopTables,
    stop_ids: tuple[int, ...],
    states: Int[Array, "A P Z"],
    tokens: Int[Array, "P Z"],
) -> Bool[Array, "P Z"]:
    """Return which sequences end with these tokens; `states` are the automata's after them."""
    accept = jnp.expand_dims(stops.accept, tuple(range(stops.accept.ndim, 3)))
    is_end = jnp.any(states >= accept, axis=0)
    if stop_ids:
        is_end |= jnp.any(tokens[..., None] == jnp.array(stop_ids)[None, None], axis=-1)
    return is_end


class ByteState(NamedTuple):
    """How far a text has come: `seen` occurrences, and matched bytes of the next."""

    is_counting: bool  # `after` has been found, or there is none to wait for
    of_after: int  # matched bytes of `after`
    seen: int
    of_text: int  # matched bytes of the stop string


def _byte_automaton(
    pattern: bytes, count: int, after: bytes
) -> tuple[Int[np.ndarray, "states 256"], list[int]]:
    """Return transitions that count occurrences of `pattern` behind the last one of `after`.

    Only states that can be reached are numbered, from 0 where a sequence begins, and those that
    have seen fewer occurrences first. The last one ends it, and keeps itself: a sequence that has
    ended stays ended. Also returned: the first state that has seen each number of them.
    """
    in_text, in_after = _matcher(pattern), _matcher(after)
    begin = ByteState(not after, 0, 0, 0)

    def follow(state: ByteState, byte: int) -> ByteState:
        of_after = int(in_after[state.of_after, byte]) if after else 0
        if after and of_after == len(after):
            return ByteState(True, 0, 0, 0)
        if not state.is_counting:
            return ByteState(False, of_after, 0, 0)
        of_text = int(in_text[state.of_text, byte])
        if of_text == len(pattern):  # occurrences do not overlap: the next one begins behind it
            return ByteState(True, of_after, state.seen + 1, 0)
        return ByteState(True, of_after, state.seen, of_text)

    # Bytes of neither text act alike; one of them stands for all.
    spelled = {*pattern, *after}
    other = next(byte for byte in range(256) if byte not in spelled)
    rows, waiting = dict[ByteState, dict[int, ByteState]](), [begin]
    while waiting:
        state = waiting.pop()
        rows[state] = {byte: follow(state, byte) for byte in (other, *spelled)}
        found = {each for each in rows[state].values() if each.seen < count}
        waiting += found - rows.keys() - {*waiting}
    ordered = sorted(rows, key=lambda state: (state.seen, state != begin, state))
    numbers = {state: number for number, state in enumerate(ordered)}
    table = np.full((len(rows) + 1, 256), len(rows), np.int16)
    for state, number in numbers.items():
        targets = {byte: numbers.get(each, len(rows)) for byte, each in rows[state].items()}
        table[number] = targets[other]
        for byte, target in targets.items():
            table[number, byte] = target
    seen = [state.seen for state in ordered]
    return table, [bisect.bisect_left(seen, n) for n in range(1, count + 1)]


def _matcher(pattern: bytes) -> Int[np.ndarray, "matched 256"]:
    """Return how many bytes of a pattern are matched after a byte, for every number before it."""
    size = len(pattern)
    within = np.zeros((size, 256), np.int16)
    fallback = 0  # the state of the longest proper suffix that is also a prefix
    for matched, byte in enumerate(pattern):
        within[matched] = within[fallback] if matched else 0
        within[matched, byte] = matched + 1
        if matched:
            fallback = within[fallback, byte]
    return within


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
