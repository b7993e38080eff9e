"""Stop strings on the device: a byte automaton lifted to whole tokens.

A judge is done after its second `</answer>`, but a tokenizer splits that text in many ways and
glues it to its neighbours. So the strings are recognised in bytes, whatever the tokens: a
Knuth-Morris-Pratt automaton counts occurrences, and running every token's bytes through it from
every state gives a table `[states, V]` that a decoding loop can index. Built once per run, on the
host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class StopTables:
    """One automaton per stop string, from state 0 to `accept[a]`, where the sequence ends."""

    tables: Int[np.ndarray, "A states V"]
    accept: Int[np.ndarray, " A"]


def stop_tables(
    strings: Mapping[str, int], token_bytes: Sequence[bytes], vocab_size: int
) -> StopTables:
    """Build the tables of `{text: occurrence that ends the sequence}`.

    Occurrences do not overlap. Ids without bytes (beyond the tokenizer's) leave the state as it is.
    """
    automata = [_byte_automaton(text.encode(), count) for text, count in strings.items()]
    num_states = max((len(automaton) for automaton in automata), default=1)
    tables = np.zeros((len(automata), num_states, vocab_size), np.int16)
    for table, automaton in zip(tables, automata, strict=True):
        table[: len(automaton)] = _lift(automaton, token_bytes, vocab_size)
    return StopTables(tables, np.array([len(automaton) - 1 for automaton in automata], np.int16))


def _byte_automaton(pattern: bytes, count: int) -> Int[np.ndarray, "states 256"]:
    """Return transitions that count occurrences of `pattern`: state = found · len + matched."""
    size = len(pattern)
    within = np.zeros((size, 256), np.int16)
    fallback = 0  # the state of the longest proper suffix that is also a prefix
    for matched, byte in enumerate(pattern):
        within[matched] = within[fallback] if matched else 0
        within[matched, byte] = matched + 1
        if matched:
            fallback = within[fallback, byte]
    blocks = [np.minimum(within + found * size, size * count) for found in range(count)]
    return np.concatenate([*blocks, np.full((1, 256), size * count, np.int16)])


def _lift(
    automaton: Int[np.ndarray, "states 256"], token_bytes: Sequence[bytes], vocab_size: int
) -> Int[np.ndarray, "states V"]:
    """Return the state after a whole token for every state before it, all tokens side by side."""
    num_states = len(automaton)
    lifted = np.tile(np.arange(num_states, dtype=np.int16)[:, None], (1, vocab_size))
    lengths = np.array([len(text) for text in token_bytes], np.int64)
    order = np.argsort(-lengths, kind="stable")
    padded = np.zeros((len(token_bytes), int(lengths.max(initial=0))), np.uint8)
    for token, text in enumerate(token_bytes):
        padded[token, : len(text)] = np.frombuffer(text, np.uint8)
    for position in range(padded.shape[1]):
        active = order[: int(np.sum(lengths > position))]
        lifted[:, active] = automaton[lifted[:, active], padded[active, position][None]]
    return lifted
