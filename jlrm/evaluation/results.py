"""What one evaluation says: the entry of a benchmark in `results.json`, the table, a comparison.

An item counts once all of its games have an answer; an evaluation that lacks some is incomplete.
Nothing here judges, reads data or writes files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.evaluation import diagnostics, intervals
from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.games import Game, ItemVerdicts, Response
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import Reader, count, judged_items, statuses
from jlrm.evaluation.scoring import percent
from jlrm.reports import tables

NUM_WORST = 20
SHOWN_CHARACTERS = 4000  # of a text among the worst items


class Evaluation(NamedTuple):
    """A benchmark's games and what a judge answered."""

    benchmark: Benchmark
    policy: Policy
    games: Sequence[Game]
    answers: Mapping[str, Response]
    reader: Reader

    def judged(self) -> tuple[list[ItemVerdicts], int]:
        """Return the items whose games are all answered, and the number of the others."""
        return judged_items(self.games, self.answers, self.reader)


def entry(evaluation: Evaluation, span: float | None) -> dict[str, Any]:
    """Return the entry of a benchmark in `results.json`.

    span: distance of the ends of the judge's scale; None where it is unknown.
    """
    benchmark, policy = evaluation.benchmark, evaluation.policy
    judged, num_missing = evaluation.judged()
    marks = {each.item.id: benchmark.mark(each, policy) for each in judged}

    def score(sample: Sequence[ItemVerdicts]) -> dict[str, float]:
        return benchmark.total([marks[each.item.id] for each in sample], policy)

    return _finite(
        {
            "metrics": score(judged),
            "intervals": intervals.bootstrap(judged, score),
            "n": len(judged),
            "parse_failures": count(judged, None),
            "ties": count(judged, 0),
            "statuses": statuses(judged),
            "policy": dataclasses.asdict(policy),
            "subsets": _subsets(judged, marks),
            "diagnostics": diagnostics.summary(judged, evaluation.answers, span=span),
            "published": [each._asdict() for each in benchmark.published],
            "incomplete": num_missing > 0,
            "worst": _worst(judged, marks, evaluation.answers),
        }
    )


def _subsets(judged: Sequence[ItemVerdicts], marks: Mapping[str, Credit]) -> dict[str, Any]:
    groups: dict[str, list[ItemVerdicts]] = {}
    for each in judged:
        groups.setdefault(each.item.subset, []).append(each)

    def score(sample: Sequence[ItemVerdicts]) -> dict[str, float]:
        return {"accuracy": percent(marks[each.item.id].credit for each in sample)}

    return {
        name: {
            "n": len(group),
            **score(group),
            "interval": intervals.bootstrap(group, score)["accuracy"],
        }
        for name, group in sorted(groups.items())
        if name
    }


def _worst(
    judged: Sequence[ItemVerdicts], marks: Mapping[str, Credit], answers: Mapping[str, Response]
) -> list[dict[str, Any]]:
    """Return the items with the least credit; of equal ones a choice that ids alone decide."""
    wrong = [each for each in judged if marks[each.item.id].credit < 1.0]
    wrong.sort(key=lambda each: (marks[each.item.id].credit, _shuffled(each.item.id)))
    return [_shown(each, marks[each.item.id].credit, answers) for each in wrong[:NUM_WORST]]


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _shown(judged: ItemVerdicts, credit: float, answers: Mapping[str, Response]) -> dict[str, Any]:
    item = judged.item
    own = [answers[Game(item, *outcome[:2]).id] for outcome in judged.outcomes]
    return {
        "item": item.id,
        "subset": item.subset,
        "question": _cut(item.question),
        "answers": [_cut(answer) for answer in item.answers],
        "label": item.label,
        "outputs": [_cut(text) for answer in own for text in answer.outputs or ()],
        "scores": [outcome.scores for outcome in judged.outcomes],
        "credit": credit,
    }


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " […]"


def _finite(value: Any) -> Any:
    """Return plain JSON, with null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison(mine: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Compare two judges by their credits on the items that both have judged.

    Raises:
      UsageError: there is no such item.
    """
    credits = [
        {each.item.id: e.benchmark.credit(each, e.policy) for each in e.judged()[0]}
        for e in (mine, other)
    ]
    common = [name for name in credits[0] if name in credits[1]]
    if not common:
        raise UsageError(
            f"--compare: no item of {mine.benchmark.name} is judged by both, in the same orders. "
            "Compare evaluations of the same --policy order and --seed."
        )
    paired = intervals.paired(*([one[name] for name in common] for one in credits))
    return _finite({"n": len(common), **paired._asdict()})


def short(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--json` prints of an entry."""
    kept = {key: found[key] for key in ("n", "parse_failures", "ties", "policy")}
    compared = {"comparison": found["comparison"]} if "comparison" in found else {}
    return {**found["metrics"], **kept, **compared}


def table(name: str, found: Mapping[str, Any], size: int) -> Iterator[str]:
    """Return the lines that show an entry; size: items of the official set, 0 if it varies."""
    policy = ", ".join(f"{key}={value}" for key, value in found["policy"].items())
    of = f" of {size}" if size and found["n"] != size else ""
    mark = "  INCOMPLETE" if found["incomplete"] else ""
    yield f"{name}: {found['n']}{of} items{mark}"
    yield f"  policy: {policy}"
    yield f"  without a verdict: {found['parse_failures']} games, ties: {found['ties']}"
    published: dict[str, list[str]] = {}
    for row in found["published"]:
        published.setdefault(row["metric"], []).append(f"{row['judge']} {row['value']:.2f}")
    rows = [
        {
            "metric": metric,
            "value": value,
            "95 % interval": _range(found["intervals"].get(metric)),
            "published": ", ".join(published.get(metric, [])) or None,
        }
        for metric, value in found["metrics"].items()
    ]
    columns = ["metric", "value", "95 % interval", *(["published"] if published else [])]
    yield tables.table(rows, columns)
    if compared := found.get("comparison"):
        low, high = compared["interval"]
        yield (
            f"  against {compared['with']}: {compared['difference']:+.2f} points "
            f"[{low:+.2f}, {high:+.2f}], p = {compared['p_value']:.4f}, n = {compared['n']}"
        )


def _range(interval: Sequence[float | None] | None) -> str | None:
    if not interval or None in interval:
        return None
    return " to ".join(f"{end:.2f}" for end in interval)


def checksum(value: Any) -> str:
    """Return a short digest of anything made of what JSON holds, and of dataclasses."""
    text = json.dumps(value, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
