"""The backend `verdicts`: what a judge has said already, read from a file.

Rows are JSON or JSONL. A row names its item by `id`, `idx` or `pair_id` and holds one of

    output      raw text of the judge, or a list of votes
    scores      [s1, s2] of the two answers; of an item with more answers, one score for each
    decision    1, 2, 0; A, B, tie; A>B, B>A, A=B; [[A]], Answer 1 and other forms that
                judgement/letters.py reads; null where the judge gave none

of the game in the item's own order, or with `swapped: true` of the other (1 is then the answer
shown first, which is the item's second). `game` names a game outright: "ID:0-1", the indices of
the answers as shown. Lines of `jlrm judge` (verdicts.jsonl) hold all of their `games`. Forms of the
benchmarks' own repositories are read too: PandaLM's `gpt_result` and `result`, JudgeBench's
`judgments` of two games, LLMBar's `results` (rows without an id are known by their texts), and
RM-Bench's `score_chosen` and `score_rejected`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlrm.config import UsageError
from jlrm.evaluation import sources
from jlrm.evaluation.games import Backend, Game, Item, Response
from jlrm.judgement import letters
from jlrm.judgement.verdict import swap_preference

IDS = ("game", "id", "idx", "pair_id")
DECISIONS = {
    **{"1": 1, "2": 2, "0": 0, "tie": 0},
    **{"a": 1, "b": 2, "a>b": 1, "b>a": 2, "a=b": 0, "model_a": 1, "model_b": 2},
}
FORMS = "output, scores, decision, games, gpt_result, result, judgments, results, score_chosen"
HOW_TO_GET = "Name a JSON or JSONL file of recorded verdicts: --verdicts FILE."
SHOWN_CHARACTERS = 80  # of a decision that nobody knows
Said = dict[tuple[int, int], Response]  # by the indices of the answers in the order shown


class Recorded:
    """The responses in a file of verdicts, by game."""

    def __init__(self, path: str, items: Sequence[Item]) -> None:
        """Read a file for the items of a benchmark.

        Raises:
          UsageError: no such file; or, with its line, a row in no known form, one that can't be
            told apart from another, or one with the wrong number of scores.
        """
        find = _finder(items)
        self.responses: dict[str, Response] = {}
        self.num_extra = 0
        rows = list(sources.rows(path, HOW_TO_GET))
        if not rows:
            raise UsageError(f"{path} holds no rows. {HOW_TO_GET}")
        for where, row in rows:
            item, order = find(row, where)
            if item is None:
                self.num_extra += 1
                continue
            for (first, second), response in _said(row, item, order, where).items():
                game = Game(item, first, second)
                if game.id in self.responses:
                    raise UsageError(
                        f"{where}: a second verdict on {game.id}. A row of the other order says "
                        "'swapped': true."
                    )
                self.responses[game.id] = _named(response, game)

    def as_played(self, games: Sequence[Game]) -> list[Game]:
        """Return games in the order in which they were recorded.

        A policy that asks for one order of a pair takes the order that the file has.
        """
        asked = {game.id for game in games}
        return [self._as_played(game, asked) for game in games]

    def _as_played(self, game: Game, asked: set[str]) -> Game:
        mirrored = Game(game.item, game.second, game.first)
        is_other = game.id not in self.responses and mirrored.id in self.responses
        return mirrored if is_other and mirrored.id not in asked else game

    def backend(self, path: str) -> Backend:
        """Return the backend that responds from the file."""

        def judge(games: Sequence[Game], record: Callable[[Response], None]) -> None:
            missing = [game for game in games if game.id not in self.responses]
            if missing or self.num_extra:
                logging.getLogger(__name__).warning("%s", self._counts(path, missing))
            for game in games:
                none = Response(game.id, error=f"{path} has no verdict on it")
                record(self.responses.get(game.id, none))

        return judge

    def _counts(self, path: str, missing: Sequence[Game]) -> str:
        told = (
            (self.num_extra, "rows name no item of the benchmark"),
            (len(missing), "games have no row"),
        )
        text = f"{path}: " + "; ".join(f"{count} {what}" for count, what in told if count)
        if any(Game(g.item, g.second, g.first).id in self.responses for g in missing):
            text += " (their other order has one: --policy order=as_given asks for one order)"
        return text + (f", e.g. {missing[0].id}." if missing else ".")


def _named(response: Response, game: Game) -> Response:
    return dataclasses.replace(response, game=game.id)


def _finder(
    items: Sequence[Item],
) -> Callable[[sources.Row, str], tuple[Item | None, tuple[int, int] | None]]:
    """Return a function that finds a row's item, and its game if the row names one."""
    by_id = {item.id: item for item in items}
    by_text: dict[tuple[str, ...], Item] = {}
    for item in items:
        by_text.setdefault((item.question, *item.answers), item)

    def find(row: sources.Row, where: str) -> tuple[Item | None, tuple[int, int] | None]:
        texts = (row.get(name) for name in ("input", "output_1", "output_2"))
        known = tuple(text for text in texts if isinstance(text, str))
        if len(known) == 3:  # LLMBar has no ids
            return by_text.get(known), None
        name = next((str(row[key]) for key in IDS if row.get(key) is not None), None)
        if name is None:
            raise UsageError(f"{where} names no item: wanted one of {', '.join(IDS)}.")
        with_prefix = [f"{row[key]}:{name}" for key in ("subset", "domain") if key in row]
        for known in (name, *with_prefix):
            if known in by_id:
                return by_id[known], None
        owner, _, order = name.rpartition(":")
        if owner in by_id and (indices := _indices(order, by_id[owner])):
            return by_id[owner], indices
        return None, None

    return find


def _indices(order: str, item: Item) -> tuple[int, int] | None:
    parts = order.split("-")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        return None
    first, second = map(int, parts)
    return (first, second) if first != second and max(first, second) < len(item.answers) else None


# -------------------------------------------------------------------------------------- forms


def _said(row: sources.Row, item: Item, order: tuple[int, int] | None, where: str) -> Said:
    """Return what a row says, by the orders of the games it is about."""
    if isinstance(row.get("games"), list):
        return _games(row["games"], where)
    if "judgments" in row:
        return _judgments(row["judgments"], where)
    if "results" in row:
        return _results(row["results"], where)
    if "score_chosen" in row and "score_rejected" in row:
        scores = [*_numbers(row, "score_chosen", where), *_numbers(row, "score_rejected", where)]
        return _single_scores(scores, item, where)
    if order is None and len(item.answers) > 2:
        if "scores" in row:
            return _single_scores(_numbers(row, "scores", where), item, where)
        raise UsageError(
            f"{where}: {item.id} has {len(item.answers)} answers. Say which two were shown with "
            f'"game": "{item.id}:0-1", or give one score for each.'
        )
    is_swapped = row.get("swapped") or False
    if not isinstance(is_swapped, bool):  # "false" is true to Python
        raise UsageError(f"{where}: 'swapped' must be true or false, got {is_swapped!r}.")
    return {order or ((1, 0) if is_swapped else (0, 1)): _response(row, where)}


def _response(row: sources.Row, where: str) -> Response:
    if row.get("output") is not None:
        return Response("", texts=sources.texts(row, "output", where))
    if row.get("scores") is not None:
        pair = _numbers(row, "scores", where)
        if len(pair) != 2:
            raise UsageError(f"{where}: 'scores' must be two numbers, got {row['scores']!r}.")
        return Response("", scores=(pair[0], pair[1]))
    for key in ("decision", "gpt_result", "result"):
        if key in row:
            return _decision(row[key], where, key)
    if "output" in row or "scores" in row:
        raise UsageError(
            f"{where} holds no verdict: it is null. Leave out rows that were not judged."
        )
    raise UsageError(
        f"{where} holds no verdict in a known form ({FORMS}). "
        f"There are: {', '.join(repr(key) for key in row)}."
    )


def _decision(value: Any, where: str, key: str) -> Response:
    """Read a decision; null is a judgement without a verdict.

    So is other text in the files of the benchmarks' own repositories, whose rules say what it
    counts as. In a `decision` it is a mistake that would cost every game its verdict.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_label = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not is_label and not isinstance(value, str):
        raise UsageError(f"{where}: '{key}' must be a decision such as 1, 2, 0, got {value!r}.")
    text = "" if value is None else str(value)
    word = text.strip().partition("\n")[0].strip().lower()
    if word in DECISIONS:
        return Response("", preference=DECISIONS[word])
    if is_label:
        raise UsageError(f"{where}: '{key}' must be 1, 2 or 0 (a tie), got {value!r}.")
    if word and key == "decision":
        named = letters.preference(text) if word != "c" else "ambiguous"
        if not isinstance(named, int):
            raise UsageError(
                f"{where}: 'decision' is {_shown(text)}, which names no answer. Wanted 1, 2, 0; A, "
                "B, tie; A>B, B>A, A=B; or null where the judge gave none. The raw text of a judge "
                "goes into 'output'."
            )
        return Response("", preference=named)
    return Response("", texts=(text,))


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …")


def _games(value: Sequence[Any], where: str) -> Said:
    """Read the games of a line of `jlrm judge`; its winners are numbers of the item's answers."""
    said: Said = {}
    for game in value:
        order = _of_game(game, "order", where)
        if order not in ([1, 2], [2, 1]):
            raise UsageError(f"{where}: the 'order' of a game must be [1, 2] or [2, 1].")
        if game.get("error"):  # it was not judged
            continue
        response = _decision(game.get("winner"), where, "winner")
        if game.get("texts"):
            response = Response("", texts=sources.texts(game, "texts", where))
        elif order == [2, 1] and response.preference is not None:
            response = Response("", preference=swap_preference(response.preference))
        said[order[0] - 1, order[1] - 1] = response
    return said


def _judgments(value: Any, where: str) -> Said:
    """Read JudgeBench's games: the answers as given, then swapped; each as the judge saw them."""
    if not isinstance(value, list) or not 1 <= len(value) <= 2:
        raise UsageError(f"{where}: 'judgments' must be a list of one or two, got {value!r}.")
    orders = ((0, 1), (1, 0))
    return {
        order: _decision(_of_game(each, "decision", where), where, "decision")
        for order, each in zip(orders, value, strict=False)
    }


def _of_game(said: Any, key: str, where: str) -> Any:
    """Return a field of what is said of a game; null is a game without a verdict."""
    if said is not None and not isinstance(said, Mapping):
        raise UsageError(f"{where}: wanted an object with '{key}' for each game, got {said!r}.")
    return (said or {}).get(key)


def _results(value: Any, where: str) -> Said:
    """Read LLMBar's games; of several attempts the last counts.

    A `winner` is the number of an answer of the item in both orders.
    """
    if not isinstance(value, list) or not value or not isinstance(value[-1], Mapping):
        raise UsageError(f"{where}: 'results' must be a list of objects, got {value!r}.")
    said: Said = {}
    for key, order in (("swap = False", (0, 1)), ("swap = True", (1, 0))):
        if key in value[-1]:
            response = _decision(_of_game(value[-1][key], "winner", where), where, "winner")
            if order == (1, 0) and response.preference is not None:
                response = Response("", preference=swap_preference(response.preference))
            said[order] = response
    if not said:
        raise UsageError(f"{where}: the last of 'results' has neither 'swap = False' nor True.")
    return said


def _single_scores(scores: Sequence[float], item: Item, where: str) -> Said:
    """Make games of scores that a judge gave to each answer alone."""
    if len(scores) != len(item.answers):
        raise UsageError(
            f"{where}: {len(scores)} scores for the {len(item.answers)} answers of {item.id}."
        )
    everyone = range(len(scores))
    return {
        (first, second): Response("", scores=(scores[first], scores[second]))
        for first in everyone
        for second in everyone
        if first != second
    }


def _numbers(row: sources.Row, key: str, where: str) -> list[float]:
    value = row[key]
    is_list = isinstance(value, list)
    if not is_list or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in value):
        raise UsageError(f"{where}: '{key}' must be a list of numbers, got {value!r}.")
    if any(x != x for x in value):
        raise UsageError(f"{where}: '{key}' holds a value that is not a number, got {value!r}.")
    return [float(x) for x in value]
