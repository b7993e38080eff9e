"""Your own comparisons, in any form and from any source that training reads (data/readers.py).

Files, prepared datasets (`DIR#validation`), hf:ORG/NAME and the like. `overall` is the mean credit;
a label "tie" is met by a verdict "tie" alone. Subsets are the rows' sources. Aggregation
`first_order` or `pooled` counts three classes instead (classes.py): `first_order` is what training
judges its held-out set by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jlrm.data.comparisons import Comparison
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.classes import class_credit, class_total
from jlrm.evaluation.games import Item, ItemVerdicts
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import micro_total, pair_credit, pair_games

CLASSES = ("first_order", "pooled")

HOW_TO_GET = (
    "Name your comparisons, e.g. --data pairs=FILE.jsonl with question, answer_1, answer_2 and "
    "preference (1, 2, 0) in each line."
)


def read(
    source: str,
    columns: Mapping[str, str] | None = None,
    values: Mapping[str, str] | None = None,
    scores: str = "score",
) -> list[Item]:
    """Read comparisons as training does; rows that can't be used are left out, and told."""
    told: dict[str, Any] = {"columns": columns, "values": values, "scores": scores}
    return items(sources.own_rows(source, HOW_TO_GET, **told), source)


def items(rows: Sequence[Comparison], source: str) -> list[Item]:
    """Return comparisons as items; an id that occurs again gets a number behind it."""
    labelled = [
        Item(row.id, row.question, (row.answer_1, row.answer_2), row.label, subset=row.source)
        for row in rows
    ]
    return sources.finished(labelled, source)


def _credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    return (class_credit if policy.aggregation in CLASSES else pair_credit)(judged, policy)


def _total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    return (class_total if policy.aggregation in CLASSES else micro_total)(credits, policy)


BENCHMARK = Benchmark(
    name="pairs",
    policies=(
        *pair_policies(Policy("mean", "both", 0.5, 0.0)),
        Policy("first_order", "both", 0.0, 0.0),  # three classes, as training's held-out set
        Policy("pooled", "both", 0.0, 0.0),
    ),
    read=read,
    games=pair_games,
    credit=_credit,
    total=_total,
    is_own=True,
)
