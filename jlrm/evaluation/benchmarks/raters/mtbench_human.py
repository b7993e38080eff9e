"""MT-Bench human judgements: how often a judge agrees with people on pairs of chat answers.

Rule: lm-sys/FastChat, fastchat/llm_judge/compute_agreement.py. Several experts vote on a pair; each
vote counts once, and votes of the dataset's authors do not count. A pair is judged in both orders;
verdicts that differ are a tie. `agreement` counts all votes, `agreement_no_ties` leaves out tied
votes and tied verdicts (setups S1 and S2 of arXiv 2306.05685, Table 5, which gives both for each
turn). Of turn 2 the judge sees both turns of both models.
Data: lmsys/mt_bench_human_judgments on the Hugging Face hub, split human, CC-BY-4.0; a row is a
vote.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit, Published
from jlrm.evaluation.games import Item, ItemVerdicts
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import game_credit, label_of, pair_games, percent, swap_metrics
from jlrm.judgement.verdict import swap_preference

HOW_TO_GET = (
    "Download the split human of the dataset lmsys/mt_bench_human_judgments and name the file: "
    "--data mtbench_human=FILE."
)
WINNERS = {"model_a": 1, "model_b": 2, "tie": 0, "tie (inconsistent)": 0}


def read(source: str) -> list[Item]:
    """Read votes; an item is a pair of models on a question, after the first or second turn."""
    items: dict[str, Item] = {}
    votes: dict[str, list[int | None]] = {}
    num_left_out = 0
    for where, row in sources.rows(source, HOW_TO_GET):
        if not str(sources.need(row, "judge", where)).startswith("expert"):
            num_left_out += 1
            continue
        vote = sources.choice(row, "winner", where, WINNERS)
        # A pair of models stands in either order; its votes belong together.
        sides = sorted("ab", key=lambda side: sources.text(row, f"model_{side}", where))
        item = _item(row, where, sides)
        items.setdefault(item.id, item)
        votes.setdefault(item.id, []).append(vote if sides == ["a", "b"] else swap_preference(vote))
    voted = [with_votes(item, votes[name]) for name, item in items.items()]
    return sources.finished(voted, source, "their judge is no expert", num_left_out)


def _item(row: sources.Row, where: str, sides: list[str]) -> Item:
    turn = sources.choice(row, "turn", where, {1: 1, 2: 2})
    talks = [_talk(row, f"conversation_{side}", 2 * turn, where) for side in sides]
    models = "-".join(sources.text(row, f"model_{side}", where) for side in sides)
    return Item(
        id=f"{sources.need(row, 'question_id', where)}:{models}:{turn}",
        question=sources.conversation(talks[0][:1], where),
        answers=tuple(sources.conversation(talk[1:], where) for talk in talks),
        subset=f"turn {turn}",
    )


def _talk(row: sources.Row, key: str, length: int, where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation up to the answer that is voted on."""
    talk = sources.need(row, key, where)
    if not isinstance(talk, list) or len(talk) < length:
        raise UsageError(f"{where}: '{key}' must be a list of {length} messages, got {talk!r}.")
    return talk[:length]


def with_votes(item: Item, votes: Sequence[int | None]) -> Item:
    """Add the votes, and as label what most of them say: a tie where no side has the most."""
    (label, most), *others = Counter(votes).most_common()
    is_split = bool(others) and others[0][1] == most
    return dataclasses.replace(item, label=0 if is_split else label, meta={"votes": tuple(votes)})


def _votes(item: Item) -> tuple[int, ...]:
    return item.meta.get("votes", (item.label,))


def _said(judged: ItemVerdicts, policy: Policy) -> int | None:
    """Return the verdict of all games: a tie where they differ, none where one gave none."""
    verdicts = {label_of(each, policy) for each in judged.verdicts}
    if None in verdicts:
        return None
    return verdicts.pop() if len(verdicts) == 1 else 0


def credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return an item's credit: the share of votes that the verdict agrees with."""
    said, votes = _said(judged, policy), _votes(judged.item)
    credits = [game_credit(said, vote, policy) for vote in votes]
    verdicts = tuple(label_of(each, policy) for each in judged.verdicts)
    return Credit(judged.item, sum(credits) / len(credits), verdicts, (said, credits))


def total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return `agreement` of all votes and without ties, of both turns and of each."""
    turns = sorted({each.item.subset for each in credits})
    parts = {"agreement": credits} | {
        turn: [each for each in credits if each.item.subset == turn] for turn in turns if turn
    }
    metrics = {}
    for name, part in parts.items():
        metrics[name] = percent(credit for each in part for credit in each.detail[1])
        untied = [
            credit
            for each in part
            for vote, credit in zip(_votes(each.item), each.detail[1], strict=True)
            if vote != 0 and each.detail[0] != 0
        ]
        if untied:  # else there is nothing to take a share of
            metrics[f"{name}_no_ties"] = percent(untied)
    return metrics | swap_metrics(credits)


SOURCE = "arXiv 2306.05685, Table 5"
COMMAND = "python -m jlrm.evaluate --benchmark mtbench_human --backend openai --model gpt-4"
BENCHMARK = Benchmark(
    name="mtbench_human",
    policies=(Policy("consistent", "both", 0.0, "tie"),),
    read=read,
    games=pair_games,
    credit=credit,
    total=total,
    source="hf:lmsys/mt_bench_human_judgments#human",
    published=tuple(
        Published("GPT-4 (pairs)", f"{turn}{view}", value, SOURCE, COMMAND)
        for turn in ("turn 1", "turn 2")  # the same figures for both
        for view, value in (("", 66.0), ("_no_ties", 85.0))
    ),
)
