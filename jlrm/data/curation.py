"""What happens to rows between reading them and training on them: pure functions of the rows.

Duplicates, lengths in tokens, whole questions for validation, both orders, and counts of what there
is. Benchmarks' questions are looked for in contamination.py.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.data.batches import count_tokens, prompt_encoder
from jlrm.data.comparisons import Comparison, Dropped, fold, question_key, tidy
from jlrm.data.tokenizer import Tokenizer

EXAMPLES = 3  # of what a report counts
CUT = 60  # characters of a text in an example
SWAPPED = "/swapped"  # ends the id of a row that stands beside itself in the other order


def sift(
    rows: Sequence[Comparison], reasons: Sequence[str], dropped: list[Dropped]
) -> list[Comparison]:
    """Return the rows that have no reason to be left out; the others are added to `dropped`."""
    kept = []
    for row, reason in zip(rows, reasons, strict=True):
        if reason:
            dropped.append(Dropped.of(row, reason))
        else:
            kept.append(row)
    return kept


def duplicates(rows: Sequence[Comparison]) -> list[str]:
    """Return "duplicate" for a row that says what one before it says, "" for the others.

    That is the same question and answers, in either order, and the same label; white space and
    Unicode's ways to compose a character don't count.
    """
    seen: set[tuple[Any, ...]] = set()
    reasons = []
    for row in rows:
        said = (*_pair(row), _label_of_pair(row))
        reasons.append("duplicate" if said in seen else "")
        seen.add(said)
    return reasons


def differing_labels(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Count the pairs of answers to a question, in either order, whose rows have other labels.

    No judge can meet both. Questions are compared folded, answers but for white space.

    Returns:
      `pairs_with_differing_labels`, `pairs_with_opposite_labels` (one row says 1 and one 2), and
      `examples_of_differing_labels`, opposite ones first, with labels by the texts that are shown.
    """
    pairs: dict[tuple[str, str, str], list[Comparison]] = collections.defaultdict(list)
    for row in rows:
        question, answer_1, answer_2 = _pair(row)
        pairs[fold(question), answer_1, answer_2].append(row)
    differing = [same for same in pairs.values() if len(set(map(_label_of_pair, same))) > 1]
    differing.sort(key=lambda same: not _is_opposite(same))
    return {
        "pairs_with_differing_labels": len(differing),
        "pairs_with_opposite_labels": sum(map(_is_opposite, differing)),
        "examples_of_differing_labels": [_example(same) for same in differing[:EXAMPLES]],
    }


def _is_opposite(rows: Sequence[Comparison]) -> bool:
    return {1, 2} <= set(map(_label_of_pair, rows))


def _example(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Return texts of a pair, cut to a line, and the first row of every label."""
    first = {_label_of_pair(row): row for row in reversed(rows)}
    texts = zip(("question", "answer_1", "answer_2"), _pair(rows[0]), strict=True)
    return {
        **{name: text if len(text) <= CUT else text[:CUT] + "..." for name, text in texts},
        "rows": [
            {"id": row.id, "where": str(row.where), "label": label}
            for label, row in sorted(first.items())
        ],
    }


def _pair(row: Comparison) -> tuple[str, str, str]:
    row = row.swapped() if _is_reversed(row) else row
    return tidy(row.question), tidy(row.answer_1), tidy(row.answer_2)


def _label_of_pair(row: Comparison) -> int:
    return (row.swapped() if _is_reversed(row) else row).label


def _is_reversed(row: Comparison) -> bool:
    """Return whether the answers are not in the order that their texts alone decide."""
    first, second = ((tidy(text), text) for text in (row.answer_1, row.answer_2))
    return first > second


def prompt_tokens(
    rows: Sequence[Comparison], tokenizer: Tokenizer, prompt: str, *, both_orders: bool
) -> list[int]:
    """Count the tokens of each row's prompt, as training makes it; of both orders the longer."""
    encode_rows = prompt_encoder(tokenizer, prompt)
    both = rows if not both_orders else [way for row in rows for way in (row, row.swapped())]
    lengths = count_tokens(both, encode_rows, progress="tokenise")[:, 0]
    return lengths.reshape(len(rows), 2 if both_orders else 1).max(axis=1, initial=0).tolist()


def split(rows: list[Comparison], share: float) -> dict[str, list[Comparison]]:
    """Hold out a share of the questions, at least one, each with all its rows.

    Raises:
      UsageError: no question is left to train on.
    """
    if not share:
        return {"train": rows}
    keys = [question_key(row.question) for row in rows]
    questions = sorted(set(keys))
    heldout = set(questions[: max(1, round(share * len(questions)))])
    if len(heldout) == len(questions):
        raise UsageError(
            f"--validation={share} holds out every question: there are {len(questions)}. Lower it, "
            "or set it to 0."
        )
    parts: dict[str, list[Comparison]] = {"train": [], "validation": []}
    for row, key in zip(rows, keys, strict=True):
        parts["validation" if key in heldout else "train"].append(row)
    return parts


def with_swapped(rows: Iterable[Comparison]) -> list[Comparison]:
    """Return every row followed by itself in the other order."""
    both = []
    for row in rows:
        both += [row, dataclasses.replace(row.swapped(), id=row.id + SWAPPED)]
    return both


def describe(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Count what a split holds; rows without a source of their own count under their input."""
    labels = collections.Counter(row.label for row in rows)
    scored = [row.scores for row in rows if row.scores]
    histogram = collections.Counter(round(2 * score) / 2 for pair in scored for score in pair)
    return {
        "rows": len(rows),
        "sources": counted(row.source or row.where.source for row in rows),
        "labels": {"1": labels[1], "2": labels[2], "tie": labels[0]},
        "with_scores": len(scored),
        "preference_only": len(rows) - len(scored),
        "half_point_scores": sum(any(score % 1 == 0.5 for score in pair) for pair in scored),
        "score_histogram": {f"{score:g}": histogram[score] for score in sorted(histogram)},
        "characters": percentiles(
            len(row.question) + len(row.answer_1) + len(row.answer_2) for row in rows
        ),
    }


def counted(names: Iterable[str]) -> dict[str, int]:
    """Count names, in their order."""
    return dict(sorted(collections.Counter(names).items()))


def percentiles(numbers: Iterable[int]) -> dict[str, int]:
    """Return the values that 50, 90, 99 and 100 per cent of the numbers don't exceed."""
    ordered = sorted(numbers)
    if not ordered:
        return {}
    rank = {f"p{percent}": math.ceil(percent / 100 * len(ordered)) for percent in (50, 90, 99)}
    return {name: ordered[place - 1] for name, place in rank.items()} | {"max": ordered[-1]}
