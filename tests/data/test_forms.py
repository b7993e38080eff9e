"""Rows as people have them: conversations, transcripts, rewards, other headers, other columns."""

from __future__ import annotations

import csv
import json
import logging
import pathlib

import pytest

from jlrm.config import UsageError
from jlrm.data.comparisons import Comparison, count_reasons, write_comparisons
from jlrm.data.dataset import write_dataset
from jlrm.data.readers import read

OURS = {"question": "Why?", "answer_1": "Because.", "answer_2": "No.", "preference": 1}


def lines(path: pathlib.Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def talk(*texts: str, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def transcript(*texts: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(texts))


def better_first(row: Comparison) -> tuple[str, str, str]:
    answers = (row.answer_1, row.answer_2)
    return row.question, answers[row.label - 1], answers[2 - row.label]


# ----------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {"chosen": transcript("a", "good"), "rejected": transcript("a", "bad")},
            ("a", "good", "bad"),
        ),
        (
            {
                "chosen": transcript("a", "b", "c", "good"),
                "rejected": transcript("a", "b", "c", "bad"),
            },
            ("User: a\n\nAssistant: b\n\nUser: c", "good", "bad"),
        ),
        (  # apart before the last turn: the rest is the answer
            {
                "chosen": transcript("a", "good", "thanks", "bye"),
                "rejected": transcript("a", "bad"),
            },
            ("a", "Assistant: good\n\nUser: thanks\n\nAssistant: bye", "bad"),
        ),
        (  # the prompt by itself, ending where the answers go on
            {"prompt": transcript("a", ""), "chosen": " good", "rejected": " bad"},
            ("a", "good", "bad"),
        ),
        (  # an answer that writes a dialogue is no conversation with the judge's user
            {
                "prompt": "Write a scene.",
                "chosen": transcript("hi", "ho"),
                "rejected": transcript("x", "y"),
            },
            ("Write a scene.", transcript("hi", "ho"), transcript("x", "y")),
        ),
        (
            {"chosen": json.dumps(talk("a", "good")), "rejected": json.dumps(talk("a", "bad"))},
            ("a", "good", "bad"),
        ),
        (
            {
                "prompt": json.dumps(talk("a")),
                "chosen": json.dumps(talk("", "good")[1:]),
                "rejected": json.dumps(talk("", "bad")[1:]),
            },
            ("a", "good", "bad"),
        ),
    ],
)
def test_chosen_and_rejected_hold_the_conversation(tmp_path, row, wanted):
    (comparison,) = read(lines(tmp_path / "x.jsonl", row)).rows
    assert better_first(comparison) == wanted


@pytest.mark.parametrize(
    "names", [("conversation_a", "conversation_b"), ("Messages 1", "messages2")]
)
@pytest.mark.parametrize(
    ("sides", "wanted"),
    [
        ((talk("a", "x"), talk("a", "y")), ("a", "x", "y")),
        (
            (talk("a", "x", system="s"), talk("a", "y", system="s")),
            ("System: s\n\nUser: a", "x", "y"),
        ),
        (
            (talk("a", "b", "c", "x"), talk("a", "b", "c", "y")),
            ("User: a\n\nAssistant: b\n\nUser: c", "x", "y"),
        ),
        (
            (talk("a", "x", "c", "x2"), talk("a", "y", "d", "y2")),
            (
                "a",
                "Assistant: x\n\nUser: c\n\nAssistant: x2",
                "Assistant: y\n\nUser: d\n\nAssistant: y2",
            ),
        ),
        ((transcript("a", "x"), transcript("a", "y")), ("a", "x", "y")),
        ((json.dumps(talk("a", "x")), json.dumps(talk("a", "y"))), ("a", "x", "y")),
        ((talk("a", "same"), talk("a", "same")), ("a", "same", "same")),
    ],
)
def test_two_conversations_share_their_question(tmp_path, names, sides, wanted):
    row = {**dict(zip(names, sides, strict=True)), "winner": "model_a", "judge": "j"}
    (comparison,) = read(lines(tmp_path / "x.jsonl", row)).rows
    assert (comparison.question, comparison.answer_1, comparison.answer_2) == wanted
    assert comparison.label == 1 and comparison.meta == {"judge": "j"}


def test_a_vote_on_the_first_turn_does_not_see_the_second(tmp_path):
    sides = {
        "conversation_a": talk("a", "x", "c", "x2"),
        "conversation_b": talk("a", "y", "c", "y2"),
    }
    rows = [{**sides, "turn": turn, "winner": "tie"} for turn in (1, 2)]
    first, second = read(lines(tmp_path / "x.jsonl", *rows)).rows
    assert (first.question, first.answer_1, first.answer_2) == ("a", "x", "y")
    assert second.answer_1 == "Assistant: x\n\nUser: c\n\nAssistant: x2"
    assert first.meta == {"turn": 1}


def test_conversations_that_are_no_pair_are_left_out_for_a_reason(tmp_path):
    good = {"conversation_a": talk("a", "x"), "conversation_b": talk("a", "y"), "winner": "a"}
    picture = [{"role": "user", "content": [{"type": "image"}]}, talk("a", "x")[1]]
    bad = [
        {**good, "conversation_b": talk("b", "y")},
        {**good, "conversation_b": talk("a")},
        {**good, "conversation_a": picture},
        {**good, "conversation_a": None},
    ]
    comparisons = read(lines(tmp_path / "x.jsonl", good, *bad))
    assert len(comparisons.rows) == 1
    assert [row.reason for row in comparisons.dropped] == [
        *("no_question", "missing_text", "not_text", "missing_text")
    ]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "Why?", "response 1": "x", "response 2": "y"}, "Why?"),
        ({"Instruction": "Why?", "output_1": "x", "output_2": "y"}, "Why?"),
        ({"instruction": "Add.", "input": "1 2", "output_1": "x", "output_2": "y"}, "Add.\n\n1 2"),
        ({"instruction": "Add.", "input": "", "Response A": "x", "Response B": "y"}, "Add."),
        ({"question": talk("Why?"), "answer_a": "x", "answer_b": "y"}, "Why?"),
        ({"prompt": "old", "question": "Why?", "completion_a": "x", "completion_b": "y"}, "Why?"),
    ],
)
def test_usual_headers_are_ours(tmp_path, row, question):
    (read_row,) = read(lines(tmp_path / "x.jsonl", {**row, "preference": "B"})).rows
    assert (read_row.question, read_row.answer_1, read_row.answer_2) == (question, "x", "y")
    assert read_row.label == 2
    assert read_row.meta == ({"prompt": "old"} if "question" in row and "prompt" in row else {})


def test_chosen_and_rejected_can_be_named(tmp_path):
    row = {"q": "Why?", "good": "x", "bad": "y", "r_good": 2.5, "r_bad": -1.5}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    names |= {"score_chosen": "r_good", "score_rejected": "r_bad"}
    (comparison,) = read(lines(tmp_path / "x.jsonl", row), columns=names).rows
    assert better_first(comparison) == ("Why?", "x", "y") and comparison.meta == {}
    assert sorted(comparison.scores or ()) == [-1.5, 2.5]


# ------------------------------------------------------------------------------- labels and scores


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("reward_chosen", "reward_rejected"),
    ],
)
@pytest.mark.parametrize("pair", [(-0.7, -3.25), (0.5, -1.0), (-1.0, -1.5), ("2.5", "-1")])
def test_rewards_of_a_pair_are_scores_of_any_sign(tmp_path, names, pair):
    texts = {"prompt": "Why?", "chosen": "x", "rejected": "y"}
    source = lines(tmp_path / "x.jsonl", texts | dict(zip(names, pair, strict=True)))
    (row,) = read(source).rows
    assert better_first(row)[1:] == ("x", "y") and row.meta == {}
    assert sorted(row.scores or (), reverse=True) == [float(score) for score in pair]
    write_dataset({"train": [row]}, tmp_path / "prepared")
    assert read(str(tmp_path / "prepared")).rows == [row]


def test_rows_with_rewards_and_no_preference_are_labelled_by_their_order(tmp_path):
    texts = {key: OURS[key] for key in ("question", "answer_1", "answer_2")}
    rows = [
        {**texts, "reward_1": one, "reward_2": two} for one, two in ((-2, -0.5), (3, -7), (0, 0))
    ]
    assert [row.label for row in read(lines(tmp_path / "x.jsonl", *rows)).rows] == [2, 1, 0]


def test_a_review_that_failed_is_no_reward(tmp_path):
    texts = {key: OURS[key] for key in ("question", "answer_1", "answer_2")}
    rows = [OURS, *({**texts, "score": pair} for pair in ([-1, -1], [8, -1], [-1, 0]))]
    dropped = read(lines(tmp_path / "x.jsonl", *rows)).dropped
    assert count_reasons(dropped) == {"failed_review": 3}


def test_a_missing_score_leaves_the_preference(tmp_path):
    texts = {key: OURS[key] for key in ("question", "answer_1", "answer_2")}
    rows = [
        {**OURS, "score_1": float("nan"), "score_2": 3},
        {**OURS, "score_1": 8},
        {**OURS, "score": [None, "nan"]},
        {**texts, "score_1": 8, "score_2": None},
        {**texts, "score_1": "8", "score_2": "5.0"},
    ]
    comparisons = read(lines(tmp_path / "x.jsonl", *rows))
    assert [(row.preference, row.scores) for row in comparisons.rows] == [
        *[(1, None)] * 3,
        (None, (8.0, 5.0)),
    ]
    assert count_reasons(comparisons.dropped) == {"one_score": 1}


def test_other_numberings_are_mapped_everywhere_and_doubted_where_they_are_not(tmp_path, caplog):
    names = {"preference": "label"}
    rows = [{**OURS, "label": label} for label in (0, 1, 2, 0, 1)]
    rows = [{key: value for key, value in row.items() if key != "preference"} for row in rows]
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for source in (lines(tmp_path / "x.jsonl", *rows), str(tmp_path / "x.csv")):
        caplog.clear()
        assert [row.label for row in read(source, columns=names).rows] == [0, 1, 2, 0, 1]
        (record,) = caplog.records
        assert "0 (2 rows), 1 (2), 2 (1)" in record.getMessage()
        assert "the labels in 'label'" in record.getMessage()
        assert "data.values={0: 1, 1: 2, 2: 0}" in record.getMessage()
        caplog.clear()
        mapped = read(source, columns=names, values={0: 1, 1: 2, 2: 0}).rows
        assert [row.label for row in mapped] == [1, 2, 0, 1, 2] and not caplog.records
        assert [
            row.label for row in read(source, columns=names, values={"0": "0", 1: 1, 2: 2}).rows
        ]
        assert not caplog.records


def test_labels_that_scores_confirm_or_pairs_imply_are_not_doubted(tmp_path, caplog):
    scored = [{**OURS, "preference": 0, "score_1": 4, "score_2": 4}] * 9
    read(lines(tmp_path / "x.jsonl", OURS, *scored))
    chosen = [{"prompt": f"{i}?", "chosen": "x", "rejected": "y"} for i in range(40)]
    read(lines(tmp_path / "y.jsonl", *chosen))
    assert not caplog.records
    read(lines(tmp_path / "z.jsonl", *[{**OURS, "winner": 0}] * 3, OURS))
    assert not caplog.records  # `preference` is there
    with caplog.at_level(logging.WARNING):
        rest = {key: value for key, value in OURS.items() if key != "preference"}
        read(lines(tmp_path / "w.jsonl", {**rest, "winner": 0}, {**rest, "winner": 1}))
    assert "the labels in 'winner'" in caplog.text


def test_a_prepared_dataset_has_our_labels_already(tmp_path, caplog):
    rows = [Comparison(str(i), "q", "a", f"{i}", preference=i % 2) for i in range(6)]
    write_dataset({"train": rows}, tmp_path / "prepared")
    assert read(str(tmp_path / "prepared")).rows == rows and not caplog.records
    with pytest.raises(UsageError, match=r"written by prepare.*leave out data\.values"):
        read(f"{tmp_path}/prepared#train", values={0: 1, 1: 2, 2: 0})


# ------------------------------------------------------------------------------------- own columns


def test_what_has_no_other_meaning_is_kept(tmp_path):
    own = {"difficulty": 3, "tags": ["a", {"b": None}], "model_a": "m", "note": None}
    rows = [
        {**OURS, **own, "id": "i", "source": "s", "question_id": 7, "winner": "x"},
        {"prompt": "Why?", "chosen": "x", "rejected": "y", **own, "score_chosen": 2, "id": 1},
        {"question_body": "Why?", "answer1_body": "x", "answer2_body": "y", "score": [1, 2], **own},
        {
            "prompt": "?",
            "data_source": "s",
            "extra_info": {**OURS},
            "reward_model": {"ground_truth": [1, 2]},
            **own,
        },
    ]
    ours, trl, judgelm, verl = read(lines(tmp_path / "x.jsonl", *rows)).rows
    assert ours.meta == {**own, "question_id": 7, "winner": "x"}
    assert trl.meta == judgelm.meta == own
    assert verl.meta == {**own, "extra_info": OURS, "ground_truth": [1, 2]}


def test_own_columns_stand_beside_those_of_meta(tmp_path):
    meta = {"reasoning": "r", "level": 1, "difficulty": 1}
    (row,) = read(lines(tmp_path / "x.jsonl", {**OURS, "meta": meta, "difficulty": 2})).rows
    assert row.meta == {"reasoning": "r", "level": 1, "difficulty": 2}
    write_comparisons([row], tmp_path / "again.jsonl")
    assert read(str(tmp_path / "again.jsonl")).rows == [row]
    write_dataset({"train": [row]}, tmp_path / "prepared")
    assert read(str(tmp_path / "prepared")).rows == [row]


def test_a_column_that_cannot_be_written_costs_no_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**OURS, "blob": b"\xff\x00a"}]), tmp_path / "x.parquet")
    (row,) = read(str(tmp_path / "x.parquet")).rows
    assert row.meta == {"blob": "?\x00a"}


@pytest.mark.parametrize(
    "columns", [{"judged": True}, {"reasoning": ["r"]}, {"judged": [1], "reasoning": "r"}]
)
def test_a_column_that_is_called_like_ours_is_no_written_judgement(tmp_path, columns):
    scored = {**OURS, "score_1": 3, "score_2": 1, "reasoning": "r", **columns}
    (row,) = read(lines(tmp_path / "x.jsonl", scored)).rows
    assert row.judgement is None and row.meta.items() >= columns.items()


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([{"role": "user", "content": "q "}, {"role": "assistant", "content": "good"}], "bad"),
        ("good", "Human: q\n\nAssistant: bad"),
        ({"role": "assistant", "content": "good"}, "bad"),
    ],
)
def test_only_the_answers_of_a_pair_differ_when_one_side_repeats_the_prompt(
    tmp_path, chosen, rejected
):
    row = {"prompt": "q", "chosen": chosen, "rejected": rejected}
    (read_row,) = read(lines(tmp_path / "x.jsonl", row)).rows
    assert better_first(read_row) == ("q", "good", "bad")


def test_turns_in_three_lists_and_a_winner_in_three_columns(tmp_path):
    texts = {"prompt": '["q", "r"]', "response_a": '["x", "x2"]', "response_b": '["y", "y2"]'}
    winners = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    (row,) = read(lines(tmp_path / "x.jsonl", {**texts, **winners})).rows
    assert (row.question, row.label, row.meta) == ("q", 2, {})
    assert row.answer_2 == "Assistant: y\n\nUser: r\n\nAssistant: y2"


# ------------------------------------------------------------------------------------- given files


def test_the_rows_that_users_reported(cases, caplog):
    def rows(name: str, **settings) -> list[Comparison]:
        return read(str(cases / "rows" / name), **settings).rows

    names = {"question": "prompt", "answer_1": "response 1", "answer_2": "response 2"}
    names["preference"] = "label"
    wrong = [row.label for row in rows("zero_one_two.jsonl", columns=names)]
    assert wrong == [0, 1, 2, 0, 1] and "data.values={0: 1, 1: 2, 2: 0}" in caplog.text
    mapped = rows("zero_one_two.jsonl", columns=names, values={0: 1, 1: 2, 2: 0})
    assert [row.label for row in mapped] == [1, 2, 0, 1, 2]
    for number, row in enumerate(rows("human_assistant.jsonl")):
        context = f"User: q{number}?\n\nAssistant: Sure. What for?\n\nUser: A test."
        assert better_first(row) == (context, f"good {number}", f"bad {number}")
    talks = rows("two_conversations.jsonl")
    assert [row.label for row in talks] == [1, 2, 0, 0]
    assert talks[1].question == "q1?" and talks[1].meta["judge"] == "expert"
    assert talks[1].answer_2 == "Assistant: y1\n\nUser: more?\n\nAssistant: y2"
    graded = read(str(cases / "rows" / "graded_preference.jsonl"))
    assert [row.label for row in graded.rows] == [1, 2, 0]
    assert count_reasons(graded.dropped) == {"no_label": 1}
    assert {better_first(row)[1:] for row in rows("reward_scores.jsonl")} == {("good", "bad")}
    assert [row.scores for row in rows("scores_as_text.jsonl")] == [(8.0, 5.0)] * 2
    assert [row.label for row in rows("one_score_missing.jsonl")] == [1, 2]
    assert [row.scores for row in rows("directory")] == [(5.0, 3.0), (5.5, 3.0)]
    assert [row.source for row in rows("directory")] == ["", "b"]
