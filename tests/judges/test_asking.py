"""What is said of games that were refused, not judged, or cut off."""

from __future__ import annotations

from jlrm.evaluation.games import Game, Item, Response
from jlrm.judges.asking import remarks

GAMES = [Game(Item(str(n), "q", ("one", "two")), 0, 1) for n in range(8)]


def said(*responses: Response, counted: bool = False) -> list[str]:
    return list(remarks("pairs", GAMES, {each.game: each for each in responses}, counted))


def test_nothing_is_said_of_games_that_went_well():
    assert said(*(Response(g.id, texts=("a",), endings=("stop",)) for g in GAMES)) == []
    assert said() == []
    assert said(Response("another:0-1", error="of another benchmark")) == []


def test_reasons_come_by_how_often_they_do():
    reasons = ["late", "late.", "late", "down", "down", "odd", "other", "more"]
    (text,) = said(*(Response(g.id, error=r) for g, r in zip(GAMES, reasons, strict=True)))
    assert text == (
        "pairs: 8 of 8 games were not judged: 3 x late; 2 x down; 1 x odd; and 2 other reasons."
    )


def test_what_was_refused_is_said_with_what_it_means():
    refused = Response(GAMES[0].id, refused="content_filter")
    (text,) = said(refused)
    assert text.startswith("pairs: 1 of 8 games was REFUSED: 1 x content_filter. They do not count")
    assert "--policy refused=error_credit" in text
    (text,) = said(refused, counted=True)
    assert "by error_credit" in text and "--policy" not in text


def test_a_game_is_cut_once_however_many_votes_were():
    cut = Response(GAMES[0].id, texts=("a", "b"), endings=("length", "length"))
    whole = Response(GAMES[1].id, texts=("a", "b"), endings=("stop", "stop"))
    (text,) = said(cut, whole)
    assert text.startswith("pairs: 1 of 8 games was cut off at the limit of tokens.")
    assert "--max-new-tokens" in text
