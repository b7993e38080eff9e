"""Ratings of single answers: does a judge prefer the answer that raters gave more points?

Benchmarks of single answers hold a question, one answer and its rating in a row. Here two answers
to the same question (with the same criterion, where rows have one) make a pair, and the one with
the higher rating is the better. Pairs of equal ratings are left out; an answer with several ratings
has their mean. Prometheus 2 makes its Preference Bench from Feedback Bench in this way. The usual
figure for such data, the correlation of scores given to single answers, is another protocol: this
one needs no common scale. Subsets say how far apart the ratings of a pair are.

`ratings`: your own rows (question, answer, score), or rows of any form below.
`feedback_bench`: prometheus-eval/Feedback-Bench, 1,000 answers rated by GPT-4, five a question.
`biggen_bench`: prometheus-eval/BiGGen-Bench-Results, human_eval: answers rated by people.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.data import forms
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import micro_total, pair_credit, pair_games


class Columns(NamedTuple):
    """The names of what a row holds; the last two need not be there."""

    question: str
    answer: str
    rating: str
    criterion: str = ""
    system: str = ""


FORMS = (
    Columns("orig_instruction", "orig_response", "orig_score", "orig_criteria"),  # Prometheus
    Columns("input", "response", "human_score", "score_rubric", "system_prompt"),  # BiGGen Bench
    Columns("prompt", "response", "helpfulness"),  # HelpSteer, HelpSteer2
    Columns("question", "answer", "score", "criterion"),
)


def reader(how_to_get: str) -> Callable[[str], list[Item]]:
    """Return a function that reads pairs of rated answers from a source."""

    def read(source: str) -> list[Item]:
        rated: dict[str, dict[str, list[float]]] = {}  # ratings by answer by question
        for where, row in sources.rows(source, how_to_get):
            question, answer, rating = _rated(row, where)
            if rating is not None:
                rated.setdefault(question, {}).setdefault(answer, []).append(rating)
        items, num_equal = [], 0
        for number, (question, ratings) in enumerate(rated.items()):
            means = {answer: statistics.fmean(each) for answer, each in ratings.items()}
            pairs = _pairs(str(number), question, means)
            items += [pair for pair in pairs if pair.label]
            num_equal += sum(not pair.label for pair in pairs)
        return sources.finished(items, source, "no two ratings of a question differ", num_equal)

    return read


def _rated(row: sources.Row, where: str) -> tuple[str, str, float | None]:
    """Return question, answer and rating of a row; the rating is None where it has none."""
    names = next((form for form in FORMS if row.keys() >= {*form[:3]}), None)
    if names is None:
        known = "; ".join(", ".join(form[:3]) for form in FORMS)
        raise UsageError(
            f"{where} holds no rated answer: wanted one of these sets of fields: {known}. "
            f"{forms.there_are(row)}"
        )
    question = sources.conversation(row[names.question], where)
    if row.get(names.system):
        question = forms.conversation(
            [("system", sources.text(row, names.system, where)), ("user", question)]
        )
    criterion = row.get(names.criterion)
    if isinstance(criterion, Mapping):  # BiGGen Bench: with a description of each score
        criterion = criterion.get("criteria")
    if criterion:
        question = f"{question}\n\nCriterion: {criterion}"
    answer = sources.conversation(row[names.answer], where)
    return question, answer, _rating(row[names.rating], f"{where}: '{names.rating}'")


def _rating(value: Any, what: str) -> float | None:
    """Return a number, text that is one, or the mean of a list of them."""
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    try:
        numbers = [float(each) for each in listed if not isinstance(each, bool)]
        if len(numbers) == len(listed) > 0 and all(map(math.isfinite, numbers)):
            return statistics.fmean(numbers)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{what} must be a rating, a finite number, got {value!r}.")


def _pairs(name: str, question: str, ratings: Mapping[str, float]) -> list[Item]:
    """Return all pairs of answers; label 0 stands for equal ratings."""
    numbered = list(enumerate(ratings.items()))
    return [
        Item(
            id=f"{name}:{i}-{j}",
            question=question,
            answers=(one, two),
            label=0 if first == second else 1 if first > second else 2,
            subset=_distance(abs(first - second)),
        )
        for (i, (one, first)), (j, (two, second)) in itertools.combinations(numbered, 2)
    ]


def _distance(points: float) -> str:
    if points < 1:
        return "less than 1 apart"
    return f"{int(points)} apart" if points < 3 else "3 or more apart"


def _benchmark(name: str, how_to_get: str, source: str = "") -> Benchmark:
    return Benchmark(
        name=name,
        # no official rule for judges of pairs; this is the usual one
        policies=pair_policies(Policy("mean", "random", 0.5, 0.0)),
        read=reader(how_to_get),
        games=pair_games,
        credit=pair_credit,
        total=micro_total,
        how_to_get=how_to_get,
        source=source,
    )


RATINGS = _benchmark(
    "ratings",
    "Name your rated answers, e.g. --data ratings=FILE.jsonl with question, answer and score in "
    "each line, two or more answers to a question.",
)
FEEDBACK_BENCH = _benchmark(
    "feedback_bench",
    "Download the dataset prometheus-eval/Feedback-Bench and name the file or directory: "
    "--data feedback_bench=PATH.",
    "hf:prometheus-eval/Feedback-Bench#train",
)
BIGGEN_BENCH = _benchmark(
    "biggen_bench",
    "Download the split human_eval of the dataset prometheus-eval/BiGGen-Bench-Results and name "
    "the file: --data biggen_bench=FILE.",
    "hf:prometheus-eval/BiGGen-Bench-Results#human_eval",
)
