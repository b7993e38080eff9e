"""Rows are held out by whole questions, of small data a fifth; gold scores are checked."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from jlrm.config import DataConfig, UsageError
from jlrm.data import readers
from jlrm.data.comparisons import fold, write_comparisons
from jlrm.data.dataset import write_dataset
from jlrm.data.splits import read_splits
from jlrm.data.worlds import toy

SCALE = (1, 10)


def rows(num: int, num_questions: int = 0):
    made = toy.comparisons(seed=2, num_rows=num)
    return [
        dataclasses.replace(row, question=f"Question {i % (num_questions or num)}")
        for i, row in enumerate(made)
    ]


@pytest.fixture
def source(tmp_path):
    def write(made) -> str:
        write_comparisons(made, tmp_path / "x.jsonl")
        return str(tmp_path / "x.jsonl")

    return write


@pytest.mark.parametrize(
    ("num", "eval_rows", "held_out"),
    [(60, 0, 12), (3, 0, 1), (2, 0, 1), (999, 0, 199), (1200, 0, 200), (60, 30, 30), (60, 59, 59)],
)
def test_of_small_data_a_fifth_is_held_out_and_it_is_said(source, caplog, num, eval_rows, held_out):
    config = DataConfig(train=source(rows(num)), eval_rows=eval_rows)
    splits = read_splits(config, SCALE, needs_scores=False)
    assert (len(splits.heldout), len(splits.train)) == (held_out, num - held_out)
    is_said = f"{held_out} of its {num} rows are held out, {num - held_out}" in caplog.text
    assert is_said == (not eval_rows and num < 1000)


def test_a_number_that_is_asked_for_is_kept_or_refused(source):
    config = DataConfig(train=source(rows(60)), eval_rows=200)
    with pytest.raises(UsageError, match=r"60 usable rows .* data\.eval_rows=200 would hold all"):
        read_splits(config, SCALE, needs_scores=False)


def test_one_question_can_not_be_divided(source):
    config = DataConfig(train=source(rows(60, num_questions=1)))
    with pytest.raises(UsageError, match=r"60 usable rows with 1 different questions"):
        read_splits(config, SCALE, needs_scores=False)


def test_a_question_is_on_one_side(source):
    splits = read_splits(DataConfig(train=source(rows(60, 6))), SCALE, needs_scores=False)
    sides = [{row.question for row in side.mine} for side in (splits.train, splits.heldout)]
    assert all(sides) and not sides[0] & sides[1]


def test_rows_between_the_two_sides_are_counted(source, caplog):
    made = rows(333, num_questions=3)
    splits = read_splits(DataConfig(train=source(made), eval_rows=99), SCALE, needs_scores=False)
    lost = len(made) - len(splits.train) - len(splits.heldout)
    assert lost and f"{lost} rows ask a question that is held out" in caplog.text


@pytest.mark.slow
def test_a_held_out_file_of_its_own_and_the_toy_world_give_200(source, tmp_path):
    write_comparisons(rows(300), tmp_path / "eval.jsonl")
    config = DataConfig(train=source(rows(20)), eval=str(tmp_path / "eval.jsonl"))
    splits = read_splits(config, SCALE, needs_scores=False)
    assert (len(splits.train), len(splits.heldout)) == (20, 200)
    assert len(read_splits(DataConfig(train="toy"), SCALE, needs_scores=False).heldout) == 200


def test_scores_of_another_scale_are_said_at_reading_and_mapped_by_a_setting(tmp_path, caplog):
    texts = {"answer_1": "a", "answer_2": "b"}
    lines = [{"question": f"q{i}", **texts, "score_1": 90, "score_2": 30} for i in range(10)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(train=str(tmp_path / "x.jsonl"))
    with caplog.at_level(logging.WARNING):
        read_splits(config, SCALE, needs_scores=True)
    assert "10 of 10 rows with scores have one outside the scale of 1 to 10" in caplog.text
    assert "data.rescale={0: 1, 100: 10}" in caplog.text
    caplog.clear()
    config = dataclasses.replace(config, rescale={"0": 1.0, "100": 10.0})
    splits = read_splits(config, SCALE, needs_scores=True)
    assert splits.train.mine[0].scores == splits.heldout.mine[0].scores == (9.1, 3.7)
    assert "outside the scale" not in caplog.text
    caplog.clear()
    read_splits(dataclasses.replace(config, rescale={}), (0, 100), needs_scores=True)
    assert "outside the scale" not in caplog.text


def test_an_unlabelled_row_is_said_in_words_and_listed_by_its_key(source, tmp_path, caplog):
    made = rows(10)
    path = source(made)
    with open(path, "a") as file:
        file.write(json.dumps({"question": "q", "answer_1": "a", "answer_2": "b"}) + "\n")
    splits = read_splits(DataConfig(train=path), SCALE, needs_scores=False)
    assert "left out 1 without a label (neither scores nor a preference)" in caplog.text
    assert [row.reason for row in splits.dropped] == ["no_label"]


def unlabelled(made, is_bare):
    bare = {"score_1": None, "score_2": None, "preference": None}
    return [dataclasses.replace(r, **bare) if is_bare(i) else r for i, r in enumerate(made)]


def test_the_majority_as_gold_lets_in_rows_without_a_label_and_holds_none_out(source, caplog):
    # Two rows a question: of every third question both lack a label, of every other one of them.
    made = unlabelled(rows(120, 60), lambda i: i % 60 % 3 == 0 or i % 2 == 0)
    bare = {row.id for row in made if row.label is None}
    path = source(made)
    splits = read_splits(DataConfig(train=path, gold="majority"), SCALE, needs_scores=False)
    assert f"{len(bare)} of 120 rows have no label" in caplog.text and not splits.dropped
    train, heldout = ({row.id: row for row in side.mine} for side in splits[:2])
    assert len(heldout) == 24 and not heldout.keys() & bare
    asked = {row.question for row in heldout.values()}
    # What is not trained on asks a question that is held out.
    assert train.keys() == {row.id for row in made if row.question not in asked}
    assert len(train.keys() & bare) > 40
    assert all(
        train[name].label is None and train[name].gold(SCALE) == () for name in bare & {*train}
    )
    given = read_splits(DataConfig(train=path), SCALE, needs_scores=False)
    assert [row.reason for row in given.dropped] == ["no_label"] * len(bare)


def test_the_same_held_out_rows_are_chosen_whether_or_not_the_majority_is_gold(source):
    path = source(rows(90, 50))
    ids = [
        [[row.id for row in side.mine] for side in read_splits(config, SCALE, False)[:2]]
        for config in (DataConfig(train=path), DataConfig(train=path, gold="majority"))
    ]
    assert ids[0] == ids[1]


def test_held_out_rows_need_labels_though_the_majority_is_gold(source, tmp_path):
    write_comparisons(unlabelled(rows(9), lambda i: i % 3 == 0), tmp_path / "eval.jsonl")
    config = DataConfig(train=source(unlabelled(rows(20), lambda _: True)), gold="majority")
    with pytest.raises(
        UsageError, match=r"None of the 20 rows of .* Name labelled ones in data\.ev"
    ):
        read_splits(config, SCALE, needs_scores=False)
    config = dataclasses.replace(config, eval=str(tmp_path / "eval.jsonl"))
    splits = read_splits(config, SCALE, needs_scores=False)
    assert (len(splits.train), len(splits.heldout)) == (20, 6)
    assert [row.reason for row in splits.dropped] == ["no_label"] * 3
    one_score = {"question": "q", "answer_1": "a", "answer_2": "b", "score_1": 3}
    (tmp_path / "x.jsonl").write_text(json.dumps(one_score))
    with pytest.raises(UsageError, match="1 with a score for one answer only"):
        read_splits(config, SCALE, needs_scores=False)


def test_questions_that_differ_in_punctuation_are_on_one_side(source):
    texts = [
        f"{('say', 'Say:')[i % 2]} which is number {i // 2}{'?!' * (i % 2)}" for i in range(60)
    ]
    made = [dataclasses.replace(row, question=q) for row, q in zip(rows(60), texts, strict=True)]
    path = source(made)
    for folding, is_clean in (("words", True), ("text", False)):
        config = DataConfig(train=path, folding=folding, eval_rows=20)
        splits = read_splits(config, SCALE, needs_scores=False)
        train, heldout = ({fold(row.question) for row in side.mine} for side in splits[:2])
        assert train.isdisjoint(heldout) == is_clean


def test_training_on_a_benchmark_is_warned_of_and_holding_it_out_is_not(tmp_path, caplog):
    for folder in ("allenai/reward-bench", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        write_comparisons(rows(20), tmp_path / folder / "x.jsonl")
    theirs, mine = (str(tmp_path / each / "x.jsonl") for each in ("allenai/reward-bench", "mine"))
    read_splits(DataConfig(train=mine, eval=theirs), SCALE, needs_scores=False)
    assert "is a benchmark" not in caplog.text
    read_splits(DataConfig(train=theirs, eval=mine), SCALE, needs_scores=False)
    assert f"{theirs} is a benchmark (RewardBench)" in caplog.text


def test_rewards_of_a_reward_model_count_by_their_order_and_are_not_gold(source, caplog):
    made = [
        dataclasses.replace(row, score_1=3.0, score_2=i % 9 + 1.0) for i, row in enumerate(rows(9))
    ]
    made += [
        dataclasses.replace(row, score_1=-0.7, score_2=-3.25 if i % 2 else 4.0, id=f"r{i}")
        for i, row in enumerate(rows(20)[9:])
    ]
    config = DataConfig(train=source(made))
    splits = read_splits(config, SCALE, needs_scores=False)
    assert "11 of 20 rows with scores have one outside the scale of 1 to 10" in caplog.text
    assert (
        "theirs go from -3.25 to 9" in caplog.text and "count by their order alone" in caplog.text
    )
    known = {row.id: row for row in (*splits.train.mine, *splits.heldout.mine)}
    for row in made:
        assert known[row.id].label == row.label
        assert known[row.id].scores == (None if row.id.startswith("r") else row.scores)
    scored = read_splits(config, SCALE, needs_scores=True)
    assert [row.reason for row in scored.dropped] == ["no_scores"] * 11
    with pytest.raises(UsageError, match=r"no scores that reward\.mode=judgelrm can use"):
        read_splits(DataConfig(train=source(made[9:])), SCALE, needs_scores=True)


def test_labels_of_another_numbering_are_mapped_in_training_and_held_out_rows(tmp_path, caplog):
    texts = {"answer_1": "a", "answer_2": "b"}
    lines = [{"question": f"q{i}", **texts, "label": i % 3} for i in range(30)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(train=str(tmp_path / "x.jsonl"), columns={"preference": "label"})
    read_splits(config, SCALE, needs_scores=False)
    assert "data.values={0: 1, 1: 2, 2: 0}" in caplog.text
    caplog.clear()
    config = dataclasses.replace(config, values={"0": 1, "1": 2, "2": 0})
    splits = read_splits(config, SCALE, needs_scores=False)
    assert "data.values" not in caplog.text
    for row in (*splits.train.mine, *splits.heldout.mine):
        assert row.label == (1, 2, 0)[int(row.question[1:]) % 3]


def test_own_columns_come_along_from_a_file_and_from_what_was_prepared_of_it(tmp_path):
    texts = {"answer_1": "a", "answer_2": "b", "preference": 1}
    lines = [{"question": f"q{i}", **texts, "difficulty": i, "tags": [i]} for i in range(10)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_dataset({"train": readers.read(str(tmp_path / "x.jsonl")).rows}, tmp_path / "prepared")
    for name in ("x.jsonl", "prepared"):
        splits = read_splits(DataConfig(train=str(tmp_path / name)), SCALE, needs_scores=False)
        for part in (splits.train, splits.heldout.in_both_orders()):
            assert len(part.mine)
            for row in part.mine:
                number = int(row.question[1:])
                assert row.meta == {"difficulty": number, "tags": [number]}
