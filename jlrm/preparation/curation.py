"""What happens to rows between reading them and training on them: pure functions of the rows.

What rows are compared by, whole questions for validation, both orders, and counts of what there is.
Nothing here needs more than a few rows at a time: engines bring together what is far apart.
Benchmarks' questions are looked for in contamination.py.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.data.comparisons import (
    SWAPPED,
    Comparison,
    describe_reasons,
    fold,
    folded_key,
    tidy,
)
from jlrm.data.dataset import Shard, num_characters
from jlrm.judgement.verdict import swap_preference

EXAMPLES = 3  # of what a report counts
CUT = 60  # characters of a text in an example
OPPOSITE = {1, 2}  # labels of one pair that no judge can meet

# What is counted, by (where, what, value). Where is "kept", "dropped" or the name of a split.
Counts = collections.Counter[tuple[str, str, Any]]


class Keys(NamedTuple):
    """What of a row other rows are compared with. Hashes have 128 bits."""

    said: bytes  # the question, both answers in either order, and the label: of duplicates
    pair: bytes  # the folded question, and both answers in either order
    label: int  # with the answers in the order that their texts alone decide
    question: int  # by which it is held out


def keys(row: Comparison) -> Keys:
    """Return the keys of a row; white space and Unicode's ways to compose don't count."""
    question, *answers, is_reversed = _pair(row)
    label = swap_preference(row.label) if is_reversed else row.label
    assert label is not None
    folded = fold(row.question)
    return Keys(
        _hash(question, *answers, label), _hash(folded, *answers), label, folded_key(folded)
    )


def _hash(*values: Any) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).digest()


def _pair(row: Comparison) -> tuple[str, str, str, bool]:
    """Return the texts, the answers in the order that their texts alone decide; and if they turn.

    Where answers differ in white space alone, that decides.
    """
    first, second = ((tidy(text), text) for text in (row.answer_1, row.answer_2))
    is_reversed = first > second
    if is_reversed:
        first, second = second, first
    return tidy(row.question), first[0], second[0], is_reversed


@dataclass(frozen=True)
class Differing:
    """Pairs of answers to a question, in either order, whose rows have other labels.

    No judge can meet both. Questions are compared folded, answers but for white space.
    """

    num_pairs: int = 0
    num_opposite: int = 0  # one row says 1 and one 2
    # Of the first EXAMPLES pairs, opposite ones first: the first row of every label, in order.
    examples: Sequence[Sequence[Comparison]] = ()


def _example(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Return texts of a pair, cut to a line, and its rows, with labels by the texts shown."""
    texts = zip(("question", "answer_1", "answer_2"), _pair(rows[0])[:3], strict=True)
    shown = sorted((keys(row).label, row) for row in rows)
    return {
        **{name: text if len(text) <= CUT else text[:CUT] + "..." for name, text in texts},
        "rows": [{"id": row.id, "where": str(row.where), "label": label} for label, row in shown],
    }


def num_heldout(num_questions: int, share: float) -> int:
    """Return how many questions are held out, at least one: those with the lowest keys."""
    return max(1, round(share * num_questions)) if share else 0


def check_heldout(num_questions: int, share: float) -> None:
    """Raise a UsageError if no question is left to train on."""
    if num_heldout(num_questions, share) == num_questions:
        raise UsageError(
            f"--validation={share} holds out every question: there are {num_questions}. Lower it, "
            "or set it to 0."
        )


def in_both_orders(row: Comparison) -> tuple[Comparison, Comparison]:
    """Return a row, and itself in the other order."""
    return row, dataclasses.replace(row.swapped(), id=row.id + SWAPPED)


# ---------------------------------------------------------------------------------- what is counted


def facts(split: str, row: Comparison) -> Iterator[tuple[str, str, Any]]:
    """Yield what of a row of a split is counted."""
    # Rows without a source of their own count under their input.
    yield split, "source", row.source or row.where.source
    yield split, "label", row.label
    yield split, "characters", num_characters(row)
    if row.scores:
        yield split, "scores", "half" if any(each % 1 == 0.5 for each in row.scores) else ""
        for score in row.scores:
            yield split, "score", round(2 * score) / 2


@dataclass(frozen=True)
class Prepared:
    """What an engine has made beside the files of rows."""

    counts: Counts
    shards: Mapping[str, list[Shard]]  # by the split
    differing: Differing
    # A number for what was read of each input, where that is no local file or directory.
    fingerprints: Mapping[str, int] = field(default_factory=dict)


def check_any(counts: Counts) -> None:
    """Raise a UsageError if no row is left."""
    dropped = _part(counts, "dropped", "reason")
    if not _part(counts, "kept", "tokens"):
        raise UsageError(
            f"No row is left of {sum(dropped.values())}: {describe_reasons(dropped)}. "
            "Name other inputs, or relax the settings that leave them out."
        )


def statistics(outcome: Prepared, *, is_measured: bool) -> dict[str, Any]:
    """Return what is told of a dataset; `is_measured` says whether tokens were counted."""
    counts, differing = outcome.counts, outcome.differing
    kept, dropped = _part(counts, "kept", "tokens"), _part(counts, "dropped", "reason")
    return {
        "rows_read": sum(kept.values()) + sum(dropped.values()),
        **({"prompt_tokens": percentiles(kept)} if is_measured else {}),
        "pairs_with_differing_labels": differing.num_pairs,
        "pairs_with_opposite_labels": differing.num_opposite,
        "examples_of_differing_labels": [_example(rows) for rows in differing.examples],
        "rows_kept": sum(kept.values()),
        "dropped": dropped,
        "contaminated_by": _part(counts, "dropped", "benchmark"),
        "splits": {split: _describe(counts, split) for split in outcome.shards},
        "bytes": sum(shard.num_bytes for part in outcome.shards.values() for shard in part),
    }


def _part(counts: Counts, where: str, what: str) -> dict[Any, int]:
    """Return the numbers of one kind by their values, in the order of these."""
    part = {key[2]: number for key, number in counts.items() if key[:2] == (where, what)}
    return dict(sorted(part.items()))


def _describe(counts: Counts, split: str) -> dict[str, Any]:
    labels, scored = _part(counts, split, "label"), _part(counts, split, "scores")
    num_rows, num_scored = sum(labels.values()), sum(scored.values())
    histogram = _part(counts, split, "score")
    return {
        "rows": num_rows,
        "sources": _part(counts, split, "source"),
        "labels": {"1": labels.get(1, 0), "2": labels.get(2, 0), "tie": labels.get(0, 0)},
        "with_scores": num_scored,
        "preference_only": num_rows - num_scored,
        "half_point_scores": scored.get("half", 0),
        "score_histogram": {f"{score:g}": number for score, number in histogram.items()},
        "characters": percentiles(_part(counts, split, "characters")),
    }


def percentiles(counts: Mapping[int, int]) -> dict[str, int]:
    """Return the values that 50, 90, 99 and 100 per cent don't exceed, of numbers by value."""
    total, reached, found = sum(counts.values()), 0, {}
    ranks = {f"p{percent}": math.ceil(percent / 100 * total) for percent in (50, 90, 99)}
    for value, number in sorted(counts.items()):
        reached += number
        for name, rank in ranks.items():
            if rank <= reached:
                found.setdefault(name, value)
    return found | {"max": max(counts)} if counts else {}
