"""Text in, text out: what is asked is made into prompts, and what is drawn into judgements.

Everything a client waits for is asked of the engine at once, and followed as one stream of pieces.
A client that leaves cancels all of it. The texts, the reading and the seeds are those of the
command, so that a pair is judged here as it is there; only its random numbers are addressed by what
it says, and not by its place in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from jlrm.config import RunError, UsageError
from jlrm.data import tokenizer as tokenizers
from jlrm.evaluation.games import Game, Response, asked_about, said_of
from jlrm.evaluation.prompting import EncodeGames
from jlrm.evaluation.reading import Reader, check_rubric
from jlrm.judgement import prompts
from jlrm.judges import local
from jlrm.judges.local import Expect, WrittenGame
from jlrm.model.qwen import Params
from jlrm.sampling.policy import TextPolicy
from jlrm.sampling.slots import CUT, RUNNING, STOPPED
from jlrm.sampling.writer import address
from jlrm.server.bodies import Defaults, Drawing
from jlrm.server.engine import Drawn, Engine, Writing
from jlrm.serving.asked import (
    Listed,
    Pair,
    Single,
    each_beside_each,
    games_at_once,
    games_of,
    single_game,
)
from jlrm.serving.calibration import ConfidenceMap
from jlrm.serving.ranking import judged_list, one_by_one, ranked, ranked_at_once
from jlrm.serving.results import JudgedPair, Ranking, ScoredAnswer, judged_pair, scored_answer

LETTERS = 32  # of a token: texts with more than that for each are too long, and not tokenised
TORN = "\ufffd"  # stands for bytes of a character that is not drawn whole
THINK_END = prompts.THINK_TAGS[1]


class Piece(NamedTuple):
    """What has come to the text of one completion of one prompt of a request."""

    prompt: int
    completion: int
    text: str  # all of it so far, as far as its characters are whole
    ids: Sequence[int]
    ending: str  # "stop", "length"; "": it goes on

    @property
    def num_tokens(self) -> int:
        """The number of tokens so far."""
        return len(self.ids)


@dataclass(frozen=True)
class Service:
    """A model of ours, its engine, and how its judgements are asked for and read."""

    policy: TextPolicy
    engine: Engine
    encode: EncodeGames
    expect: Expect
    read: Reader
    defaults: Defaults
    prompt: str  # the template's name
    calibrated: ConfidenceMap | None = None
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)  # a tokenizer serves one thread

    async def judge(
        self,
        pairs: Sequence[Pair],
        orders: str,
        drawing: Drawing,
        tell: Callable[[Game, Piece], None] = lambda game, piece: None,
    ) -> list[JudgedPair]:
        """Judge pairs together; `tell` hears of every piece.

        A judge of single answers is asked about each answer by itself, and sees no order.

        Raises:
          UsageError: a text that is none.
          Busy, RunError: as `Engine.submit`.
        """
        orders = "given" if self.read.is_single else orders
        own = [
            games_of(_identity(pair[:3], i), pair, orders, drawing.seed)
            for i, pair in enumerate(pairs)
        ]
        games = [game for each in own for game in each]
        asked = asked_about(games, self.read.judging)
        responses = said_of(games, await self._responses(asked, drawing, tell), self.read.judging)
        return [
            judged_pair(
                pair.id,
                each,
                [responses[game.id] for game in each],
                self.read,
                self.calibrated,
            )
            for pair, each in zip(pairs, own, strict=True)
        ]

    async def score(
        self,
        asked: Sequence[Single],
        drawing: Drawing,
        tell: Callable[[Game, Piece], None] = lambda game, piece: None,
    ) -> list[ScoredAnswer]:
        """Score answers to questions by themselves; `tell` hears of every piece.

        Raises:
          UsageError: a text that is none, or a prompt without a form for one answer.
          Busy, RunError: as `Engine.submit`.
        """
        games = [single_game(_identity(each[:2], i), each) for i, each in enumerate(asked)]
        responses = await self._responses(games, drawing, tell)
        return [
            scored_answer(each.id, game, responses[game.id], self.read)
            for each, game in zip(asked, games, strict=True)
        ]

    async def rank(
        self,
        asked: Listed,
        at_once: bool,
        orders: str,
        drawing: Drawing,
        tell: Callable[[Game, Piece], None] = lambda game, piece: None,
    ) -> Ranking:
        """Order answers as `Judge.rank` does; `tell` hears of every piece.

        Raises:
          UsageError: a text that is none, or what can't be judged at once (`games_at_once`).
          Busy, RunError: as `Engine.submit`.
        """
        question, answers = asked.question, asked.answers
        told = asked.reference, asked.rubric, asked.is_expected
        if self.read.is_single:
            singles = [Single(question, each, str(i), *told) for i, each in enumerate(answers)]
            scored = await self.score(singles, drawing, tell)
            return ranked_at_once([one_by_one(scored)], self.read, self.calibrated)
        if not at_once:
            pairs = each_beside_each(question, answers, *told)
            return ranked(await self.judge(pairs, orders, drawing, tell), len(answers))
        games = games_at_once(_identity([question, *answers], 0), asked, orders, drawing.seed)
        responses = await self._responses(games, drawing, tell)
        judged = [judged_list(game, responses[game.id], self.read) for game in games]
        return ranked_at_once(judged, self.read, self.calibrated)

    async def _responses(
        self,
        games: Sequence[Game],
        drawing: Drawing,
        tell: Callable[[Game, Piece], None],
    ) -> dict[str, Response]:
        for rubric in {id(game.item.rubric): game.item.rubric for game in games}.values():
            check_rubric(self.read, rubric)
        limit = self.engine.settings.max_prompt_tokens
        responses = {
            game.id: Response(game.id, error=f"The texts have over {LETTERS * limit} characters.")
            for game in games
            if game.num_characters > LETTERS * limit
        }
        games = [game for game in games if game.id not in responses]
        self.engine.check(len(games) * drawing.votes, drawing.votes)
        # In a thread: hundreds of prompts take a while, and others are answered meanwhile.
        async with self.encoding:
            examples = await asyncio.to_thread(self.encode, games)
        responses |= {
            example.comparison.id: local.too_long(example, limit)
            for example in examples
            if len(example.prompt_ids) > limit
        }
        fitting = [
            (game, example)
            for game, example in zip(games, examples, strict=True)
            if game.id not in responses
        ]
        texts: list[dict[int, Piece]] = [{} for _ in fitting]
        waiting: list[WrittenGame] = []
        began = time.monotonic()
        asked = [(example.prompt_ids, _number(game), len(game.shown)) for game, example in fitting]
        async with contextlib.aclosing(self.write(asked, drawing, drawing.is_streamed)) as written:
            async for piece in written:
                texts[piece.prompt][piece.completion] = piece
                tell(fitting[piece.prompt][0], piece)
        for (game, example), pieces in zip(fitting, texts, strict=True):
            ordered = [pieces[i] for i in sorted(pieces)]
            responses[game.id] = Response(
                game=game.id,
                texts=tuple(piece.text for piece in ordered),
                endings=tuple(piece.ending for piece in ordered),
                prompt_tokens=len(example.prompt_ids),
                num_tokens=sum(piece.num_tokens for piece in ordered),
                seconds=time.monotonic() - began,
            )
            if game.item.is_expected:
                ids = [piece.ids for piece in ordered]
                waiting.append(WrittenGame(game, example.prompt_ids, ids, responses[game.id]))
        together = self.policy.decoding.num_shards("P")
        for i in range(0, len(waiting), together):
            part = partial(self._expected, waiting[i : i + together])
            found = await asyncio.wrap_future(self.engine.run(part))
            responses |= {each.game: each for each in found}
        return responses

    def _expected(self, waiting: Sequence[WrittenGame], weights: Params) -> list[Response]:
        return self.expect(weights, waiting)

    async def write(
        self,
        asked: Sequence[tuple[Sequence[int], int, int]],
        drawing: Drawing,
        is_growing: bool = True,
    ) -> AsyncGenerator[Piece, None]:
        """Write completions of prompts, piece by piece.

        asked: of each prompt its ids, its number, and how many scores end a text.
        is_growing: each block is a piece; else a completion comes as one, at its end.

        Raises:
          Busy, RunError: as `Engine.submit`; or the engine has failed.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[int, Drawn | None]] = asyncio.Queue()

        def listener(number: int) -> Callable[[Drawn | None], None]:
            return lambda drawn: _hand_over(loop, pieces, (number, drawn))

        writings = [
            Writing(ids, drawing.max_new_tokens, drawing.temperature, drawing.seed, number,
                    drawing.votes, listener(i), num_stops)
            for i, (ids, number, num_stops) in enumerate(asked)
        ]  # fmt: skip
        self.engine.submit(*writings)
        drawn: dict[tuple[int, int], list[int]] = {}
        left = len(writings) * drawing.votes
        try:
            while left:
                prompt, new = await pieces.get()
                if new is None:
                    raise RunError(self.engine.failure)
                ids = drawn.setdefault((prompt, new.completion), [])
                ids += new.ids
                left -= new.ending != RUNNING
                if is_growing or new.ending != RUNNING:
                    yield self._piece(prompt, new, ids)
        finally:  # the client may have left
            if left:
                for writing in writings:
                    self.engine.cancel(writing)

    def _piece(self, prompt: int, new: Drawn, ids: Sequence[int]) -> Piece:
        (text,) = tokenizers.decode(self.policy.tokenizer, [ids])
        ending = {RUNNING: "", STOPPED: "stop", CUT: "length"}[new.ending]
        return Piece(
            prompt, new.completion, text if ending else text.rstrip(TORN), list(ids), ending
        )

    @property
    def num_stops(self) -> int:
        """The number of scores that end a text that is no game of ours: a pair's, or a list's."""
        return prompts.MOST_LISTED if self.defaults.judging == "lists" else 2

    def chat_prompt(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """Return the ids of a conversation's prompt, which opens the reasoning as a judge's does.

        Control tokens in what is not the system's are broken.

        Raises:
          UsageError: no chat template, one that refuses these messages, or too long a prompt.
        """
        control = tokenizers.control_tokens(self.policy.tokenizer)
        chat = [
            {
                "role": role,
                "content": prompts.neutralise(text, () if role == "system" else control),
            }
            for role, text in messages
        ]
        return self.text_prompt(tokenizers.chat_text(self.policy.tokenizer, chat))

    def text_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt as it stands: control tokens in it are meant.

        Raises:
          UsageError: too long a prompt.
        """
        (ids,) = tokenizers.encode(self.policy.tokenizer, [text])
        limit = self.engine.settings.max_prompt_tokens
        if len(ids) > limit:
            raise UsageError(f"The prompt has {len(ids)} tokens, at most {limit} are taken.")
        return ids

    def without_end(self, text: str) -> str:
        """Return a text without the control token that ended it."""
        for token in self.policy.end_ids:
            (spelled,) = tokenizers.decode(self.policy.tokenizer, [[token]])
            text = text.removesuffix(spelled)
        return text


def parts(text: str) -> tuple[str, str]:
    """Return the reasoning, which the prompt has opened, and what follows it."""
    reasoning, _, rest = text.partition(THINK_END)
    return reasoning, rest


def _identity(texts: Sequence[Any], place: int) -> str:
    """Return a name for a pair by what it says; twice the same pair is two names."""
    said = json.dumps(texts, default=str)
    return f"{hashlib.sha256(said.encode()).hexdigest()[:16]}#{place}"


def _number(game: Game) -> int:
    """Return the number of a game's random numbers: by what it says, and not by its place."""
    said, _, _ = game.item.id.partition("#")
    return address(f"{said}:{game.first}-{game.second}")


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    pieces: asyncio.Queue[tuple[int, Drawn | None]],
    piece: tuple[int, Drawn | None],
) -> None:
    """Put a piece into a queue of the event loop, from the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the loop of a server that was ended at once
        loop.call_soon_threadsafe(pieces.put_nowait, piece)
