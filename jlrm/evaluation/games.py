"""What a benchmark asks of a judge and what comes back: items, games, responses, verdicts.

A benchmark reads *items*. An item has two or more answers; the judge sees two of them at a time, in
an order: a *game* (or one alone, or a whole list at once). What a backend records of a game is a
*response*: a plain JSON row that outlives the process. What is read from it is a *verdict*.
Benchmarks give items credit for their verdicts. They do not know who judged, and backends do not
know what earns credit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jlrm.evaluation.rubrics import Rubric
from jlrm.judgement.verdict import preferred, swap_preference


@dataclass(frozen=True)
class Item:
    """One entry of a benchmark. With two answers `label` is the better one, 0 for a tie."""

    id: str
    question: str
    answers: tuple[str, ...]
    label: int | None = None  # 1, 2, 0; None where the item has more than two answers
    num_correct: int = 1  # where there are more: the first `num_correct` answers are the right ones
    subset: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    # What else a judge is shown or told, where its user says so; no benchmark does.
    reference: str | None = None
    rubric: Rubric | None = None
    is_expected: bool = False  # expected scores are wanted
    golds: tuple[float | None, ...] = ()  # of a list: gold of each answer, higher for a better one

    def gold_label(self, first: int, second: int) -> int | None:
        """Return which of two answers `golds` prefer, 1, 2 or 0; None where one is not known."""
        one, two = self.golds[first], self.golds[second]
        return None if one is None or two is None else preferred(one, two)


@dataclass(frozen=True)
class Game:
    """Two answers of an item, by their indices, in the order in which the judge sees them.

    Or one of them, twice: it is judged by itself. Or more than two, all judged at once.
    """

    item: Item
    first: int
    second: int
    rest: tuple[int, ...] = ()  # from the third on

    @property
    def is_single(self) -> bool:
        """Whether one answer is judged by itself; then `first` and `second` are the same."""
        return self.first == self.second

    @property
    def shown(self) -> tuple[int, ...]:
        """The indices of the answers that the judge sees, in order."""
        return (self.first,) if self.is_single else (self.first, self.second, *self.rest)

    def swapped(self) -> Game:
        """Return the game of the same answers in the reverse order."""
        first, second, *rest = (self.first, self.second, *self.rest)[::-1]
        return Game(self.item, first, second, tuple(rest))

    @property
    def id(self) -> str:
        """A name that is unique in a benchmark and the same in every run."""
        return f"{self.item.id}:{'-'.join(map(str, (self.first, self.second, *self.rest)))}"

    @property
    def num_characters(self) -> int:
        """The number of characters that the judge is shown besides its prompt's own."""
        item = self.item
        more = item.reference or "", item.rubric.text if item.rubric else ""
        return sum(map(len, (item.question, *more, *(item.answers[i] for i in self.shown))))


@dataclass(frozen=True)
class Response:
    """What a judge said in one game.

    Exactly one of `texts`, `scores`, `preference`, `error`, `refused` is there.

    scores: of the first and the second answer as shown. preference: 1 the first as shown, 2 the
    second, 0 a tie; recorded judges may give nothing else. error: why there is no response; the
    game counts as unjudged and is asked again by the next run. refused: why a content filter, or
    the judge itself, does not judge these texts; a policy may count it. endings: how each text
    ended, "stop" or "length" (the limit of tokens); None where nobody said. num_tokens: generated.
    seconds: of wall time, of a batch divided by its games; of slots since the last game ended.
    expected: of each text the expected score at each of its `Reader.places`, None for a text
    without places; only where it is wanted.
    """

    game: str
    texts: tuple[str, ...] | None = None  # as the judge wrote them, one per vote
    scores: tuple[float, float] | None = None
    preference: int | None = None
    error: str | None = None
    refused: str | None = None
    endings: tuple[str, ...] | None = None
    prompt_tokens: int | None = None
    num_tokens: int | None = None
    seconds: float | None = None
    expected: tuple[tuple[float, ...] | None, ...] | None = None


# judge(games, record): calls `record` once per game, in any order, from the calling thread.
Backend = Callable[[Sequence[Game], Callable[[Response], None]], None]


# What a journal says of how its judge was asked; older ones name neither of the last two.
WAYS: Mapping[str, dict[str, bool]] = {
    "pairs": {},
    "single": {"single": True},
    "lists": {"at_once": True},
}


def way_of(header: Mapping[str, Any]) -> str:
    """Return how the judge of a journal was asked."""
    return next((way for way, told in WAYS.items() if told.keys() & header.keys()), "pairs")


def asked_about(games: Iterable[Game], judging: str) -> list[Game]:
    """Return what a judge is asked about games of two answers; judging: as of `data.judging`."""
    if judging == "lists":
        return list({(whole := _whole(game)).id: whole for game in games}.values())
    return alone(games) if judging == "single" else list(games)


def said_of(
    games: Iterable[Game], responses: Mapping[str, Response], judging: str
) -> Mapping[str, Response]:
    """Return the responses to games of two answers, of those to what was asked about them.

    The texts on a list are those of each of its pairs (`Reader.judging`), what they cost is the
    first one's.
    """
    if judging != "lists":
        return beside(games, responses) if judging == "single" else responses
    found: dict[str, Response] = {}
    paid = {"prompt_tokens": None, "num_tokens": None, "seconds": None}
    told = set[str]()
    for game in games:
        name = _whole(game).id
        if (response := responses.get(name)) is not None:
            cost = paid if name in told else {}
            found[game.id] = dataclasses.replace(response, game=game.id, **cost)
            told.add(name)
    return found


def whole(item: Item) -> Game:
    """Return the game of all answers of an item, as they are given."""
    first, second, *rest = range(len(item.answers))
    return Game(item, first, second, tuple(rest))


def _whole(game: Game) -> Game:
    """Return the game of all answers of an item in which a pair of them is shown in this order."""
    given = whole(game.item)
    return given if game.first < game.second else given.swapped()


def within(game: Game, scores: Sequence[float]) -> tuple[float, float]:
    """Return the scores of a game's two answers, of those of the list as it was shown."""
    by_place = dict(zip(_whole(game).shown, scores, strict=True))
    return by_place[game.first], by_place[game.second]


def alone(games: Iterable[Game]) -> list[Game]:
    """Return the games in which each answer of some games is judged by itself, once."""
    apart = (Game(game.item, i, i) for game in games for i in (game.first, game.second))
    return list({game.id: game for game in apart}.values())


def beside(games: Iterable[Game], responses: Mapping[str, Response]) -> dict[str, Response]:
    """Return the responses to games of two answers, of those in which each was judged by itself.

    The texts of the first answer stand before as many of the second: `Reader.is_single`.
    """
    found = {}
    for game in games:
        both = [responses.get(Game(game.item, i, i).id) for i in (game.first, game.second)]
        told = [each for each in both if each is not None]
        failed = [each for each in told if each.error is not None or each.refused is not None]
        if failed:
            found[game.id] = dataclasses.replace(failed[0], game=game.id)
        elif len(told) == 2:
            found[game.id] = _joined(game.id, *told)
    return found


def _joined(name: str, one: Response, two: Response) -> Response:
    """Return two responses to single answers as one."""
    scores = one.scores and two.scores and (one.scores[0], two.scores[0])
    sums: dict[str, Any] = {}
    for field_name in ("prompt_tokens", "num_tokens", "seconds"):
        parts = getattr(one, field_name), getattr(two, field_name)
        sums[field_name] = None if None in parts else sum(parts)
    texts = None if scores else (*(one.texts or ()), *(two.texts or ()))
    endings = one.endings and two.endings and (*one.endings, *two.endings)
    expected = one.expected and two.expected and (*one.expected, *two.expected)
    return Response(name, texts, scores, endings=endings, expected=expected, **sums)


def apart(game: Game, response: Response) -> list[tuple[Game, Response]]:
    """Return the single games that `beside` made a response of, each with its half of it."""
    half = len(response.texts or ()) // 2
    return [
        (
            Game(game.item, i, i),
            dataclasses.replace(
                response,
                texts=response.texts and response.texts[part],
                endings=response.endings and response.endings[part],
                expected=response.expected and response.expected[part],
            ),
        )
        for i, part in ((game.first, slice(half)), (game.second, slice(half, None)))
    ]


class GameVerdict(NamedTuple):
    """A game's verdict; `scores` of the answers `first` and `second`, None where not known."""

    first: int
    second: int
    preference: int | None  # 1: `first`, 2: `second`, 0: a tie, None: no verdict
    scores: tuple[float, float] | None
    status: str  # of judgement/verdict.py; "ok" for recorded scores and preferences

    @property
    def in_order(self) -> int | None:
        """The preference as a label of an item of two answers: swapped games are mapped back."""
        return swap_preference(self.preference) if self.first > self.second else self.preference


class ItemVerdicts(NamedTuple):
    """An item and the verdicts of its games, in the order of the games."""

    item: Item
    verdicts: tuple[GameVerdict, ...]


def both_orders(items: Iterable[Item]) -> list[Game]:
    """Return two games per item of two answers: as given, then swapped."""
    return [Game(item, *order) for item in items for order in ((0, 1), (1, 0))]


def game_verdict(game: Game, scores: tuple[float, float]) -> GameVerdict:
    """Return the verdict of a game that gave two scores."""
    return GameVerdict(game.first, game.second, preferred(*scores), scores, "ok")
