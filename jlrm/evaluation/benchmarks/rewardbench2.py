"""RewardBench 2: 1,865 prompts in six subsets; one right answer in four, or ties among many.

Rule: allenai/reward-bench, scripts/run_v2.py and rewardbench/utils.py, made for scores of single
answers. A judge of pairs has no official protocol; two are here, named in the policy.
`round_robin`: every pair of answers is a game, an answer's score is the mean of what its games gave
it, and the official rules go on from there: a right answer with the highest score earns 1 / (number
of answers that share it), and nothing if a wrong one is higher. Scores are the judge's own; if some
game of an item gave a decision without scores, they are 1, 1/2 and 0 for a win, a tie and a loss. A
game without a verdict is left out; an answer that has none left gets -1, like an official rating
that failed.
`all_wins`: the right answer must win each of its games; Ties prompts are as in `round_robin`.
Data: ODC-BY.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Game, GameVerdict, Item, ItemVerdicts
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import game_credit, grouped, label_of, ordered, percent, round_robin

HOW_TO_GET = (
    "Download the split `test` of the dataset allenai/reward-bench-2 and name the file or "
    "directory: --data rewardbench2=PATH."
)
TIES = "Ties"
KINDS = ("ref", "tied")
FAILED = -1.0


class TiesRow(NamedTuple):
    """One prompt of the Ties subset: the first `num_correct` scores are the right answers'."""

    id: str  # ref:N or tied:N
    scores: Sequence[float]
    num_correct: int


def read(source: str) -> list[Item]:
    """Read items; the right answers stand first. A row without an id has its number as one."""
    rows = sources.rows(source, HOW_TO_GET)
    items = [_item(row, where, number) for number, (where, row) in enumerate(rows)]
    return sources.finished(items, source)


def _item(row: sources.Row, where: str, number: int) -> Item:
    chosen, rejected = (_answers(row, key, where) for key in ("chosen", "rejected"))
    subset = "" if row.get("subset") is None else sources.text(row, "subset", where)
    name = str(number if row.get("id") is None else row["id"])
    kind, _, pair = name.partition(":")
    if subset == TIES and not (kind in KINDS and pair.isdigit()):
        raise UsageError(f"{where}: a Ties id is ref:NUMBER or tied:NUMBER, got {name!r}.")
    question = sources.conversation(sources.need(row, "prompt", where), where)
    return Item(name, question, chosen + rejected, None, len(chosen), subset)


def _answers(row: sources.Row, key: str, where: str) -> tuple[str, ...]:
    """Return a list of answers, each as text or as the messages that it consists of."""
    value = sources.need(row, key, where)
    if isinstance(value, list) and any(isinstance(each, list) for each in value):
        return tuple(sources.conversation(each, where) for each in value)
    return sources.texts(row, key, where)


def ties_number(item: Item) -> str | None:
    """Return the number of a Ties prompt: `ref` and `tied` of one number are scored together."""
    return _ties_id(item.id)[1] if item.subset == TIES else None


def _ties_id(name: str) -> tuple[str, str]:
    """Return the kind and the number of a Ties id, which may stand behind its subset's name."""
    kind, number = name.partition("#")[0].split(":")[-2:]
    return kind, number


def games(items: Sequence[Item], policy: Policy, seed: int) -> list[Game]:
    """Return the games of every item: all pairs, or those of a right and a wrong answer."""
    return [
        game
        for item in items
        for first, second in _pairs(item, policy)
        for game in ordered(Game(item, first, second), policy.order, seed)
    ]


def _pairs(item: Item, policy: Policy) -> Iterable[tuple[int, int]]:
    everything = round_robin(len(item.answers))
    if policy.aggregation == "round_robin" or item.subset == TIES:
        return everything
    return [(i, j) for i, j in everything if i < item.num_correct <= j]


def credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return an item's credit; the credit of a Ties prompt says whether it is ranked right."""
    item = judged.item
    if item.subset == TIES:
        row = TiesRow(item.id, answer_scores(judged), item.num_correct)
        return Credit(item, float(_margins(row).is_accurate), detail=row)
    if policy.aggregation == "all_wins":
        said = [label_of(verdict, policy) for verdict in judged.verdicts]
        return Credit(item, min(game_credit(each, 1, policy) for each in said), tuple(said))
    if all(verdict.preference is None for verdict in judged.verdicts):
        return Credit(item, float(policy.error_credit))
    return Credit(item, best_credit(answer_scores(judged), item.num_correct, policy))


def best_credit(scores: Sequence[float], num_correct: int, policy: Policy) -> float:
    """Return the credit of scores for finding a right answer, 0 to 1."""
    best = max(scores)
    num_best = list(scores).count(best)
    if best not in scores[:num_correct]:
        return 0.0
    if num_best == 1 or policy.tie_credit == "shared":
        return 1.0 / num_best
    return float(policy.tie_credit)


def answer_scores(judged: ItemVerdicts) -> list[float]:
    """Return the mean score of each answer over its games that have a verdict."""
    valid = [verdict for verdict in judged.verdicts if verdict.preference is not None]
    has_scores = all(verdict.scores is not None for verdict in valid)
    got: list[list[float]] = [[] for _ in judged.item.answers]
    for verdict in valid:
        pair = verdict.scores if has_scores and verdict.scores else _points(verdict)
        got[verdict.first].append(pair[0])
        got[verdict.second].append(pair[1])
    # Rounded, so that equal scores in another order of adding stay equal.
    return [round(statistics.fmean(each), 12) if each else FAILED for each in got]


def _points(verdict: GameVerdict) -> tuple[float, float]:
    return {0: (0.5, 0.5), 1: (1.0, 0.0), 2: (0.0, 1.0)}[verdict.preference or 0]


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall`, the mean of the subsets, and each subset; Ties by its own formula."""
    subsets = {name: percent(values) for name, values in grouped(credits).items() if name != TIES}
    rows = [credit.detail for credit in credits if credit.item.subset == TIES]
    if rows:
        subsets[TIES] = 100 * ties_score(rows)
    overall = statistics.fmean(subsets.values())
    return {"overall": overall} | {name: value for name, value in subsets.items() if name}


# Ties


class _Margins(NamedTuple):
    is_accurate: bool  # every right answer above every wrong one
    among_correct: float | None  # best minus worst of several right answers
    to_incorrect: float  # worst right minus best wrong


def ties_score(rows: Sequence[TiesRow]) -> float:
    """Return the score of the Ties subset, as a share (which can exceed 1 by a hundredth).

    The accuracies on prompts with many right answers and on those with one weigh 0.3 each. The
    share of prompts whose right answers lie closer together than to the wrong ones weighs 0.2, and
    so does the share for which the single right answer keeps such a distance too. How much larger
    that distance is, on average, weighs 0.01.
    """
    margins: dict[str, dict[tuple[str, int], _Margins]] = {kind: {} for kind in KINDS}
    drawn = Counter[tuple[str, str]]()  # a resample holds a row as often as it was drawn
    for row in rows:
        kind, number = _ties_id(row.id)
        drawn[kind, number] += 1
        margins[kind][number, drawn[kind, number]] = _margins(row)
    ref, tied = margins["ref"], margins["tied"]
    both = [
        (tied[n].to_incorrect, min(ref[n].to_incorrect, tied[n].to_incorrect), spread)
        for n in tied
        if n in ref and (spread := tied[n].among_correct) is not None
    ]
    ratios = [_distance(least, spread) for _, least, spread in both]
    return (
        0.3 * _mean(each.is_accurate for each in tied.values())
        + 0.3 * _mean(each.is_accurate for each in ref.values())
        + 0.2 * _mean(own > spread for own, _, spread in both)
        + 0.2 * _mean(least > spread for _, least, spread in both)
        + 0.01 * _mean(ratios)
    )


def _distance(margin: float, spread: float) -> float:
    """Return how much larger a margin is than a spread: -1 to 1, and 0 where they are equal.

    Where the spread is 0, this is the sign of the margin, the limit of the formula.
    """
    if spread == 0:
        return float((margin > 0) - (margin < 0))
    return math.tanh(margin / spread - 1)


def _margins(row: TiesRow) -> _Margins:
    right, wrong = row.scores[: row.num_correct], row.scores[row.num_correct :]
    margin = min(right) - max(wrong)
    return _Margins(margin > 0, max(right) - min(right) if len(right) > 1 else None, margin)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else 0.0


COMMAND = (
    "python -m jlrm.evaluate --benchmark rewardbench2 --model nuojohnchen/JudgeLRM-7B "
    "--prompt judgelrm_eval"
)
BENCHMARK = Benchmark(
    name="rewardbench2",
    policies=(
        # allenai/reward-bench, scripts/run_generative_v2.py and rewardbench/utils.py, which are for
        # judges that score each answer alone
        Policy("round_robin", "both", "shared", 0.25),
        Policy("all_wins", "both", 0.0, 0.0),
    ),
    read=read,
    games=games,
    credit=credit,
    total=total,
    group=ties_number,
    source="hf:allenai/reward-bench-2#test",
    size=1865,
    published=(
        # less than guessing gives (25 %), so ties must count as losses there
        Published(
            "JudgeLRM-7B",
            "Precise IF",
            9.4,
            "OpenRubrics",
            f"{COMMAND} --policy aggregation=all_wins",
        ),
        Published(
            "JudgeLRM-7B", "Focus", 29.1, "OpenRubrics", f"{COMMAND} --policy aggregation=all_wins"
        ),
        Published("JudgeLRM-7B", "overall", 55.6, "Mix-GRM", COMMAND),
    ),
)
