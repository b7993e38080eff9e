"""From what a judge said in a game to its verdict.

Text is read by one of four parsers. `strict` and `lenient` are those of judgement/verdict.py within
the judge's scale; `judgelrm` is `lenient` for scores of any size, as the authors' evaluation reads
them (pandalm/utils/judgelrm_inference.py, which then turns failures into ties: here that is a
policy); `judgelm` takes JudgeLM's two scores from the first line (judgelm/llm_judge/common.py).

Several texts for one game are votes: their scores are averaged, those without scores left out, so
that three votes of 8 against 7 and one of 2 against 9 are a verdict of 6.5 against 7.5.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jlrm.config import UsageError, nearest
from jlrm.evaluation.games import Game, GameVerdict, ItemVerdicts, Response, game_verdict
from jlrm.judgement import verdict

PARSERS = ("strict", "lenient", "judgelrm", "judgelm")
Scores = tuple[float, float]


class Reader(NamedTuple):
    """How texts are read: a parser by name, and the scale of its scores."""

    parser: str = "lenient"
    scale: tuple[float, float] = (1, 10)

    def scores(self, text: str) -> tuple[Scores | None, str]:
        """Return both scores as shown, or None, and a status."""
        if self.parser == "judgelm":
            scores = judgelm_scores(text)
            return scores, "ok" if scores else "no_answer"
        low, high = (-math.inf, math.inf) if self.parser == "judgelrm" else self.scale
        is_strict = self.parser == "strict"
        read = verdict.parse(text, min_score=low, max_score=high, strict=is_strict)
        return read.scores, read.status


def reader(parser: str, scale: tuple[float, float] = (1, 10)) -> Reader:
    """Return a reader. Raises UsageError for an unknown parser."""
    if parser not in PARSERS:
        raise UsageError(f"--parser {parser} is unknown. {nearest(parser, PARSERS)}")
    return Reader(parser, scale)


def judgelm_scores(text: str) -> Scores | None:
    """Return the two numbers of a JudgeLM judgement's first line, None if they can't be read.

    Commas are spaces, and one space separates: `8 9` and `8,9` are read, `8, 9` is not.
    """
    parts = text.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return None
    try:
        first, second = map(float, parts)
    except ValueError:
        return None
    return None if math.isnan(first) or math.isnan(second) else (first, second)


def read_response(game: Game, response: Response, read: Reader) -> GameVerdict:
    """Return the verdict of a game; a failed reading has a status and no preference.

    With several texts, none of which can be read, the status is the most frequent one.
    """
    if response.scores is not None:
        return game_verdict(game, response.scores)
    if response.preference is not None:
        return GameVerdict(game.first, game.second, response.preference, None, "ok")
    if response.refused is not None:
        return GameVerdict(game.first, game.second, None, None, "refused")
    if not response.texts:
        raise ValueError(f"game {game.id} is unjudged: {response.error}")
    votes = [read.scores(text) for text in response.texts]
    pairs = [scores for scores, _ in votes if scores is not None]
    if not pairs:
        (status, _), *_ = Counter(status for _, status in votes).most_common(1)
        return GameVerdict(game.first, game.second, None, None, status)
    first, second = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    return game_verdict(game, (first, second))


def judged_items(
    games: Iterable[Game], responses: Mapping[str, Response], read: Reader
) -> tuple[list[ItemVerdicts], int]:
    """Return the items whose games all have a response, in order, and the number of the others."""
    by_item: dict[str, list[Game]] = {}
    for game in games:
        by_item.setdefault(game.item.id, []).append(game)
    judged = []
    for own in by_item.values():
        given = [response for game in own if (response := responses.get(game.id))]
        if len(given) == len(own) and all(response.error is None for response in given):
            verdicts = (read_response(*each, read) for each in zip(own, given, strict=True))
            judged.append(ItemVerdicts(own[0].item, tuple(verdicts)))
    return judged, len(by_item) - len(judged)


def statuses(judged: Sequence[ItemVerdicts]) -> dict[str, int]:
    """Count games by the status of their verdict, the frequent ones first."""
    return dict(Counter(o.status for each in judged for o in each.verdicts).most_common())


def count(judged: Sequence[ItemVerdicts], preference: int | None) -> int:
    """Count games with a preference: 0 for ties, None for games without a verdict."""
    return sum(o.preference == preference for each in judged for o in each.verdicts)
