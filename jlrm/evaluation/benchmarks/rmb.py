"""RMB: pairs and best-of-n lists over 49 scenarios of helpfulness and harmlessness.

Data: Zhou-Zoey/RMB-Reward-Model-Benchmark, RMB_dataset: Pairwise_set and BoN_set. A pair is worth
its verdict; a list counts only if its best answer beats every other (RM-R1's rule for judges, a
game per loser). `overall` is the mean of the four parts. The policy's aggregation is that of the
games of one pair of answers.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Game, Item, ItemVerdicts
from jlrm.evaluation.policies import Policy, pair_policies
from jlrm.evaluation.scoring import (
    combined,
    game_credit,
    label_of,
    ordered,
    pair_credit,
    subset_percents,
)

HOW_TO_GET = (
    "Clone github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark and name the directory: "
    "--data rmb=RMB-Reward-Model-Benchmark/RMB_dataset."
)
GOALS = {"helpfulness": "Helpfulness", "harmlessness": "Harmlessness"}


def read(source: str) -> list[Item]:
    """Read pairs and lists of a file or directory; the best answer stands first."""
    items = [_item(row, where) for where, row in sources.rows(source, HOW_TO_GET)]
    return sources.finished(items, source)


def _item(row: sources.Row, where: str) -> Item:
    is_list = "bon_best" in row
    best, kind = ("bon_best", "BoN") if is_list else ("chosen", "Pairwise")
    others = sources.need(row, "loser_list", where) if is_list else [row.get("reject")]
    answers = [sources.need(row, best, where), *others]
    if len(answers) < 2 or not all(isinstance(answer, dict) for answer in answers):
        raise UsageError(f"{where}: wanted a best answer and at least one worse, as JSON objects.")
    return Item(
        id=f"{kind}:{sources.need(row, 'bon_uid' if is_list else 'pair_uid', where)}",
        question=sources.conversation(sources.need(row, "conversation_input", where), where),
        answers=tuple(sources.text(answer, "answer", where) for answer in answers),
        label=None if is_list else 1,
        subset=f"{_goal(row, where)} {kind}",
    )


def _goal(row: sources.Row, where: str) -> str:
    place = str(row.get("category_path") or where).lower()
    for key, name in GOALS.items():
        if key in place:
            return name
    raise UsageError(f"{where}: neither the row nor its file says helpfulness or harmlessness.")


def games(items: Sequence[Item], policy: Policy, seed: int) -> list[Game]:
    """Return a game of the best answer with each of the others, or two."""
    return [
        game
        for item in items
        for loser in range(1, len(item.answers))
        for game in ordered(Game(item, 0, loser), policy.order, seed)
    ]


def credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return an item's credit: of a list, the least credit of its pairs of answers."""
    if judged.item.label is not None:
        return pair_credit(judged, policy)
    said = [(max(verdict[:2]), label_of(verdict, policy)) for verdict in judged.verdicts]
    said.sort(key=lambda each: each[0])  # stable: the order of games stays
    credits = [
        combined([game_credit(each, 1, policy) for _, each in group], policy.aggregation)
        for _, group in itertools.groupby(said, key=lambda each: each[0])
    ]
    return Credit(judged.item, float(min(credits) == 1.0), tuple(each for _, each in said))


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `overall` and the four parts."""
    subsets = subset_percents(credits)
    return {"overall": statistics.fmean(subsets.values())} | subsets


COMMAND = (
    "python -m jlrm.evaluate --benchmark rmb --model nuojohnchen/JudgeLRM-7B --prompt judgelrm_eval"
)
BENCHMARK = Benchmark(
    name="rmb",
    # no official rule for judges; this is the usual one
    policies=pair_policies(Policy("mean", "random", 0.5, 0.0)),
    read=read,
    games=games,
    credit=credit,
    total=total,
    published=(
        # its four parts are .363, .699, .363, .674, whose mean is .525
        Published("JudgeLRM-7B", "overall", 53.1, "RM-R1, arXiv 2505.02387", COMMAND),
        Published("JudgeLRM-7B", "overall", 73.1, "Mix-GRM", COMMAND),
    ),
)
