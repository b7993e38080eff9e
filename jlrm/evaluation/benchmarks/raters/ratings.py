"""Ratings of single answers: does a judge prefer the answer that raters gave more points?

Benchmarks of single answers hold a question, one answer and its rating in a row. Here two answers
to the same question (with the same criterion, where rows have one) make a pair, and the one with
the higher rating is the better. Pairs of equal ratings are left out; an answer with several ratings
has their mean. Prometheus 2 makes its Preference Bench from Feedback Bench in this way. The usual
figure for such data, the correlation of scores given to single answers, is another protocol: this
one needs no common scale. Subsets say how far apart the ratings of a pair are.

`ratings`: your own rows (question, answer, score), or rows of another name below.
`feedback_bench`: prometheus-eval/Feedback-Bench, 1,000 answers rated by GPT-4, five a question.
`biggen_bench`: prometheus-eval/BiGGen-Bench-Results, human_eval: answers rated by people.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.data import forms
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark
from jlrm.evaluation.games import Item
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import micro_total, pair_credit, pair_games

# The names that such data has for these, the first that a row has: Prometheus' Feedback Bench and
# BiGGen Bench, HelpSteer, and plain words.
QUESTIONS = ("orig_instruction", "question", "prompt", "instruction", "input")
ANSWERS = ("orig_response", "answer", "response", "output")
SCORES = ("orig_score", "human_score", "score", "rating", "helpfulness")
CRITERIA = ("orig_criteria", "score_rubric", "criterion", "criteria", "rubric")


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
            # Rounded, so that the order of adding makes no two equal means differ.
            means = {answer: round(statistics.fmean(each), 9) for answer, each in ratings.items()}
            pairs = _pairs(str(number), question, means)
            items += [pair for pair in pairs if pair.label]
            num_equal += sum(not pair.label for pair in pairs)
        reason = "a pair is two answers to one question with different ratings"
        return sources.finished(items, source, reason, num_equal)

    return read


def _rated(row: sources.Row, where: str) -> tuple[str, str, float | None]:
    """Return question, answer and rating of a row; the rating is None where it has none."""
    answer = sources.conversation(row[_column(row, ANSWERS, "answer", where)], where)
    name = _column(row, SCORES, "rating", where)
    return _question(row, where), answer, _rating(row[name], f"{where}: '{name}'")


def _question(row: sources.Row, where: str) -> str:
    """Return the question, below its system prompt and above its criterion if a row has them."""
    name = _column(row, QUESTIONS, "question", where)
    question = sources.conversation(row[name], where)
    if name == "instruction" and row.get("input"):  # Alpaca's form
        question = f"{question}\n{sources.text(row, 'input', where)}"
    if row.get("system_prompt"):
        system = sources.text(row, "system_prompt", where)
        question = forms.conversation([("system", system), ("user", question)])
    criterion = next((row[key] for key in CRITERIA if row.get(key)), None)
    if isinstance(criterion, Mapping):  # BiGGen Bench: with a description of each score
        criterion = criterion.get("criteria")
    return f"{question}\n\nCriterion: {criterion}" if criterion else question


def _column(row: sources.Row, names: Sequence[str], what: str, where: str) -> str:
    for name in names:
        if name in row:
            return name
    wanted = f"wanted one of the fields {', '.join(names)}"
    raise UsageError(f"{where} has no {what}: {wanted}. {forms.there_are(row)}")


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
