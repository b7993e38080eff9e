"""PandaLM and JudgeLM count verdicts as three classes: answer 1, answer 2, tie.

Aggregation `first_order` looks at each pair's first game (as given, if both orders were played),
as both official scorers do; `pooled` takes every game for a case of its own, so that the order in
which a benchmark stores its answers does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from jlrm.evaluation import scoring
from jlrm.evaluation.benchmark import Credit
from jlrm.evaluation.games import ItemVerdicts
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import pair_credit, percent
from jlrm.judgement.verdict import swap_preference


def class_credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return the credit of a pair, which is that of the games that count."""
    verdicts = judged.verdicts[:1] if policy.aggregation == "first_order" else judged.verdicts
    counted = pair_credit(ItemVerdicts(judged.item, verdicts), policy)
    return pair_credit(judged, policy)._replace(value=counted.value)


def class_total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return agreement and macro precision, recall and F1, and the swap metrics, in percent.

    With a tie_credit other than 0, agreement is the mean credit; the others stay what they are.
    """
    of_classes = classification(cases(credits, policy))
    del of_classes["accuracy"]
    agreement = {"agreement": percent(credit.value for credit in credits)}
    return agreement | of_classes | swap_metrics(credits)


def cases(credits: Sequence[Credit], policy: Policy) -> Counter[tuple[int, int | None]]:
    """Count (label, verdict) over the games that count."""
    num_games = 1 if policy.aggregation == "first_order" else None
    return Counter(
        (credit.item.label or 0, said) for credit in credits for said in credit.verdicts[:num_games]
    )


def swap_metrics(credits: Sequence[Credit]) -> dict[str, float]:
    """Return what the order of the answers does; nothing where no pair was judged in both.

    consistency: both orders agree; prefer_before_rate, prefer_after_rate: together they name the
    place shown first, or second; delta_bias: the distance of these two; total_bias: their sum.
    """
    consistency = scoring.swap_metrics(credits)
    if not consistency:
        return {}
    twice = [credit.verdicts for credit in credits if len(credit.verdicts) == 2]
    before = percent(_lean(*said) > 0 for said in twice)
    after = percent(_lean(*said) < 0 for said in twice)
    return {
        **consistency,
        "prefer_before_rate": before,
        "prefer_after_rate": after,
        "delta_bias": abs(before - after),
        "total_bias": before + after,
    }


def _lean(as_given: int | None, swapped: int | None) -> int:
    """Return above 0 if two orders together name the place shown first, below 0 the second."""
    shown = (as_given, swap_preference(swapped))
    return 0 if None in shown else shown.count(1) - shown.count(2)


def classification(pairs: Mapping[tuple[int, int | None], int]) -> dict[str, float]:
    """Return accuracy and macro precision, recall and F1 in percent, as scikit-learn defines them.

    pairs: how often each (label, prediction) occurs. The classes are those that occur as either; a
    prediction None is wrong and of no class. A ratio without cases is 0.
    """
    labels, predictions = Counter[int | None](), Counter[int | None]()
    for (label, predicted), count in pairs.items():
        labels[label] += count
        predictions[predicted] += count
    classes = sorted(c for c in labels.keys() | predictions.keys() if c is not None)
    right = {c: pairs.get((c, c), 0) for c in classes}
    precision = [right[c] / predictions[c] if predictions[c] else 0.0 for c in classes]
    recall = [right[c] / labels[c] if labels[c] else 0.0 for c in classes]
    f1 = [2 * right[c] / (predictions[c] + labels[c]) for c in classes]
    return {
        "accuracy": 100 * sum(right.values()) / sum(labels.values()),
        "precision": percent(precision),
        "recall": percent(recall),
        "f1": percent(f1),
    }
