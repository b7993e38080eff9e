"""Gold scores and the scale of the judge: rows on another scale are counted, or mapped onto it.

A file may hold scores from 0 to 100 or from 0 to 1 where a judge scores from 1 to 10, or what a
reward model paid. Their order is right all the same, and is kept as a preference. Their distances
are not, and a written judgement would clip them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlrm.config import UsageError
from jlrm.data.comparisons import AnswerList, Comparison
from jlrm.data.sharded import ShardedRows

USUAL_HIGHEST = (1.0, 5.0, 10.0, 100.0)


def rescaled(rows: ShardedRows, points: Mapping[str, float]) -> ShardedRows:
    """Map gold scores by the straight line through two points, {theirs: ours}; {} leaves them.

    {"0": 1, "100": 10} makes 90 a 9.1. The line rises, so the better answer stays the better one.

    Raises:
      UsageError: the points are no rising line.
    """
    if not points:
        return rows
    (left, low), (right, high) = _line(points)

    def ours(score: float) -> float:
        return round(low + (score - left) * (high - low) / (right - left), 6)

    def mapped(row: Comparison) -> Comparison:
        changed: dict[str, Any] = {}
        if isinstance(row, AnswerList):
            own = (gold if gold is None or row.is_ranked else ours(gold) for gold in row.golds)
            changed["golds"] = tuple(own)
        elif row.scores is not None:
            changed["score_1"], changed["score_2"] = map(ours, row.scores)
        if "judged" in row.meta and row.judgement:  # scores of its own, which SFT imitates
            changed["meta"] = {**row.meta, "judged": [*map(ours, row.judgement[1])]}
        return dataclasses.replace(row, **changed)

    return ShardedRows([mapped(row) for row in rows.mine], rows.owners)


def _line(points: Mapping[str, float]) -> list[tuple[float, float]]:
    try:
        line = sorted((float(theirs), ours) for theirs, ours in points.items())
    except ValueError:
        line = []
    is_finite = all(math.isfinite(score) for point in line for score in point)
    if len(line) != 2 or not is_finite or line[0][0] == line[1][0] or line[0][1] >= line[1][1]:
        raise UsageError(
            f"data.rescale={dict(points)} is no rising line through two points. Wanted {{theirs: "
            "ours, theirs: ours}, e.g. {0: 1, 100: 10}."
        )
    return line


def without_off_scale(rows: ShardedRows, scale: tuple[float, float]) -> ShardedRows:
    """Return the rows with a preference alone in place of scores outside a scale."""
    low, high = scale

    def kept(row: Comparison) -> Comparison:
        if row.scores is None or all(low <= score <= high for score in row.scores):
            return row
        if isinstance(row, AnswerList):
            return dataclasses.replace(row, is_ranked=True)
        return dataclasses.replace(row, score_1=None, score_2=None, preference=row.label)

    return ShardedRows([kept(row) for row in rows.mine], rows.owners)


def describe_off_scale(rows: ShardedRows, scale: tuple[int, int], source: str) -> str:
    """Say how many rows have gold scores outside a scale and what helps, or "" if none has."""
    nothing = (np.nan, np.nan)
    ends = [(min(row.scores), max(row.scores)) if row.scores else nothing for row in rows.mine]
    scores = rows.table("gold scores", np.array(ends).reshape(-1, 2))
    scores = scores[~np.isnan(scores).any(axis=1)]
    is_off = ((scores < scale[0]) | (scores > scale[1])).any(axis=1)
    if not is_off.any():
        return ""
    lowest, highest = float(scores.min()), float(scores.max())
    left = min(lowest, 0.0)
    right = next((usual for usual in USUAL_HIGHEST if usual >= highest), highest)
    return (
        f"{source}: {is_off.sum()} of {len(scores)} rows with scores have one outside the scale of "
        f"{scale[0]} to {scale[1]}; theirs go from {lowest:g} to {highest:g}. Map them onto it, "
        f"e.g. data.rescale={{{left:g}: {scale[0]}, {right:g}: {scale[1]}}}, or set "
        "reward.min_score and reward.max_score to their own scale."
    )
