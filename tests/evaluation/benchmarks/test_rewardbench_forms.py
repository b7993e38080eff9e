"""RewardBench's rows in every form that they are published in: one item, whatever the form."""

from __future__ import annotations

import json

import pytest

from jlrm import evaluate
from jlrm.config import UsageError
from jlrm.evaluation.benchmarks.registry import BENCHMARKS, policy_of
from jlrm.evaluation.games import Response
from jlrm.evaluation.reading import Reader, judged_items


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def read(tmp_path, *rows, name="rewardbench"):
    return BENCHMARKS[name].read(write(tmp_path / "rows.json", rows))


TEXTS = {"chosen": "good", "rejected": "bad"}
LONG = [user("Hi"), assistant("Ho"), user("So?")]
LONG_TEXT = "User: Hi\n\nAssistant: Ho\n\nUser: So?"


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "Hi", **TEXTS}, "Hi"),
        ({"question": "Hi", **TEXTS}, "Hi"),
        ({"input": "Hi", **TEXTS}, "Hi"),
        ({"prompt": [user("Hi")], **TEXTS}, "Hi"),
        ({"prompt": ["Hi"], **TEXTS}, "Hi"),
        ({"prompt": LONG, **TEXTS}, LONG_TEXT),
        ({"prompt": ["Hi", "Ho", "So?"], **TEXTS}, LONG_TEXT),
        ({"prompt": "Hi", "chosen": assistant("good"), "rejected": assistant("bad")}, "Hi"),
        ({"prompt": "Hi", "chosen": [assistant("good")], "rejected": [assistant("bad")]}, "Hi"),
        (
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), assistant("good")],
                "rejected": [user("Hi"), assistant("bad")],
            },
            "Hi",
        ),
        ({"chosen": [*LONG, assistant("good")], "rejected": [*LONG, assistant("bad")]}, LONG_TEXT),
        (
            {
                "prompt": "So?",
                "chosen": [*LONG, assistant("good")],
                "rejected": [*LONG, assistant("bad")],
            },
            LONG_TEXT,
        ),
        ({"prompt": "Hi", "chosen": [assistant("good")], "rejected": "bad"}, "Hi"),
    ],
)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_one_item_whatever_the_form(tmp_path, row, question, is_swapped):
    answers = ("good", "bad")
    if is_swapped:  # which is better is said by the column alone
        row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        answers = ("bad", "good")
    (item,) = read(tmp_path, row)
    assert (item.question, item.answers, item.label) == (question, answers, 1)
    assert (item.id, item.subset) == ("0", "")


def test_ids_are_those_of_the_rows_or_their_numbers(tmp_path):
    row = {"prompt": "Hi", **TEXTS}
    items = read(tmp_path, {**row, "id": 0}, row, {**row, "id": None}, {**row, "id": "x"})
    assert [item.id for item in items] == ["0", "1", "2", "x"]


def test_equal_texts_stay_as_the_official_set_has_them(tmp_path, caplog):
    """Of conversations it can't be told where the answers begin if nothing differs."""
    same = {"chosen": [user("Hi"), assistant("x")], "rejected": [user("Hi"), assistant("x")]}
    row = {"prompt": "Hi", **TEXTS}
    items = read(tmp_path, row, {**row, "chosen": "bad"}, same)
    assert [item.answers for item in items] == [("good", "bad"), ("bad", "bad")]
    assert "1 rows are not asked" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "good"}, "row 1 has no field 'rejected'"),
        (TEXTS, "row 1 has no field 'prompt'"),
        ({"prompt": {"a": 1}, **TEXTS}, "row 1: wanted text or a list"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "bad"}, "'chosen' must be text"),
        ({"prompt": "Hi", **TEXTS, "subset": 3}, "'subset' must be text, got 3"),
    ],
)
def test_rows_that_hold_no_pair_are_named(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, row)


def test_rows_without_a_section_have_the_plain_mean(tmp_path):
    """As the rewardbench command counts other data: right answers over all rows."""
    rows = [{"prompt": str(i), **TEXTS, "subset": s} for i, s in enumerate(("shp", "shp", "hhh"))]
    items = read(tmp_path, *rows, {"prompt": "3", **TEXTS})
    known, policy = BENCHMARKS["rewardbench"], policy_of("rewardbench", ["order=as_given"])
    games = known.games(items, policy, 0)
    said = {game.id: Response(game.id, preference=2 if n else 1) for n, game in enumerate(games)}
    judged, _ = judged_items(games, said, Reader())
    assert known.metrics(judged, policy) == {"overall": 25.0, "micro": 25.0, "shp": 50.0, "hhh": 0}


def test_rewardbench2_reads_messages_and_rows_without_id_or_subset(tmp_path):
    rows = [
        {"prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c", "d"]},
        {"prompt": [user("Hi")], "chosen": [[assistant("a")]], "rejected": [[assistant("b")]] * 3},
        {"prompt": LONG, "chosen": "a", "rejected": ["b"], "subset": "Focus", "id": "7"},
    ]
    items = read(tmp_path, *rows, name="rewardbench2")
    assert [(item.id, item.question, item.subset) for item in items] == [
        ("0", "Hi", ""),
        ("1", "Hi", ""),
        ("7", LONG_TEXT, "Focus"),
    ]
    assert items[1].answers == ("a", "b", "b", "b")
    known = BENCHMARKS["rewardbench2"]
    games = known.games(items, known.policy, 0)
    said = {g.id: Response(g.id, preference=2 if g.first else 1) for g in games}
    judged, _ = judged_items(games, said, Reader())
    metrics = known.metrics(judged, known.policy)
    assert metrics["overall"] == metrics["Focus"] == 100.0 and "" not in metrics
    with pytest.raises(UsageError, match="a Ties id is ref:NUMBER"):
        read(tmp_path, {**rows[0], "subset": "Ties"}, name="rewardbench2")


def test_a_subset_is_judged_alone_and_takes_rows_that_name_none(tmp_path, capsys, caplog):
    rows = [
        {"id": i, "prompt": "Hi", **TEXTS} | ({"subset": subset} if subset else {})
        for i, subset in enumerate(("hep-go", "", "hep-cpp", "hep-go"))
    ]
    data = write(tmp_path / "rows.json", rows)
    said = [{"id": i, "decision": decision} for i, decision in enumerate((1, 2, 2, 1))]
    verdicts = write(tmp_path / "said.json", said)
    flags = ["--benchmark", "rewardbench", "--data", data, "--verdicts", verdicts, "--json"]
    flags += ["--policy", "order=as_given", "--no-report", "--out", str(tmp_path / "out")]

    def headline(*more):
        evaluate.main([*flags, *more])
        return json.loads(capsys.readouterr().out)["rewardbench"]

    everything = headline()
    assert (everything["n"], everything["micro"], everything["hep-go"]) == (4, 50.0, 100.0)
    alone = headline("--subset", "hep-go")
    assert alone["n"] == 3 and "hep-cpp" not in alone
    assert "1 of 4 rows name no subset and are counted as 'hep-go'" in caplog.text
    assert alone["overall"] == alone["Reasoning"] == pytest.approx(100 * 2 / 3)
    assert headline("--subset", "rewardbench=hep-cpp")["n"] == 2
    rows[1]["subset"] = "hep-js"
    write(tmp_path / "rows.json", rows)
    with pytest.raises(UsageError, match=r"--subset hep-gp has no item\. Did you mean 'hep-go'"):
        headline("--subset", "hep-gp")
