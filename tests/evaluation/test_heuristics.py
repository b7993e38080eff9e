"""Judges without a model: the verdicts of each heuristic, and what the command makes of them."""

from __future__ import annotations

import json

import pytest

from jlrm import evaluate
from jlrm.config import UsageError
from jlrm.evaluation import heuristics
from jlrm.evaluation.games import Game, Item, both_orders

LONG_FIRST = Item("a", "?", ("four", "two"), label=1)
EQUAL = Item("b", "?", ("one", "two"), label=2)


def winners(name: str, item: Item) -> list[int | None]:
    """Return who wins of those shown, as given and swapped."""
    said = []
    heuristics.judge(name)(both_orders([item]), said.append)
    assert [each.game for each in said] == [f"{item.id}:0-1", f"{item.id}:1-0"]
    return [each.preference for each in said]


@pytest.mark.parametrize(
    ("name", "long_first", "equal"),
    [
        ("longer", [1, 2], [0, 0]),
        ("shorter", [2, 1], [0, 0]),
        ("first", [1, 1], [1, 1]),
        ("second", [2, 2], [2, 2]),
    ],
)
def test_each_heuristic(name, long_first, equal):
    assert winners(name, LONG_FIRST) == long_first
    assert winners(name, EQUAL) == equal


def test_of_more_answers_the_two_shown_are_compared():
    said = []
    item = Item("c", "?", ("a", "bbb", "cc"))
    heuristics.judge("longer")([Game(item, 2, 1), Game(item, 2, 0)], said.append)
    assert [each.preference for each in said] == [2, 1]


def test_an_unknown_heuristic_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="--model longest is no heuristic"):
        evaluate.main(["--backend", "heuristic", "--model", "longest", "--benchmark", "pairs"])


def test_the_command_measures_a_heuristic_as_any_judge(tmp_path, capsys):
    rows = [
        {"id": f"p{i}", "question": f"?{i}", "answer_1": "aa" * i, "answer_2": "b" * 5}
        | {"preference": 1}
        for i in range(1, 9)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--backend", "heuristic", "--benchmark", "pairs", "--data", str(file), "--json"]
    found = {}
    for name in ("longer", "first"):
        out = tmp_path / name
        evaluate.main([*flags, "--model", name, "--out", str(out), "--no-report"])
        found[name] = json.loads(capsys.readouterr().out)["pairs"]
    assert (found["longer"]["overall"], found["longer"]["consistency"]) == (75.0, 100.0)
    assert (found["first"]["overall"], found["first"]["consistency"]) == (50.0, 0.0)
    judge = json.loads((tmp_path / "first" / "results.json").read_text())["judge"]
    assert (judge["backend"], judge["model"], judge["name"]) == ("heuristic", "first", "first")
    with pytest.raises(UsageError, match="--votes has no effect with --backend heuristic"):
        evaluate.main([*flags, "--model", "first", "--votes", "3"])
