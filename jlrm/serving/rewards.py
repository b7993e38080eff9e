"""A judge as a reward in the forms of TRL and verl, and as a source of pairs for DPO.

    trainer = GRPOTrainer(..., reward_funcs=[trl(Judge.load("runs/mine@best"), reference="answer")])

A completion is compared with a reference, or with the other completions of its prompt; its reward
is the share of games that it wins, a tie counting a half, from 0 to 1. All games of a call are
judged in one batch, in both orders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.serving.asked import Pair, as_text
from jlrm.serving.judge import Judge
from jlrm.serving.results import POINTS, JudgedPair
from jlrm.serving.training_rows import preference

GATHER = 0.05  # seconds in which responses that are done about the same time are gathered


def trl(judge: Judge, reference: str = "") -> Callable[..., list[float | None]]:
    """Return a reward function for TRL's trainers (`reward_funcs`).

    Args:
      reference: column of the data set with answers to compare with; "": completions of one prompt
        are compared with each other.

    A completion without any verdict gets None, which TRL leaves out.
    """

    def jlrm_judge(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        if not reference:
            return among_themselves(judge, prompts, completions)
        if reference not in columns:
            known = ", ".join(sorted(columns))
            raise UsageError(f"The data set has no column '{reference}'. It has: {known}.")
        return against(judge, prompts, completions, columns[reference])

    return jlrm_judge


def verl(
    judge: Judge, question: str = "question"
) -> Callable[..., Coroutine[Any, Any, dict[str, float]]]:
    """Return a `compute_score` for verl's reward loop (0.9), whose ground truths are answers.

    verl asks for each response by itself, and for many at once: what is asked while others are
    judged, or within GATHER seconds, is judged together.

    Args:
      question: name of the question in `extra_info`.

    A response without any verdict gets the score 0, since verl knows no missing one, and
    `has_verdict` 0 beside it, whose mean verl logs.
    """
    together = Together(judge)

    # A function and no object: verl asks `inspect.iscoroutinefunction` whether to await it.
    async def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: Mapping[str, Any],
        **_: Any,
    ) -> dict[str, float]:
        asked = _question(extra_info, question, f"a response to {data_source}")
        share = await together.share(Pair(asked, solution_str, ground_truth))
        return {"score": share or 0.0, "has_verdict": float(share is not None)}

    return compute_score


def verl_batch(judge: Judge, question: str = "question") -> Callable[..., list[float]]:
    """Return a `compute_score` for verl's BatchRewardManager (0.6), as `verl` otherwise."""

    def compute_score(
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[str],
        extra_infos: Sequence[Mapping[str, Any]],
        **_: Any,
    ) -> list[float]:
        questions = [
            _question(extra, question, f"response {number}")
            for number, extra in enumerate(extra_infos)
        ]
        scores = against(judge, questions, solution_strs, ground_truths)
        return [score or 0.0 for score in scores]

    return compute_score


class Together:
    """Judges in batches what is asked pair by pair, in one event loop."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._waiting: list[tuple[Pair, asyncio.Future[float | None]]] = []
        self._judging: asyncio.Task[None] | None = None

    async def share(self, pair: Pair) -> float | None:
        """Return the share of its games that the first answer of a pair wins."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pair, future))
        if self._judging is None or self._judging.done():
            self._judging = asyncio.create_task(self._judge_all())
        return await future

    async def _judge_all(self) -> None:
        await asyncio.sleep(GATHER)
        while self._waiting:
            own, self._waiting = self._waiting, []
            own = [each for each in own if not each[1].done()]  # whose asker waits no more
            try:
                pairs = [pair for pair, _ in own]
                shares = await asyncio.to_thread(_shares, self._judge, pairs)
            except Exception as error:  # each hears of it, where it asked
                for _, future in own:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), share in zip(own, shares, strict=True):
                if not future.done():
                    future.set_result(share)


def _question(extra: Mapping[str, Any] | None, name: str, whose: str) -> Any:
    if name not in (extra or {}):
        raise UsageError(f"extra_info of {whose} has no '{name}'.")
    return (extra or {})[name]


def against(
    judge: Judge, questions: Sequence[Any], answers: Sequence[Any], references: Sequence[Any]
) -> list[float | None]:
    """Return for each answer the share of its games against the reference that it wins."""
    rows = zip(questions, answers, references, strict=True)
    return _shares(judge, [Pair(*texts) for texts in rows])


def among_themselves(
    judge: Judge, questions: Sequence[Any], answers: Sequence[Any]
) -> list[float | None]:
    """Return for each answer the share of its games that it wins against others to its question.

    An answer without a rival gets None.
    """
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(as_text(question, "question"), []).append(number)
    places = [(i, j) for own in groups.values() for i in own for j in own if i < j]
    judged = judge.compare_all([Pair(questions[i], answers[i], answers[j]) for i, j in places])
    won: list[list[float]] = [[] for _ in answers]
    for (i, j), pair in zip(places, judged, strict=True):
        for winner in _winners(pair):
            won[i].append(POINTS[winner])
            won[j].append(1 - POINTS[winner])
    return [_share(each) for each in won]


def preference_pairs(
    judge: Judge, questions: Sequence[Any], answers: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return rows for DPO: each question's best answer as `chosen`, its worst as `rejected`.

    A question whose best and worst win equally often is left out.
    """
    flat = [
        (question, each) for question, own in zip(questions, answers, strict=True) for each in own
    ]
    shares = iter(among_themselves(judge, *zip(*flat, strict=True)) if flat else ())
    return [
        row
        for question, own in zip(questions, answers, strict=True)
        for row in preference(question, own, [next(shares) or 0.0 for _ in own])
    ]


def _shares(judge: Judge, pairs: Sequence[Pair]) -> list[float | None]:
    return [_share([POINTS[w] for w in _winners(each)]) for each in judge.compare_all(pairs)]


def _winners(pair: JudgedPair) -> list[int]:
    return [game.winner for game in pair.games if game.winner is not None]


def _share(points: Sequence[float]) -> float | None:
    return sum(points) / len(points) if points else None
