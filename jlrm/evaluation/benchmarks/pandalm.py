"""PandaLM test: 999 pairs with the majority label of three people, ties among them.

Rule: JudgeLRM, pandalm/calculate_result.py (join by idx, three classes, macro averages); the view
without ties is that of the paper's Table 12: pairs whose label is a tie are left out, and a verdict
"tie" becomes answer 1. Data: WeOpenML/PandaLM, data/testset-v1.json, Apache-2.0.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.classes import cases, class_credit, class_total, classification
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import pair_games

HOW_TO_GET = (
    "Download data/testset-v1.json of github.com/WeOpenML/PandaLM and name it: "
    "--data pandalm=testset-v1.json."
)
ANNOTATORS = ("annotator1", "annotator2", "annotator3")
LABELS = {0: 0, 1: 1, 2: 2}


def read(source: str) -> list[Item]:
    """Read items; the label is `label`, else the majority of the three annotators."""
    rows = list(sources.rows(source, HOW_TO_GET))
    return sources.finished([_item(row, where) for where, row in rows], source)


def _item(row: sources.Row, where: str) -> Item:
    question, context = (_text(row, key, where) for key in ("instruction", "input"))
    return Item(
        id=str(sources.need(row, "idx", where)),
        question=f"{question}\n{context}" if context else question,
        answers=(_text(row, "response1", where), _text(row, "response2", where)),
        label=_label(row, where),
        # one of its values is written in two ways
        subset=str(row.get("motivation_app", "")).strip().lower(),
    )


def _text(row: sources.Row, key: str, where: str) -> str:
    """Return a text; some responses are `true` or `false` without quotation marks."""
    value = sources.need(row, key, where)
    return str(value) if isinstance(value, bool) else sources.text(row, key, where)


def _label(row: sources.Row, where: str) -> int:
    if "label" in row:
        return sources.choice(row, "label", where, LABELS)
    return statistics.mode(sources.choice(row, key, where, LABELS) for key in ANNOTATORS)


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return the three-class metrics, and those of the view without ties as NAME_no_ties."""
    without = Counter[tuple[int, int | None]]()
    for (label, said), count in cases(credits, policy).items():
        if label:
            without[label, 1 if said == 0 else said] += count
    metrics = class_total(credits, policy)
    if without:
        without_ties = classification(without)
        metrics["agreement_no_ties"] = without_ties.pop("accuracy")
        metrics |= {f"{name}_no_ties": value for name, value in without_ties.items()}
    return metrics


COMMAND = (
    "python -m jlrm.evaluate --benchmark pandalm --model nuojohnchen/JudgeLRM-{size} "
    "--prompt judgelrm_eval --parser judgelrm --num-beams 4 --repetition-penalty 1.2 "
    "--max-new-tokens 4096"
)
TABLE_1 = {  # agreement, precision, recall, F1
    "3B": (77.68, 74.26, 70.86, 72.12),
    "4B": (77.88, 72.33, 73.67, 72.87),
    "7B": (78.28, 74.90, 75.74, 75.05),
    "8B": (80.68, 73.81, 77.50, 75.26),
    "14B": (81.18, 78.39, 74.80, 76.29),
}
TABLE_12 = {"3B": (82.66, 82.97, 82.94, 82.66), "7B": (83.56, 83.58, 83.41, 83.47)}
METRICS = ("agreement", "precision", "recall", "f1")


def _published(
    table: dict[str, tuple[float, ...]], source: str, suffix: str = ""
) -> list[Published]:
    return [
        Published(
            f"JudgeLRM-{size}",
            metric + suffix,
            value,
            f"JudgeLRM paper v3, {source}",
            _command(size),
        )
        for size, row in table.items()
        for metric, value in zip(METRICS, row, strict=True)
    ]


def _command(size: str) -> str:
    # Qwen3's script allows fewer tokens; only two sizes are published under the authors' name.
    text = COMMAND.format(size=size)
    if size in ("4B", "8B", "14B"):
        text = text.replace("nuojohnchen/", "anonymous-D1C4/").replace("4096", "3072")
    return text


BENCHMARK = Benchmark(
    name="pandalm",
    policies=(
        # JudgeLRM, pandalm/calculate_result.py: unreadable is a tie
        Policy("first_order", "as_given", 0.0, "tie"),
        Policy("pooled", "both", 0.0, "tie"),
    ),
    read=read,
    games=pair_games,
    credit=class_credit,
    total=total,
    size=999,
    published=(*_published(TABLE_1, "Table 1"), *_published(TABLE_12, "Table 12", "_no_ties")),
)
