"""Lists of answers that are ranked, and the rows to train from that verdicts make."""

from __future__ import annotations

import json
import pathlib

import pytest

from jlrm import judge
from jlrm.config import RunError, UsageError
from jlrm.data import readers
from jlrm.evaluation.games import Response
from jlrm.evaluation.reading import Reader
from jlrm.serving import lists, training_rows
from jlrm.serving.asked import Pair, games_of
from jlrm.serving.results import judged_pair
from jlrm.serving.rows import Row


def written(path: pathlib.Path, *rows: dict) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = (
    {"id": "sums", "question": "q", "answers": ["bb", "a", "cccc"]},
    {"question": "p", "responses": ["same", "also"]},
    {"question": "r", "answers": ["alone"]},
    {"question": "s", "answers": "no list"},
    {"question": "t", "answers": ["a"] * (lists.MOST_ANSWERS + 1)},
)


def test_lists_are_ranked_in_order_and_errors_stand_in_place(tmp_path, capsys):
    source, out = written(tmp_path / "lists.jsonl", *ROWS), tmp_path / "out"
    command = [str(source), "--rank", "--backend", "heuristic", "--model", "longer"]
    pairs = tmp_path / "made" / "pairs.jsonl"
    pairs.parent.mkdir()
    with pytest.raises(RunError, match="3 of 5 rows have no verdict"):
        judge.main([*command, "--out", str(out), "--make-pairs", str(pairs)])
    first, tied, alone, none, many = lines(out / "verdicts.jsonl")
    assert first["order"] == [3, 1, 2] and first["wins"] == [2, 0, 4]
    assert first["answers"] == ROWS[0]["answers"] and first["id"] == "sums"
    assert [pair["id"] for pair in first["pairs"]] == ["1-2", "1-3", "2-3"]
    assert tied["wins"] == [1, 1] and tied["error"] is None
    assert "line 3: answers must be a list of 2 to 32, got 1" in alone["error"]
    assert "line 4" in none["error"] and "got no list" in none["error"]
    assert "got 33" in many["error"]
    # A list without a best answer makes no row.
    (made,) = lines(pairs)
    assert made == {
        "prompt": "q",
        "chosen": "cccc",
        "rejected": "a",
        "score_chosen": 1.0,
        "score_rejected": 0.0,
    }
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["games"], summary["errors"]) == (5, 8, 3)
    assert "5 rankings by 8 games" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--rank", "--single"], "rows of two forms"),
        (["--rank", "--make-judgements", "x"], "--make-judgements has no effect with --rank"),
        (["--single", "--make-pairs", "x"], "--make-pairs has no effect with --single"),
        (["--make-pairs", "."], "is a directory"),
        (["--rank", "--columns", "answer_1=x"], "no field 'answer_1' with --rank"),
    ],
)
def test_flags_without_an_effect_are_refused(tmp_path, monkeypatch, flags, wanted):
    monkeypatch.chdir(tmp_path)
    source = written(tmp_path / "lists.jsonl", ROWS[0])
    with pytest.raises(UsageError, match=wanted):
        judge.main([str(source), "--backend", "heuristic", "--model", "longer", *flags])


def says(one: int, two: int, because: str) -> str:
    return f"{because}\n</think>\n<answer>{one}</answer><answer>{two}</answer>"


def test_judgements_that_gave_the_label_are_kept_in_their_order(tmp_path):
    rows = [
        Row("a", "q", "good", "bad", 1),
        Row("b", "q", "good", "bad", None),  # nobody said which is better
        Row("c", "q", "x", "y", 0),
    ]
    games = {n: games_of(n, Pair(*row[1:4]), "both", 0) for n, row in enumerate(rows)}
    texts = {
        games[0][0].id: (says(3, 8, "wrong"), says(9, 2, "right")),  # two votes
        games[0][1].id: (says(2, 7, "turned"), says(1, 9, "more")),
        games[1][0].id: (says(9, 2, "unlabelled"),) * 2,
        games[2][0].id: (says(5, 5, "a tie"),) * 2,
        games[2][1].id: ("nothing", "to read"),
    }
    responses = {
        game: Response(game, texts=own, endings=("stop",) * len(own)) for game, own in texts.items()
    }
    made = list(training_rows.judgements(rows, games, responses, Reader()))
    assert [row["id"] for row in made] == ["a:1-2", "a:2-1", "c:1-2"]
    assert [row["reasoning"] for row in made] == ["right", "turned", "a tie"]
    assert [row["preference"] for row in made] == [1, 2, 0]
    assert [row["judged"] for row in made] == [[9, 2], [2, 7], [5, 5]]
    assert (made[1]["answer_1"], made[1]["answer_2"]) == ("bad", "good")
    # They are rows that SFT takes as they are.
    read = readers.read(str(written(tmp_path / "made.jsonl", *made)))
    assert [row.judgement for row in read.rows] == [
        ("right", (9, 2)),
        ("turned", (2, 7)),
        ("a tie", (5, 5)),
    ]


def test_orders_that_disagree_make_no_preference():
    row = Row("a", "q", "one", "two", None)
    games = games_of(0, Pair(*row[1:4]), "both", 0)

    def judged(*scores: tuple[int, int]):
        own = [
            Response(g.id, texts=(says(*s, "r"),), endings=("stop",))
            for g, s in zip(games, scores, strict=True)
        ]
        return judged_pair("a", games, own, Reader())

    (agreed,) = training_rows.preferences([row], [judged((2, 9), (8, 3))])
    assert (agreed["chosen"], agreed["rejected"]) == ("two", "one")
    assert (agreed["score_chosen"], agreed["score_rejected"]) == (8.5, 2.5)
    assert not list(training_rows.preferences([row], [judged((9, 2), (8, 3))]))
