"""What is said of games that were refused, not judged, or cut off; and games in blocks."""

from __future__ import annotations

import itertools

from jlrm.evaluation.games import Game, Item, Response
from jlrm.judges.asking import in_blocks, remarks
from jlrm.runtime import hosts

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


def test_a_slow_host_takes_fewer_blocks(monkeypatch):
    """Process 0 of two, of which the other takes every block but the second."""
    mine, theirs, recorded = [], {}, []
    games = [Game(Item(str(n), "q" * n, ("one", "two")), 0, 1) for n in range(10)]

    def judge(games, record):
        mine.append([game.id for game in games])
        for game in games:
            record(Response(game.id, texts=("mine",)))

    def taken(name, size):
        for number in {0, *range(2, size)}:
            answers = [Response(f"{number}.{n}", texts=("theirs",)) for n in range(2)]
            theirs[name, 3 * number] = answers, True
        yield 1

    def received(name):
        return [theirs.pop(key) for key in itertools.islice(list(theirs), 3) if key[0] == name]

    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "taken", taken)
    monkeypatch.setattr(hosts, "received", received)
    monkeypatch.setattr(
        hosts, "send", lambda name, number, value: theirs.update({(name, number): value})
    )
    monkeypatch.setattr(hosts, "gather", lambda what, value: [value])
    in_blocks(judge, 2)(games, recorded.append)
    # Blocks are of like lengths, the longest first: the second holds games 7 and 6.
    assert mine == [[games[7].id, games[6].id]]
    assert not theirs and [r.texts[0] for r in recorded].count("mine") == 2 and len(recorded) == 10
    mine.clear()
    recorded.clear()
    sent = []
    monkeypatch.setattr(hosts, "send", lambda _, place, value: sent.append((place, value[1])))
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    in_blocks(judge, 2, 5)(games * 4, recorded.append)  # 40 games, 2 hosts: 5 of them a block
    assert len(mine) == 1 and len(mine[0]) == 5 and not recorded
    assert sent == [(6, False), (7, False), (8, True)]  # two at a time; places of its own
    monkeypatch.undo()
    assert in_blocks(judge, 2) is judge  # one process has nobody to share with
