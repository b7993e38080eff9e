"""JudgeLM val: 5,000 pairs with the scores that GPT-4 gave, in both orders.

Rule: baaivision/JudgeLM, judgelm/llm_judge/eval_model_judgement.py and common.py. A pair whose gold
scores hold -1 is left out; a prediction without scores is a draw. Three classes, macro averages;
the other order gives consistency and the lean to either place.
Data: BAAI/JudgeLM-100K on the Hugging Face hub, CC-BY-NC-4.0: one file of pairs, one of scores.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Published
from jlrm.evaluation.classes import class_credit, class_total
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import judgelm_scores
from jlrm.evaluation.scoring import pair_games
from jlrm.judgement.verdict import preferred

PAIRS, GOLD = "judgelm_val_5k.jsonl", "judgelm_val_5k_gpt4.jsonl"
HOW_TO_GET = (
    f"Download {PAIRS} and {GOLD} of the dataset BAAI/JudgeLM-100K (hf download --repo-type "
    "dataset) into one directory and name it: --data judgelm=DIR."
)


def read(source: str) -> list[Item]:
    """Read items of a directory with both files, or of one file whose rows hold pairs and scores.

    Rows of the two files belong together by `question_id`, or by their order if ids repeat.
    """
    if source.startswith("hf:"):
        source = sources.hub_files(source, (PAIRS, GOLD), HOW_TO_GET)
    if pathlib.Path(source).expanduser().is_dir():
        rows = list(_joined(pathlib.Path(source).expanduser()))
    else:
        rows = list(sources.rows(source, HOW_TO_GET))
    labels = [_gold(row, where) for where, row in rows]
    items = [
        _item(row, where, preferred(*gold))
        for (where, row), gold in zip(rows, labels, strict=True)
        if -1 not in gold
    ]
    return sources.finished(items, source, "their gold scores hold -1", len(rows) - len(items))


def _joined(directory: pathlib.Path) -> Iterator[tuple[str, sources.Row]]:
    pairs, gold = (list(_rows(directory / name)) for name in (PAIRS, GOLD))
    by_id = {row.get("question_id"): row for _, row in gold}
    has_ids = len(by_id) == len(gold) and None not in by_id
    if not has_ids and len(gold) != len(pairs):
        raise UsageError(f"{directory}: {PAIRS} has {len(pairs)} rows, but {GOLD} {len(gold)}.")
    for number, (where, row) in enumerate(pairs):
        other = by_id.get(row.get("question_id")) if has_ids else gold[number][1]
        if other is None:
            raise UsageError(f"{where}: {GOLD} has no row for it.")
        yield where, {**row, **{key: other[key] for key in ("text", "score") if key in other}}


def _rows(file: pathlib.Path) -> Iterator[tuple[str, sources.Row]]:
    if not file.exists():
        raise UsageError(f"{file.parent} holds no {file.name}. {HOW_TO_GET}")
    return sources.rows(str(file), HOW_TO_GET)


def _gold(row: sources.Row, where: str) -> tuple[float, float]:
    """Return the scores of a review's first line; -1, -1 where it holds none."""
    if isinstance(row.get("text"), str):
        return judgelm_scores(row["text"]) or (-1.0, -1.0)
    pair = sources.need(row, "score", where)
    if not isinstance(pair, list) or len(pair) != 2:
        raise UsageError(f"{where}: 'score' must be two numbers, got {pair!r}.")
    return float(pair[0]), float(pair[1])


def _item(row: sources.Row, where: str, label: int) -> Item:
    return Item(
        id=str(sources.need(row, "question_id", where)),
        question=sources.text(row, "question_body", where),
        answers=(
            sources.text(row, "answer1_body", where),
            sources.text(row, "answer2_body", where),
        ),
        label=label,
    )


COMMAND = (
    "python -m jlrm.evaluate --benchmark judgelm --model {model} --prompt judgelrm_eval "
    "--parser judgelrm --temperature 0.2 --max-new-tokens 2048"
)
MODELS = {
    "3B": "nuojohnchen/JudgeLRM-3B",
    "4B": "anonymous-D1C4/JudgeLRM-4B",
    "7B": "nuojohnchen/JudgeLRM-7B",
    "8B": "anonymous-D1C4/JudgeLRM-8B",
    "14B": "anonymous-D1C4/JudgeLRM-14B",
}
# Precision, recall and F1 of these rows are of two classes (F1 is the harmonic mean of the others,
# which no macro average is), so they stand under names that our three-class metrics do not have.
TABLE_1 = {
    "3B": (83.72, 86.31, 82.98, 84.61),
    "4B": (84.61, 86.82, 84.24, 85.51),
    "7B": (83.74, 85.84, 83.65, 84.73),
    "8B": (86.69, 89.16, 85.76, 87.43),
    "14B": (85.25, 86.64, 85.91, 86.27),
}
METRICS = ("agreement", "precision_two_classes", "recall_two_classes", "f1_two_classes")
SWAPPED = {"7B": (84.50, 5.39, 10.11, 4.72), "8B": (89.55, 4.04, 6.40, 2.36)}
SWAP_METRICS = ("consistency", "prefer_before_rate", "prefer_after_rate", "delta_bias")


def _published(
    table: dict[str, tuple[float, ...]], metrics: tuple[str, ...], source: str
) -> list[Published]:
    return [
        Published(
            f"JudgeLRM-{size}",
            metric,
            value,
            f"JudgeLRM paper v3, {source}",
            COMMAND.format(model=MODELS[size]),
        )
        for size, row in table.items()
        for metric, value in zip(metrics, row, strict=True)
    ]


BENCHMARK = Benchmark(
    name="judgelm",
    policies=(
        Policy("first_order", "both", 0.0, "tie"),  # the official script: unreadable is a draw
        Policy("pooled", "both", 0.0, "tie"),
    ),
    read=read,
    games=pair_games,
    credit=class_credit,
    total=class_total,
    source="hf:BAAI/JudgeLM-100K",
    published=(
        *_published(TABLE_1, METRICS, "Table 1"),
        *_published(SWAPPED, SWAP_METRICS, "Table 5"),
    ),
)
