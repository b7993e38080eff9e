"""From what a judge said in a game to its verdict.

Text is read by one of five parsers. `strict` and `lenient` are those of judgement/verdict.py within
the judge's scale; `letters` reads which answer is named (judgement/letters.py). Two are the rules
of others, for their judges: `judgelrm` takes the first two blocks with numbers of any size
(pandalm/utils/judgelrm_inference.py, which then turns failures into ties: here that is a policy),
`judgelm` the two scores of the first line (judgelm/llm_judge/common.py).

A text that was cut off before its verdict has none, though it may hold a draft of one: its status
is `cut`. The rules of others do not ask how a text ended.

Several texts for one game are votes. Scores are averaged, those without scores left out, so that
three votes of 8 against 7 and one of 2 against 9 are a verdict of 6.5 against 7.5. Letters are
counted: the most frequent preference, a tie where two are equally frequent.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import UsageError, nearest
from jlrm.evaluation import rubrics
from jlrm.evaluation.games import (
    Game,
    GameVerdict,
    ItemVerdicts,
    Response,
    apart,
    game_verdict,
    whole,
    within,
)
from jlrm.evaluation.rubrics import Rubric
from jlrm.judgement import letters, verdict

PARSERS = {  # name: what it reads
    "strict": "the grammar that training pays",
    "lenient": "the last pair of scores after the reasoning",
    "letters": "which answer is named: [[A]], [RESULT] B, Answer 1, a tie",
    "judgelrm": "JudgeLRM's own rule",
    "judgelm": "JudgeLM's own rule",
}
RULES_OF_OTHERS = ("judgelrm", "judgelm")
MENDED_BY_MORE_TOKENS = (
    *("no_think_end", "no_answer", "one_answer", "too_few_answers", "broken_answer"),
)
Scores = tuple[float, float]
_PLAIN_BLOCK = re.compile(r"<answer>\s*([0-9]+(?:\.[0-9]+)?)\s*</answer>")


class Reading(NamedTuple):
    """What is read from one text: scores, or a preference alone, or neither; as shown."""

    scores: Scores | None
    preference: int | None
    status: str


class Reader(NamedTuple):
    """How texts are read: a parser by name, and the scale of its scores.

    tie_margin: scores of a pair, means over its games, that differ by no more are a tie.
    judging: of a pair, "pairs"; "single": each answer was judged by itself, and a response holds
    the texts of the first and then those of the second; "lists": all answers of the item were
    judged at once, and it holds the texts on all of them (`games.said_of`).
    """

    parser: str = "lenient"
    scale: tuple[float, float] = (1, 10)
    tie_margin: float = 0.0
    judging: str = "pairs"

    @property
    def is_single(self) -> bool:
        """Whether each answer of a pair was judged by itself."""
        return self.judging == "single"

    def read(self, text: str, ending: str | None = None, rubric: Rubric | None = None) -> Reading:
        """Read one text; ending: "stop" or "length", None where nobody said how it ended."""
        parsed = self._verdict(text, ending)
        if parsed.status != "ok" or rubric is None or not rubric.criteria:
            return parsed
        criteria = self.criteria(text, rubric, 2)
        if isinstance(criteria, str):
            return Reading(None, None, criteria)
        scores = (
            rubric.total([one for one, _ in criteria]),
            rubric.total([two for _, two in criteria]),
        )
        return Reading(scores, verdict.preferred(*scores), "ok")

    def criteria(self, text: str, rubric: Rubric, num_answers: int) -> list[Any] | str:
        """Return the scores of each criterion, or the status of a text in which one has none.

        The scores of one are a tuple, of each answer that is judged.
        """
        low, high = self.scale
        found = rubrics.scores_in(text, rubric, high, num_answers)
        if isinstance(found, str):
            return found
        is_inside = all(low <= score <= high for each in found for score in each.scores)
        return [each.scores for each in found] if is_inside else "out_of_range"

    def places(
        self, text: str, ending: str | None, rubric: Rubric | None, num_answers: int = 2
    ) -> tuple[int, ...] | None:
        """Return where in a text each score begins that is read from it, in characters.

        They are scores of criteria where there are any, those of one after those of another. None
        of a text without a verdict, or with a score that is no plain number: `8` is one, and so is
        the 7 of `7.5`, but not `8/10` or `eight`.
        """
        if num_answers == 1:
            score, _ = self.read_one(text, ending, rubric)
            scores = None if score is None else (score,)
        elif num_answers == 2 and self.judging != "lists":
            scores = self.read(text, ending, rubric).scores
        else:
            scores, _ = self.read_list(text, ending, num_answers, rubric)
        if scores is None:
            return None
        if rubric is not None and rubric.criteria:
            found = rubrics.scores_in(text, rubric, self.scale[1], len(scores))
            if isinstance(found, str):
                return None
            own = [each.places for each in found]
            return None if None in own else tuple(place for each in own for place in each or ())
        blocks = [(match.start(1), float(match[1])) for match in _PLAIN_BLOCK.finditer(text)]
        for i in range(len(blocks) - len(scores), -1, -1):
            part = blocks[i : i + len(scores)]
            if tuple(value for _, value in part) == scores:
                return tuple(place for place, _ in part)
        return None

    def _verdict(self, text: str, ending: str | None) -> Reading:
        parsed = self._read(text)
        if self.parser in RULES_OF_OTHERS:
            return parsed
        is_cut = _is_cut(text, ending, parsed.status)
        # Nobody said how it ended, but what was read stands before an unfinished sentence.
        is_draft = ending is None and parsed.scores is not None and verdict.breaks_off(text)
        return Reading(None, None, "cut") if is_cut or is_draft else parsed

    def read_one(
        self, text: str, ending: str | None = None, rubric: Rubric | None = None
    ) -> tuple[float | None, str]:
        """Read the score of one answer; parsers but `strict` read it as `lenient`."""
        low, high = self.scale
        if self.parser == "strict":
            behind = verdict.behind_rubric(text) or text
            parsed = verdict.parse(behind, min_score=low, max_score=high, num_scores=1)
            score, status = parsed.score_1, parsed.status
        else:
            score, status = verdict.parse_single(text, min_score=low, max_score=high)
        if _is_cut(text, ending, status):
            return None, "cut"
        if score is None or rubric is None or not rubric.criteria:
            return score, status
        criteria = self.criteria(text, rubric, 1)
        if isinstance(criteria, str):
            return None, criteria
        return rubric.total([one for (one,) in criteria]), "ok"

    def read_list(
        self, text: str, ending: str | None, num_answers: int, rubric: Rubric | None = None
    ) -> tuple[tuple[float, ...] | None, str]:
        """Read a score of each answer of a list; parsers but `strict` read them as `lenient`."""
        low, high = self.scale
        is_strict, behind = self.parser == "strict", verdict.behind_rubric(text) or text
        limits: dict[str, Any] = {"min_score": low, "max_score": high, "num_scores": num_answers}
        parsed = verdict.parse(behind, strict=is_strict, **limits)
        is_draft = ending is None and parsed.status == "ok" and verdict.breaks_off(text)
        if is_draft or _is_cut(text, ending, parsed.status):
            return None, "cut"
        if parsed.scores is None or rubric is None or not rubric.criteria:
            return parsed.scores and (*parsed.scores, *parsed.rest), parsed.status
        criteria = self.criteria(text, rubric, num_answers)
        if isinstance(criteria, str):
            return None, criteria
        return tuple(map(rubric.total, zip(*criteria, strict=True))), "ok"

    def _read(self, text: str) -> Reading:
        if self.parser == "letters":
            named = letters.preference(text)
            is_read = isinstance(named, int)
            return Reading(None, named if is_read else None, "ok" if is_read else named)
        if self.parser == "judgelm":
            scores = judgelm_scores(text)
            return _of_scores(scores, "ok" if scores else "no_answer")
        if self.parser == "judgelrm":
            parsed = verdict.parse_authors(text)
            return _of_scores(parsed.scores, parsed.status)
        low, high = self.scale
        is_strict = self.parser == "strict"
        text = verdict.behind_rubric(text) or text  # of a judge that writes one first
        parsed = verdict.parse(text, min_score=low, max_score=high, strict=is_strict)
        return _of_scores(parsed.scores, parsed.status)


def _is_cut(text: str, ending: str | None, status: str) -> bool:
    """Return whether the limit of tokens came before the verdict."""
    is_reasoning = "</think>" not in text
    return ending == "length" and (is_reasoning or status in MENDED_BY_MORE_TOKENS)


def _of_scores(scores: Scores | None, status: str) -> Reading:
    return Reading(scores, verdict.preferred(*scores) if scores else None, status)


def reader(parser: str, scale: tuple[float, float] = (1, 10), tie_margin: float = 0.0) -> Reader:
    """Return a reader. Raises UsageError for an unknown parser, or a margin outside the scale."""
    if not 0 <= tie_margin < scale[1] - scale[0]:
        raise UsageError(
            f"tie_margin={tie_margin:g}: wanted 0 or more, and less than the scale is long "
            f"({scale[1] - scale[0]:g})."
        )
    if parser not in PARSERS:
        known = "; ".join(f"{name} ({what})" for name, what in PARSERS.items())
        raise UsageError(
            f"--parser {parser} is unknown. {nearest(parser, PARSERS)} They read: {known}."
        )
    return Reader(parser, scale, tie_margin)


def check_rubric(read: Reader, rubric: Rubric | None) -> None:
    """Refuse criteria where texts are read by a rule that knows none.

    Raises:
      UsageError: if so.
    """
    if rubric is not None and rubric.criteria and read.parser not in ("strict", "lenient"):
        raise UsageError(
            f"The parser {read.parser} reads no scores of criteria: take lenient or strict, or a "
            "rubric that is a text."
        )


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
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


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
    endings = response.endings or (None,) * len(response.texts)
    if read.judging == "lists":
        scores, status = read_list(whole(game.item), response, read)
        if scores is None:
            return GameVerdict(game.first, game.second, None, None, status)
        return game_verdict(game, within(game, scores))
    if read.is_single:
        return _read_apart(game, [*zip(response.texts, endings, strict=True)], read)
    votes = [
        read.read(*each, game.item.rubric) for each in zip(response.texts, endings, strict=True)
    ]
    pairs = [vote.scores for vote in votes if vote.scores is not None]
    if pairs:
        first, second = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        return game_verdict(game, (first, second))
    named = [vote.preference for vote in votes if vote.preference is not None]
    if named:
        return GameVerdict(game.first, game.second, _majority(named), None, "ok")
    (status, _), *_ = Counter(vote.status for vote in votes).most_common(1)
    return GameVerdict(game.first, game.second, None, None, status)


def _read_apart(game: Game, written: Sequence[tuple[str, str | None]], read: Reader) -> GameVerdict:
    """Return the verdict of the mean scores of two answers, half of the texts of either."""
    half, means = len(written) // 2, []
    for texts in (written[:half], written[half:]):
        votes = [read.read_one(*each, game.item.rubric) for each in texts]
        scores = [score for score, _ in votes if score is not None]
        if not scores:
            (status, _), *_ = Counter(status for _, status in votes).most_common(1)
            return GameVerdict(game.first, game.second, None, None, status)
        means.append(statistics.fmean(scores))
    return game_verdict(game, (means[0], means[1]))


def read_list(game: Game, response: Response, read: Reader) -> tuple[tuple[float, ...] | None, str]:
    """Return the mean scores of answers that were judged at once, in the order shown.

    None without a vote that can be read, with the most frequent status.
    """
    texts = response.texts or ()
    written = zip(texts, response.endings or (None,) * len(texts), strict=True)
    votes = [read.read_list(*each, len(game.shown), game.item.rubric) for each in written]
    scores = [own for own, _ in votes if own is not None]
    if scores:
        return tuple(map(statistics.fmean, zip(*scores, strict=True))), "ok"
    (status, _), *_ = Counter(status for _, status in votes).most_common(1) or [("no_answer", 0)]
    return None, status


def criteria_of(game: Game, response: Response, read: Reader) -> dict[str, Any] | None:
    """Return the mean scores of each criterion over the votes that have a verdict, as shown.

    A score of each answer that is judged. None without such votes or criteria.
    """
    rubric, texts = game.item.rubric, response.texts or ()
    if rubric is None or not rubric.criteria:
        return None
    if read.is_single and not game.is_single:
        one, two = (criteria_of(*half, read) for half in apart(game, response))
        return {name: (one[name], two[name]) for name in one} if one and two else None
    votes, num = [], len(game.shown)
    for text, ending in zip(texts, response.endings or (None,) * len(texts), strict=True):
        if game.is_single:
            scores, _ = read.read_one(text, ending, rubric)
        else:
            scores, _ = read.read_list(text, ending, num, rubric)
        votes += [] if scores is None else [read.criteria(text, rubric, num)]
    if not votes:
        return None
    means = [
        tuple(statistics.fmean(column) for column in zip(*own, strict=True))
        for own in zip(*votes, strict=True)
    ]
    return rubric.by_name([mean[0] for mean in means] if game.is_single else means)


def expected_of(game: Game, response: Response, read: Reader) -> tuple[float, ...] | None:
    """Return the expected scores of the answers as shown: means over votes, of criteria by weight.

    None where there are none: they were not wanted, or no text has plain numbers for scores.
    """
    if read.is_single and not game.is_single:
        one, two = (expected_of(*half, read) for half in apart(game, response))
        return (*one, *two) if one and two else None
    rubric, texts, num = game.item.rubric, response.texts or (), len(game.shown)
    votes = []
    endings = response.endings or (None,) * len(texts)
    for text, ending, own in zip(texts, endings, response.expected or (), strict=False):
        asked = text, ending, rubric, num
        # They were computed at the places that `lenient` reads.
        places = read.places(*asked)
        if (
            own is None
            or places is None
            or places != read._replace(parser="lenient").places(*asked)
        ):
            continue
        if rubric is None or not rubric.criteria:
            votes.append(own)
        else:
            votes.append(tuple(rubric.total(own[i::num]) for i in range(num)))
    return tuple(map(statistics.fmean, zip(*votes, strict=True))) if votes else None


def _majority(preferences: Sequence[int]) -> int:
    """Return the most frequent preference, 0 (a tie) where two are."""
    (most, times), *others = Counter(preferences).most_common()
    return 0 if others and others[0][1] == times else most


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
