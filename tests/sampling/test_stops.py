"""Stop tables say what counting occurrences in the text says, however the text is tokenized."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlrm.judgement.verdict import parse
from jlrm.sampling.stops import StopTables, ends, stop_tables

ANSWER = "</answer>"
FRAGMENTS = [ANSWER, "</answer", "</ans", "wer>", "answer>", "<", "</", ">", "<answer>", " 7", "é"]


def tokenize(text: bytes, sizes: Sequence[int]) -> tuple[list[int], list[bytes]]:
    """Cut a text into pieces of these sizes in turn; return ids and the bytes of each id."""
    pieces, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(text[at : at + size])
        at, turn = at + size, turn + 1
    vocabulary = sorted(set(pieces))
    return [vocabulary.index(piece) for piece in pieces], vocabulary


def end_by_table(tables: StopTables, automaton: int, tokens: Sequence[int]) -> int | None:
    """Return after how many tokens the automaton accepts, and check that it never leaves again."""
    table, accept = tables.tables[automaton], tables.accept[automaton]
    states = [0]
    for token in tokens:
        states.append(table[states[-1], token])
    is_accepted = [state == accept for state in states]
    assert is_accepted == sorted(is_accepted)
    return is_accepted.index(True) if True in is_accepted else None


def end_by_text(text: str, count: int, pieces: Sequence[bytes], after: str = "") -> int | None:
    """Return after how many tokens the text holds `count` occurrences that do not overlap.

    Behind the last `after` that the text holds at that byte; a text without one has none.
    """
    whole, ends = b"".join(pieces), np.cumsum([0, *map(len, pieces)])
    for length in range(len(whole) + 1):
        _, found, counted = whole[:length].rpartition(after.encode() or b"\0never")
        if (found or not after) and counted.count(text.encode()) >= count:
            return int(np.searchsorted(ends, length))
    return None


def check(
    strings: dict[str, int], tokens: Sequence[int], token_bytes: Sequence[bytes], after: str = ""
) -> None:
    tables = stop_tables(strings, token_bytes, len(token_bytes) + 3, after)
    pieces = [token_bytes[token] for token in tokens]
    for automaton, (text, count) in enumerate(strings.items()):
        wanted = end_by_text(text, count, pieces, after)
        assert end_by_table(tables, automaton, tokens) == wanted, (text, count)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
)
@example(text=ANSWER * 2, sizes=[1], counts=(2, 1, 1))
@example(text=ANSWER * 2, sizes=[18], counts=(2, 2, 2))
@example(text=f"<{ANSWER}<{ANSWER}", sizes=[3, 7], counts=(2, 2, 1))
def test_random_tokenizations_of_answers(text, sizes, counts):
    tokens, token_bytes = tokenize(text.encode(), sizes)
    check(dict(zip((ANSWER, "</", "é"), counts, strict=True)), tokens, token_bytes)


@settings(deadline=None, max_examples=300)
@given(
    pattern=st.text("ab", min_size=1, max_size=6),
    text=st.text("ab", max_size=30),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    count=st.integers(1, 4),
)
@example(pattern="aab", text="aaab" * 3, sizes=[1], count=2)
@example(pattern="aab", text="aaaabaab", sizes=[2, 3], count=2)
@example(pattern="abab", text="abababab", sizes=[1], count=2)
@example(pattern="abab", text="ababab", sizes=[2], count=2)
@example(pattern="aa", text="aaaa", sizes=[3], count=2)
def test_patterns_that_overlap_themselves(pattern, text, sizes, count):
    tokens, token_bytes = tokenize(text.encode(), sizes)
    check({pattern: count}, tokens, token_bytes)


def test_one_token_may_hold_several_occurrences():
    check({"ab": 2, "b": 4, "bab": 1}, [0, 1, 2], [b"xa", b"bab", b"ababab"])


def test_a_character_may_be_split_between_tokens():
    snowman = "\N{SNOWMAN}"
    first, second, third = (bytes([byte]) for byte in snowman.encode())
    check({snowman: 1}, [0, 1, 2], [first, second, third])
    check({snowman: 1}, [0, 2, 1], [first, second, third])


def test_ids_without_bytes_leave_the_state():
    empty, beyond = 2, 3  # a token that stands for no text; an id that the tokenizer lacks
    tables = stop_tables({"ab": 2}, [b"a", b"b", b""], vocab_size=4)
    for state in range(tables.tables.shape[1]):
        assert tables.tables[0, state, empty] == state
        assert tables.tables[0, state, beyond] == state
    assert end_by_table(tables, 0, [empty, 0, beyond, 1, beyond, 0, empty, 1, 0]) == 8


def test_automata_of_different_sizes_share_one_table():
    tables = stop_tables({"a": 1, "abcdef": 3}, [b"a", b"bc", b"def"], vocab_size=5)
    assert tables.tables.shape == (2, 19, 5)
    assert tables.accept.tolist() == [1, 18]
    assert end_by_table(tables, 0, [1, 2, 0, 1]) == 3
    assert end_by_table(tables, 1, [0, 1, 2] * 3) == 9


def test_a_sequence_may_end_by_fewer_occurrences_than_its_tables_count():
    generator = np.random.default_rng(1)
    pieces = [*(bytes([byte]) for byte in b"ab</>"), b"</a", b">a</", b"</b>"]
    many = stop_tables({"</a>": 4}, pieces, len(pieces), after="</b>")
    accept = ends({"</a>": 4}, 4, after="</b>")
    assert accept.shape == (4, 1) and accept[-1] == many.accept
    for _ in range(200):
        tokens = generator.integers(len(pieces), size=60).tolist()
        for count in range(1, 5):
            own = stop_tables({"</a>": count}, pieces, len(pieces), after="</b>")
            assert first_end(many, accept[count - 1], tokens) == first_end(own, own.accept, tokens)
    assert ends({}, 8).shape == (8, 0)


def first_end(tables: StopTables, accept: np.ndarray, tokens: Sequence[int]) -> int | None:
    state = 0
    for length, token in enumerate(tokens, start=1):
        state = tables.tables[0, state, token]
        if state >= accept[0]:
            return length
    return None


def test_without_strings_there_is_no_automaton():
    tables = stop_tables({}, [b"a"], vocab_size=2)
    assert tables.tables.shape[0] == 0
    assert tables.accept.shape == (0,)


# ----------------------------------------------------------------------- behind the reasoning

END = "</think>"
REASONING = [*FRAGMENTS, END, "</think", "</th", "ink>", "</", "think>", "<think>", "</</think>"]


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(
    text=st.lists(st.sampled_from(REASONING), max_size=14).map("".join),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
)
@example(text=ANSWER * 2 + END + ANSWER * 2, sizes=[1], counts=(2, 1, 1))
@example(text=ANSWER * 2 + END + ANSWER * 2, sizes=[60], counts=(2, 1, 1))
@example(text=END + ANSWER + END + ANSWER * 2, sizes=[2, 5], counts=(2, 9, 9))
@example(text=f"<{END}<{ANSWER}</{END}{ANSWER * 2}", sizes=[3, 7], counts=(2, 9, 1))
def test_stop_strings_count_behind_the_last_end_of_reasoning(text, sizes, counts):
    tokens, token_bytes = tokenize(text.encode(), sizes)
    strings = dict(zip((ANSWER, "</", "think>"), counts, strict=True))
    check(strings, tokens, token_bytes, END)


@settings(deadline=None, max_examples=300)
@given(
    pattern=st.text("ab", min_size=1, max_size=4),
    after=st.text("ab", min_size=1, max_size=4),
    text=st.text("ab", max_size=30),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    count=st.integers(1, 3),
)
def test_texts_that_overlap_each_other(pattern, after, text, sizes, count):
    """Where both end with one byte, the end of the reasoning counts, and nothing before it."""
    tokens, token_bytes = tokenize(text.encode(), sizes)
    tables = stop_tables({pattern: count}, token_bytes, len(token_bytes), after)
    whole, ends = text.encode(), np.cumsum([0, *(len(token_bytes[token]) for token in tokens)])
    wanted, start, at = None, None, 0
    for length in range(1, len(whole) + 1):  # `after` is found from left to right
        if whole[at:length].endswith(after.encode()):
            start = at = length
        elif start is not None and whole[start:length].count(pattern.encode()) >= count:
            wanted = int(np.searchsorted(ends, length))
            break
    assert end_by_table(tables, 0, tokens) == wanted


def test_a_draft_ends_nothing_and_one_token_may_hold_the_end_and_the_verdict():
    draft, verdict = f"<answer>3{ANSWER}<answer>5{ANSWER}", f"<answer>8{ANSWER}<answer>4{ANSWER}"
    pieces = [draft.encode(), (END + verdict).encode()]
    tables = stop_tables({ANSWER: 2}, pieces, 2, END)
    assert end_by_table(tables, 0, [0, 0, 0]) is None
    assert end_by_table(tables, 0, [0, 1]) == 2
    assert end_by_table(stop_tables({ANSWER: 2}, pieces, 2), 0, [0, 1]) == 1


def test_the_size_of_a_table_depends_on_no_tokens():
    planned = stop_tables({ANSWER: 2}, [], 7, END)
    assert planned.tables.shape == stop_tables({ANSWER: 2}, [b"x", b"</"], 7, END).tables.shape
    assert planned.tables.shape[1] < 50  # of 151,936 ids: 12 MB


def test_what_stops_a_text_is_what_its_reader_reads():
    """Texts of tags in any order: where the table ends one, `lenient` finds the pair."""
    pieces = ["<answer>1</answer>", "<answer>9</answer>", END, " so ", "<answer>", ANSWER]
    token_bytes = [piece.encode() for piece in pieces]
    tables = stop_tables({ANSWER: 2}, token_bytes, len(pieces), END)
    num_read = 0
    for tokens in itertools.product(range(4), repeat=6):
        end = end_by_table(tables, 0, tokens)
        if end is None:
            continue
        text = "".join(pieces[token] for token in tokens[:end])
        behind = text.rpartition(END)[2]
        numbers = [float(digit) for digit in behind if digit.isdigit()]
        assert parse(text, strict=False).scores == tuple(numbers) and len(numbers) == 2
        num_read += 1
    assert num_read > 100
