"""Judges without a model: what a benchmark gives for nothing, which a trained judge must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jlrm.config import UsageError
from jlrm.evaluation.games import Backend, Game, Response


def _longer(first: str, second: str) -> int:
    if len(first) == len(second):
        return 0
    return 1 if len(first) > len(second) else 2


# Each returns which of two texts wins, as they are shown: 1, 2, or 0 for a tie.
HEURISTICS: dict[str, Callable[[str, str], int]] = {
    "longer": _longer,  # in characters
    "shorter": lambda first, second: _longer(second, first),
    "first": lambda first, second: 1,
    "second": lambda first, second: 2,
}


def judge(name: str) -> Backend:
    """Return the judge that follows a heuristic.

    Raises:
      UsageError: there is no such heuristic.
    """
    if name not in HEURISTICS:
        raise UsageError(f"--model {name} is no heuristic. Known: {', '.join(HEURISTICS)}.")

    def judge_games(games: Sequence[Game], record: Callable[[Response], None]) -> None:
        for game in games:
            item = game.item
            if item.rubric is not None or item.reference is not None or item.is_expected:
                raise UsageError(
                    f"The heuristic {name} reads no rubric and no reference, and has no expected "
                    "scores."
                )
            if game.is_single:
                why = "A heuristic compares answers, and scores none by itself."
                record(Response(game.id, error=why))
                continue
            if game.rest:
                why = "A heuristic compares two answers, and no list at once."
                record(Response(game.id, error=why))
                continue
            answers = game.item.answers
            winner = HEURISTICS[name](answers[game.first], answers[game.second])
            record(Response(game.id, preference=winner))

    return judge_games
