"""`Judge`: one class for a model of ours, an endpoint and a heuristic, asked from Python.

    from jlrm import Judge

    judge = Judge.load("runs/mine@best")
    result = judge.compare("How many legs has a spider?", "Eight.", "Six.")
    result.winner, result.confidence, result.is_consistent

Each pair is judged in both orders unless `orders` says otherwise, all games of a call in the same
batches. Nothing raises for what a judge wrote: a game without a verdict has a status. A run is
asked as it was trained (`data.judging`): one of single answers scores those of a pair one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jlrm.config import UsageError, nearest
from jlrm.evaluation.games import Backend, Game, Response, asked_about, said_of
from jlrm.evaluation.reading import Reader, check_rubric, reader
from jlrm.evaluation.rubrics import Rubric
from jlrm.evaluation.rubrics import rubric as as_rubric
from jlrm.judges import options
from jlrm.judges.requests import NO_PROBABILITIES
from jlrm.serving import calibration as maps
from jlrm.serving.asked import (
    FIELDS,
    Listed,
    Orders,
    Pair,
    Single,
    alone,
    as_text,
    each_beside_each,
    games_at_once,
    games_of,
    is_conversation,
    pair_of,
    rows_of,
    single_game,
)
from jlrm.serving.calibration import ConfidenceMap
from jlrm.serving.ranking import judged_list, one_by_one, ranked, ranked_at_once
from jlrm.serving.results import (
    JudgedPair,
    Ranking,
    ScoredAnswer,
    judged_pair,
    scored_answer,
)
from jlrm.serving.tally import doubt

if TYPE_CHECKING:
    from jlrm.serving.audit import Audit

log = logging.getLogger(__name__)

FEW_GAMES = 8  # below these nothing is said of a judge that writes no verdicts
STREAM_PAIRS = 256  # pairs that an iterator form asks together


class Judge:
    """Compares answers; made by `load`. Calls from several threads wait for one another."""

    def __init__(
        self,
        backend: Backend,
        read: Reader,
        name: str,
        seed: int = 0,
        calibrated: ConfidenceMap | None = None,
        rubric: Rubric | None = None,
        is_expected: bool = False,
        judging: str = "pairs",
    ) -> None:
        # judging: `data.judging` of its training, pairs, single or lists.
        self.judging, self.name, self.calibrated, self.rubric = judging, name, calibrated, rubric
        self._backend, self._seed, self._is_expected = backend, seed, is_expected
        self._read = read._replace(judging="single") if judging == "single" else read
        self._lock, self._num_games, self._num_unread = threading.Lock(), 0, 0
        self._is_told = False

    @classmethod
    def load(
        cls,
        model: str,
        *,
        backend: str = "",
        parser: str = "lenient",
        seed: int = 0,
        calibration: str = "",
        tie_margin: float = 0.0,
        rubric: Any = None,
        expected: bool = False,
        **settings: Any,
    ) -> Judge:
        """Return a judge; weights are read when it is first asked.

        Args:
          model: RUN[@STEP], a Hugging Face directory or hub id, the address of an endpoint
            (http://HOST:8000/v1, whose only model is asked), or what `backend` knows.
          backend: jlrm, openai or heuristic; by default by the form of `model`.
          calibration: a file of `jlrm judge check --calibrate`, or "none"; by default
            calibration.json of the run or the directory, if there is one, which is told.
          tie_margin: scores of a pair that differ by no more are a tie.
          rubric: what to look at: a text, or criteria, a mapping of names to descriptions or to
            {"description": ..., "weight": ...}; each call may give another.
          expected: whether results hold expected scores, of models of ours alone; each call may
            want them. They cost one more pass over each judgement.
          settings: as the flags of `jlrm evaluate`: prompt, scale, votes, temperature,
            max_new_tokens, batch_size, mesh, base_url, ...

        Raises:
          UsageError: anything the user can mend.
        """
        if unknown := settings.keys() - options.OPTIONS.keys():
            name = min(unknown)
            raise UsageError(f"Judge.load: no setting '{name}'. {nearest(name, options.OPTIONS)}")
        is_address = model.startswith(("http://", "https://"))
        is_endpoint = is_address or "base_url" in settings
        backend = backend or (options.OPENAI if is_endpoint else options.JLRM)
        if backend not in options.BACKENDS or backend == options.VERDICTS:
            raise UsageError(f"Judge.load: no backend '{backend}'. Known: jlrm, openai, heuristic.")
        if is_address:
            settings["base_url"] = model
            variable = settings.get("api_key_env") or options.OPTIONS["api_key_env"].default
            model = options.only_model(model, os.environ.get(variable, ""))
        if backend == options.JLRM:
            settings.setdefault("fit_batches", True)  # calls are of a pair as often as of hundreds
        given = {name: settings.get(name) for name in options.OPTIONS}
        chosen = options.options(argparse.Namespace(backend=backend, model=model, **given))
        low, high = chosen.get("scale") or (1, 10)
        pinned = options.pinned(backend, model)
        made = options.make(backend, pinned, options.settled(backend, pinned, chosen), seed, None)
        calibrated = maps.find(calibration, model)
        read, rubric = reader(parser, (low, high), tie_margin), as_rubric(rubric)
        check_rubric(read, rubric)
        if expected and backend == options.OPENAI:
            raise UsageError(NO_PROBABILITIES)
        given = calibrated, rubric, expected, options.judging(backend, pinned)
        return cls(made, read, pinned, seed, *given)

    def __repr__(self) -> str:
        return f"Judge({self.name!r})"

    def compare(
        self,
        question: Any,
        answer_1: Any = None,
        answer_2: Any = None,
        *,
        orders: Orders = "both",
        reference: Any = None,
        rubric: Any = None,
        expected: bool = False,
    ) -> Any:
        """Judge one pair, many, or the rows of a table.

        Args:
          question, answer_1, answer_2: three texts, or three lists of them; or a pandas.DataFrame
            with these columns alone. Conversations, lists of messages, may stand for texts.
          orders: "both"; "given": answer 1 is shown first; "random": by the seed and the pair. A
            judge of single answers sees no order, and has one game of each pair.
          reference: an answer that the judge is shown as right; of many pairs a list.
          rubric, expected: as in `load`.

        Returns:
          A `JudgedPair`, or a list of them in order; of a DataFrame a copy with columns for the
          verdicts.

        Raises:
          UsageError: texts of other types, lists of several lengths, an order that there is not.
        """
        told = {"rubric": as_rubric(rubric), "is_expected": expected}
        if hasattr(question, "assign") and hasattr(question, "columns"):
            return self._compare_frame(question, orders, reference, told)
        if isinstance(question, str) or is_conversation(question):
            pair = Pair(question, answer_1, answer_2, reference=reference, **told)
            return self.compare_all([pair], orders)[0]
        columns = [list(column or ()) for column in (question, answer_1, answer_2)]
        rows = rows_of("compare", FIELDS, columns, reference)
        pairs = [Pair(*texts, reference=own, **told) for *texts, own in rows]
        return self.compare_all(pairs, orders)

    def compare_each(
        self,
        pairs: Iterable[Sequence[str] | Mapping[str, str]],
        *,
        orders: Orders = "both",
        rubric: Any = None,
        expected: bool = False,
    ) -> Iterator[JudgedPair]:
        """Judge a stream of pairs, some hundred at a time, and yield the results in order."""
        given = {"rubric": as_rubric(rubric), "is_expected": expected}
        told = {name: value for name, value in given.items() if value}
        pairs = iter(pairs)
        while part := list(itertools.islice(pairs, STREAM_PAIRS)):
            yield from self.compare_all([pair_of(each)._replace(**told) for each in part], orders)

    def score(
        self,
        question: Any,
        answer: Any,
        *,
        reference: Any = None,
        rubric: Any = None,
        expected: bool = False,
    ) -> Any:
        """Score one answer by itself, or many: two texts (or conversations), or two lists of them.

        Without another answer beside it a judge's scores spread more: to choose between answers,
        `compare` them. reference, rubric, expected: as in `compare`.

        Raises:
          UsageError: texts of other types, lists of two lengths, a prompt without such a form.
        """
        told = {"rubric": as_rubric(rubric), "is_expected": expected}
        if isinstance(question, str) or is_conversation(question):
            return self.score_all([Single(question, answer, reference=reference, **told)])[0]
        rows = rows_of("score", ("question", "answer"), [list(question), list(answer)], reference)
        return self.score_all([Single(*texts, reference=own, **told) for *texts, own in rows])

    def score_all(self, asked: Sequence[Single]) -> list[ScoredAnswer]:
        """Score answers to questions together, and return the results in order."""
        games = [single_game(number, self._told(each)) for number, each in enumerate(asked)]
        with self._lock:
            responses = self._responses(games)
            results = [
                scored_answer(each.id, game, responses.get(game.id), self._read)
                for each, game in zip(asked, games, strict=True)
            ]
            unread = [each.score is None for each in results if each.status != "unjudged"]
            self._count(len(unread), sum(unread))
        return results

    def rank(
        self,
        question: str,
        answers: Sequence[str],
        *,
        at_once: bool | None = None,
        orders: Orders = "both",
        reference: Any = None,
        rubric: Any = None,
        expected: bool = False,
    ) -> Ranking:
        """Order several answers by comparing each with each; the rest as in `compare`.

        Args:
          at_once: one judgement of all answers, 2 to 8, as given and in reverse; by default of a
            run that was trained so (data.judging=lists). A judge of single answers scores each.

        Raises:
          UsageError: fewer than two answers, or more than the judge can be shown.
        """
        if len(answers) < 2:
            raise UsageError(f"Judge.rank: wanted two answers at least, got {len(answers)}.")
        told = reference, as_rubric(rubric), expected
        if self.judging == "single":
            if at_once:
                raise UsageError(alone(self.name))
            asked = [Single(question, each, str(i), *told) for i, each in enumerate(answers)]
            return ranked_at_once([one_by_one(self.score_all(asked))], self._read, self.calibrated)
        if self.judging == "lists" if at_once is None else at_once:
            return self._rank_at_once(Listed(question, answers, *told), orders)
        pairs = each_beside_each(question, answers, *told)
        return ranked(self.compare_all(pairs, orders), len(answers))

    def _rank_at_once(self, asked: Listed, orders: Orders) -> Ranking:
        games = games_at_once(0, self._told(asked), orders, self._seed)
        with self._lock:
            responses = self._responses(games)
            judged = [judged_list(game, responses.get(game.id), self._read) for game in games]
            played = [each for each in judged if each.status != "unjudged"]
            self._count(len(played), sum(each.status != "ok" for each in played))
        return ranked_at_once(judged, self._read, self.calibrated)

    def audit(
        self,
        questions: Sequence[Any],
        answers_1: Sequence[Any],
        answers_2: Sequence[Any],
        labels: Sequence[int | None],
        *,
        orders: Orders = "both",
    ) -> Audit:
        """Judge pairs and compare the verdicts with labels: 1, 2, 0 for a tie, None for none.

        Raises:
          UsageError: no label at all, or another one.
        """
        from jlrm.serving import audit  # which reads files

        if wrong := [each for each in labels if each not in (1, 2, 0, None)]:
            raise UsageError(f"Judge.audit: labels are 1, 2, 0 or None, got {wrong[0]!r}.")
        rows = zip(questions, answers_1, answers_2, strict=True)
        pairs = [pair_of([*map(as_text, texts, FIELDS)]) for texts in rows]
        judged = self.compare_all(pairs, orders)
        return audit.audit(
            [
                audit.Checked(
                    each.winner,
                    label,
                    each.confidence,
                    pair.question,
                    audit.longer(pair.answer_1, pair.answer_2),
                )
                for pair, each, label in zip(pairs, judged, labels, strict=True)
            ]
        )

    async def acompare(self, *texts: Any, **told: Any) -> Any:
        """`compare`, without holding the event loop."""
        return await asyncio.to_thread(self.compare, *texts, **told)

    async def ascore(self, question: Any, answer: Any, **told: Any) -> Any:
        """`score`, without holding the event loop."""
        return await asyncio.to_thread(self.score, question, answer, **told)

    async def arank(self, question: str, answers: Sequence[str], **told: Any) -> Ranking:
        """`rank`, without holding the event loop."""
        return await asyncio.to_thread(self.rank, question, answers, **told)

    def compare_all(self, pairs: Sequence[Pair], orders: Orders = "both") -> list[JudgedPair]:
        """Judge pairs together, and return the results in order."""
        told = [self._told(pair) for pair in pairs]
        orders = "given" if self._read.is_single else orders
        games = [games_of(number, pair, orders, self._seed) for number, pair in enumerate(told)]
        with self._lock:
            responses = self._responses([game for own in games for game in own])
            results = [
                judged_pair(
                    pair.id,
                    own,
                    [responses.get(game.id) for game in own],
                    self._read,
                    self.calibrated,
                )
                for pair, own in zip(pairs, games, strict=True)
            ]
            played = [game for each in results for game in each.games if game.status != "unjudged"]
            self._count(len(played), sum(game.winner is None for game in played))
        return results

    def _responses(self, games: Sequence[Game]) -> dict[str, Response]:
        """Ask about games, and of a judge of single answers about each answer of them."""
        responses: dict[str, Response] = {}
        asked = asked_about(games, self._read.judging)
        self._backend(asked, lambda response: responses.update({response.game: response}))
        pairs = [game for game in games if not game.is_single]
        return {**responses, **said_of(pairs, responses, self._read.judging)}

    def _told(self, asked: Any) -> Any:
        """Return a pair or a single answer with the rubric of this judge if it has none."""
        rubric = self.rubric if asked.rubric is None else asked.rubric
        check_rubric(self._read, rubric)
        return asked._replace(rubric=rubric, is_expected=asked.is_expected or self._is_expected)

    def _compare_frame(
        self, frame: Any, orders: Orders, reference: Any, told: Mapping[str, Any]
    ) -> Any:
        missing = [name for name in FIELDS if name not in frame.columns]
        if missing:
            raise UsageError(
                f"Judge.compare: the table has no column '{missing[0]}'. It has: "
                f"{', '.join(map(str, frame.columns))}."
            )
        rows = rows_of("compare", FIELDS, [list(frame[name]) for name in FIELDS], reference)
        pairs = [Pair(*texts, reference=own, **told) for *texts, own in rows]
        judged = self.compare_all(pairs, orders)
        more = {
            name: [getattr(each, name) for each in judged]
            for name in ("criteria", "expected_scores")
            if any(getattr(each, name) is not None for each in judged)
        }
        return frame.assign(
            winner=[each.winner for each in judged],
            judged_score_1=[each.scores[0] if each.scores else None for each in judged],
            judged_score_2=[each.scores[1] if each.scores else None for each in judged],
            confidence=[each.confidence for each in judged],
            is_consistent=[each.is_consistent for each in judged],
            status=[each.status for each in judged],
            **more,
        )

    def _count(self, num_games: int, num_unread: int) -> None:
        """Say once of a judge that most of what it wrote is no verdict."""
        self._num_games += num_games
        self._num_unread += num_unread
        is_most = 2 * self._num_unread > self._num_games >= FEW_GAMES
        if is_most and not self._is_told:
            self._is_told = True
            log.warning("%s", doubt(self.name, self._num_unread, self._num_games))
