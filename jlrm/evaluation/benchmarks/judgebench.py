"""JudgeBench: 350 pairs of GPT-4o answers (and 270 of Claude 3.5 Sonnet), one of each pair right.

Rule: ScalerLab/JudgeBench, utils/metrics.py. Two games; +1 for a verdict that is the label, -1 for
the opposite, 0 for a tie or none, and the pair is right if the sum is above 0: in terms of credit,
above half. So right and tie is right; right and wrong is not. `overall` is the mean over pairs.
Data: MIT by its card.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import pair_credit, pair_games, percent, subset_percents, swap_metrics

HOW_TO_GET = (
    "Download data/ of github.com/ScalerLab/JudgeBench (or the split gpt or claude of the dataset "
    "ScalerLab/JudgeBench) and name one file: --data judgebench=FILE."
)
LABELS = {"A>B": 1, "B>A": 2}
CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


def read(source: str) -> list[Item]:
    """Read items; the subset is the category that `source` belongs to, else `source` itself."""
    items = [
        Item(
            id=sources.text(row, "pair_id", where),
            question=sources.text(row, "question", where),
            answers=(
                sources.text(row, "response_A", where),
                sources.text(row, "response_B", where),
            ),
            label=sources.choice(row, "label", where, LABELS),
            subset=category(sources.text(row, "source", where)),
        )
        for where, row in sources.rows(source, HOW_TO_GET)
    ]
    return sources.finished(items, source)


def category(source: str) -> str:
    """Return the category of a source such as mmlu-pro-law."""
    return next((name for key, name in CATEGORIES.items() if source.startswith(key)), source)


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall` and the categories.

    For pairs judged in both orders also both_right, order_1 and order_2 (as given and swapped
    alone), and consistency.
    """
    overall = {"overall": percent(credit.value for credit in credits)}
    twice = [credit for credit in credits if len(credit.verdicts) == 2]
    if twice:
        right = [[said == credit.item.label for said in credit.verdicts] for credit in twice]
        overall["both_right"] = percent(all(each) for each in right)
        overall["order_1"] = percent(each[0] for each in right)
        overall["order_2"] = percent(each[1] for each in right)
    return overall | swap_metrics(credits) | subset_percents(credits)


BENCHMARK = Benchmark(
    name="judgebench",
    # utils/metrics.py: +1 right, -1 wrong, 0 else, and the sum above 0
    policies=pair_policies(Policy("majority", "both", 0.5, 0.5)),
    read=read,
    games=pair_games,
    credit=pair_credit,
    total=total,
    source="hf:ScalerLab/JudgeBench#gpt",
    size=350,
    published=(
        Published(
            "JudgeLRM-7B",
            "overall",
            54.6,
            "wizwand.com, origin not known",
            "python -m jlrm.evaluate --benchmark judgebench --model nuojohnchen/JudgeLRM-7B "
            "--prompt judgelrm_eval",
        ),
    ),
)
