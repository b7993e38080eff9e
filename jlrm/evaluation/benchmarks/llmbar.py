"""LLMBar: 419 pairs of which one answer follows the instruction, most of them adversarial.

Rule: princeton-nlp/LLMBar, as its evaluators record it. Both orders are judged: correct_average is
the mean of the two, correct_both the share right in both, `equal` the share that name the same
answer in both, and kappa_agreement is Cohen's kappa between them (-1 to 1, no percentage). If a
judge gives equal scores, its verdict is the answer shown second. In both orders that is a different
answer: half a point on average, and no agreement.
Data: Dataset/LLMBar, MIT.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import kappa, pair_credit, pair_games, percent, subset_percents

HOW_TO_GET = (
    "Clone github.com/princeton-nlp/LLMBar and name the directory: "
    "--data llmbar=LLMBar/Dataset/LLMBar."
)


def read(source: str) -> list[Item]:
    """Read items of one file, or of every dataset.json of a directory.

    A subset is named after the directory of its file: Natural, Neighbor and so on.
    """
    items, numbers = [], {}
    for where, row in sources.rows(source, HOW_TO_GET, "dataset.json"):
        subset = pathlib.Path(where.rpartition(", ")[0]).expanduser().resolve().parent.name
        numbers[subset] = number = numbers.get(subset, -1) + 1
        items.append(
            Item(
                id=f"{subset}-{number}",
                question=sources.text(row, "input", where),
                answers=(
                    sources.text(row, "output_1", where),
                    sources.text(row, "output_2", where),
                ),
                label=sources.choice(row, "label", where, {1: 1, 2: 2}),
                subset=subset,
            )
        )
    return sources.finished(items, source)


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall` (which is correct_average), the metrics of two orders, and the subsets."""
    average = percent(credit.value for credit in credits)
    metrics = {"overall": average}
    twice = [credit for credit in credits if len(credit.verdicts) == 2]
    if twice:
        one, two = zip(*(credit.verdicts for credit in twice), strict=True)
        pairs = list(zip(twice, one, two, strict=True))
        metrics |= {
            "correct_average": average,
            "correct_both": percent(credit.item.label == a == b for credit, a, b in pairs),
            "equal": percent(a is not None and a == b for _, a, b in pairs),
            "kappa_agreement": kappa(one, two),
        }
    return metrics | subset_percents(credits)


BENCHMARK = Benchmark(
    name="llmbar",
    # the rule of the authors' rating evaluators; they have none for errors
    policies=pair_policies(Policy("mean", "both", "second", 0.0)),
    read=read,
    games=pair_games,
    credit=pair_credit,
    total=total,
    size=419,
    not_percent=("kappa_agreement",),
)
