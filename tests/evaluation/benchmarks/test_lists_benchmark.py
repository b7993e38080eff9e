"""Lists of answers with gold: pairs that are asked in three ways, and counted in one."""

from __future__ import annotations

import json
import random

import pytest
from test_evaluate import Judge, ran

from jlrm import evaluate
from jlrm.config import RewardConfig, UsageError
from jlrm.data import readers
from jlrm.data.batches import Example
from jlrm.judges import options
from jlrm.training.heldout import METRICS, list_figures
from jlrm.training.scoring import judge_responses

ROWS = [
    {"id": "a", "question": "q", "answers": ["x1", "x2", "x3"], "scores": [3, 1, 2]},
    {"id": "b", "question": "q", "answers": ["y1", "y2", "y3", "y4"], "ranking": [2, 1, None, 2]},
    {"id": "c", "question": "r", "answers": ["z1", "z2"], "scores": [5, 9]},
]
WORTH = {"x1": 9, "x2": 2, "x3": 5, "y1": 4, "y2": 8, "y3": 1, "y4": 4, "z1": 3, "z2": 7}


def says(*scores: object) -> str:
    return "why</think>" + "".join(f"<answer>{score}</answer>" for score in scores)


def fair(game) -> str:
    return says(*(WORTH[game.item.answers[i]] for i in game.shown))


@pytest.fixture
def judged_by(monkeypatch):
    """Put a judge in the place of a model that is called over the network."""

    def use(judge: Judge) -> Judge:
        monkeypatch.setattr(options, "make", lambda *args: judge)
        return judge

    return use


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def flags(rows, out, *more: str) -> list[str]:
    own = ["--benchmark", "lists", "--data", str(rows), "--out", str(out), "--no-report"]
    return [*own, "--model", "m", "--backend", "openai", *more]


ASKED = {
    "": "a:0-1 a:0-2 a:1-2 a:2-1 a:2-0 a:1-0 b:0-1 b:0-3 b:1-3 b:3-1 b:3-0 b:1-0 c:0-1 c:1-0",
    "--single": "a:0-0 a:1-1 a:2-2 b:0-0 b:1-1 b:3-3 c:0-0 c:1-1",
    "--at-once": "a:0-1-2 a:2-1-0 b:0-1-2-3 b:3-2-1-0 c:0-1 c:1-0",
}


@pytest.mark.parametrize("way", ASKED)
def test_pairs_are_asked_in_three_ways(rows, tmp_path, judged_by, capsys, way):
    judge, told = judged_by(Judge(fair)), [way] if way else []
    found = ran(capsys, *flags(rows, tmp_path / "o", *told))["lists"]
    assert judge.asked == ASKED[way].split()
    for name in ("agreement", "consistency", "same_best", "parse_rate"):
        assert found[name] == 100.0, name
    assert found["n"] == 3
    whole = json.loads((tmp_path / "o" / "results.json").read_text())["benchmarks"]["lists"]
    assert whole["clusters"] == 2  # two lists ask one question
    assert whole["diagnostics"]["calibration"]["accuracy"] == 100.0
    if way != "--single":  # where an answer costs again in each of its pairs
        assert whole["diagnostics"]["cost"]["num_tokens"]["total"] == 7 * len(judge.asked)
    ran(capsys, *flags(rows, tmp_path / "o", *told))
    assert judge.asked == ASKED[way].split()  # nothing is asked twice
    again = [*told, "--compare", str(tmp_path / "o")]
    ran(capsys, *flags(rows, tmp_path / "again", *again))
    compared = json.loads((tmp_path / "again" / "results.json").read_text())
    assert compared["benchmarks"]["lists"]["comparison"]["difference"] == 0.0


def test_a_list_that_is_wrong_in_one_order_counts_pair_by_pair(
    rows,
    tmp_path,
    judged_by,
    capsys,
):
    given = {"a": says(9, 2, 1), "b": says(4, 8), "c": says(3, 7)}  # a pair wrong, a score short
    judged_by(Judge(lambda game: given[game.item.id] if game.first == 0 else fair(game)))
    found = ran(capsys, *flags(rows, tmp_path / "o", "--at-once"))["lists"]
    # Of list b no pair is read as given: 2 + 0 + 1 of 7 are right, and all 7 in reverse.
    assert found["agreement"] == pytest.approx(100 * 10 / 14)
    assert found["consistency"] == pytest.approx(100 * 3 / 7)
    assert found["same_best"] == pytest.approx(100 * 2 / 3)
    assert found["parse_rate"] == pytest.approx(100 * 11 / 14)
    first = ["--at-once", "--policy", "aggregation=first_order"]
    found = ran(capsys, *flags(rows, tmp_path / "o", *first))["lists"]
    assert found["agreement"] == pytest.approx(100 * 3 / 7)
    whole = json.loads((tmp_path / "o" / "results.json").read_text())["benchmarks"]["lists"]
    assert whole["statuses"]["too_few_answers"] == 3
    low, high = whole["intervals"]["agreement"]
    assert 0 <= low < 100 * 3 / 7 < high <= 100


def test_the_figures_are_those_of_training(tmp_path, judged_by, capsys):
    draw = random.Random(0)
    made = []
    for number in range(30):
        size = draw.randint(2, 5)
        golds = [draw.choice([1, 2, 3, None]) for _ in range(size - 2)] + [draw.randint(1, 3), 2]
        answers = [f"answer {number} {i}" for i in range(size)]
        made.append({"id": f"{number}", "question": f"q{number}", "answers": answers})
        made[-1]["scores"] = golds
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    part, _ = readers.read_part(str(path), is_listed=True)
    both = [*part.rows, *(row.swapped() for row in part.rows)]
    texts = [
        says(*(draw.randint(1, 4) for _ in row.answers[: draw.choice([9, 9, 9, 1])]))
        for row in both
    ]
    examples = [Example(row, "prompt", [1]) for row in both]
    judgements = judge_responses(RewardConfig(), [], examples, texts, [[1]] * len(both), 8)
    wanted = list_figures(examples, judgements)
    by_game = {
        (row.id, is_swapped): text
        for row, text, is_swapped in zip(both, texts, [False] * 30 + [True] * 30, strict=True)
    }
    judged_by(Judge(lambda game: by_game[game.item.id, game.first > 0]))
    more = ["--at-once", "--policy", "aggregation=first_order", "--parser", "strict"]
    found = ran(capsys, *flags(path, tmp_path / "o", *more))["lists"]
    for theirs, ours in METRICS.items():
        if theirs in found:
            assert found[theirs] == pytest.approx(wanted[ours]), ours
    assert {"agreement", "consistency"} <= found.keys() and 0 < wanted["agreement"] < 100


def test_recorded_scores_of_lists_are_read(rows, tmp_path, capsys):
    file = tmp_path / "verdicts.jsonl"
    said = [{"id": r["id"], "scores": [WORTH[each] for each in r["answers"]]} for r in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in said[:2]))
    with file.open("a") as more:
        more.write(json.dumps({"id": "c", "scores": [3, 7]}) + "\n")
        more.write(json.dumps({"id": "c", "scores": [3, 7], "swapped": True}) + "\n")
    own = ["--benchmark", "lists", "--data", str(rows), "--verdicts", str(file), "--no-report"]
    found = ran(capsys, *own)["lists"]
    assert found["agreement"] == pytest.approx(100 * 13 / 14)
    assert found["same_best"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--at-once", "--single"), "--single and --at-once are two ways to ask"),
        (
            ("--at-once", "--benchmark", "pairs"),
            "--at-once is for lists of your own: --b",
        ),
        (("--at-once", "--backend", "heuristic", "--model", "longer"), "--at-once has no effect w"),
        (("--data", "lists="), "--data names two values for lists"),
    ],
)
def test_what_can_not_be_asked_is_refused(rows, tmp_path, more, says):
    own = flags(rows, tmp_path / "o", *more)
    with pytest.raises(UsageError, match=says):
        evaluate.main(own)


def test_without_data_it_is_said_what_is_wanted(tmp_path):
    own = ["--benchmark", "lists", "--model", "m", "--backend", "openai", "--out", str(tmp_path)]
    with pytest.raises(UsageError, match="Name your lists, e"):
        evaluate.main(own)
