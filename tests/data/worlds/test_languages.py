"""The world of languages: the language alone tells answers apart, and splits share no part."""

from __future__ import annotations

import collections
import itertools

import pytest

from jlrm.config import DataConfig, UsageError
from jlrm.data import readers
from jlrm.data.comparisons import count_words
from jlrm.data.splits import _by_chance, read_splits
from jlrm.data.worlds import languages
from jlrm.judgement.verdict import preferred

SPLITS = {name: list(languages.rows(name)) for name in languages.NUM_ROWS}


def test_every_language_says_the_same_things():
    counts = {
        name: [len(part.split(";")) for part in parts] for name, parts in languages.PARTS.items()
    }
    assert set(map(tuple, counts.values())) == {(24, 24, 14)}
    for parts in languages.PARTS.values():
        for part in parts:
            assert len(set(part.split(";"))) == len(part.split(";"))


@pytest.mark.parametrize("split", SPLITS)
def test_gold_is_the_language_and_nothing_else(split):
    rows = SPLITS[split]
    assert len(rows) == languages.NUM_ROWS[split]
    assert len({row["question"] for row in rows}) == len(rows)  # no row twice
    for row in rows:
        asked = row["question"].removeprefix("Say in ").split(":")[0]
        better = preferred(row["score_1"], row["score_2"])
        assert row["languages"][better - 1] == asked != row["languages"][2 - better]
    firsts = sum(preferred(row["score_1"], row["score_2"]) == 1 for row in rows)
    assert abs(firsts / len(rows) - 0.5) < 0.1  # of 144: two standard errors


def test_length_tells_next_to_nothing():
    def longer(row) -> int:
        return preferred(len(row["answer_1"]), len(row["answer_2"]))

    rows = [row for row in SPLITS["train"] + SPLITS["heldout"] if longer(row)]
    right = sum(longer(row) == preferred(row["score_1"], row["score_2"]) for row in rows)
    assert abs(right / len(rows) - 0.5) < 0.06  # English is short, and never right
    assert max(count_words(row["answer_1"]) for row in rows) < 20


def test_splits_share_no_part_of_a_sentence_and_the_unseen_language_is_unseen():
    for parts, (train, held_out) in zip(
        languages.PARTS[languages.SOURCE],
        zip(languages._parts("train"), languages._parts("heldout"), strict=True),
        strict=True,
    ):
        assert not set(train) & set(held_out)
        assert len(train) + len(held_out) == len(parts.split(";"))
    sentences = {
        name: {row["question"].split(": ")[1] for row in rows} for name, rows in SPLITS.items()
    }
    assert not sentences["train"] & (sentences["heldout"] | sentences["unseen"])
    seen = itertools.chain.from_iterable(row["languages"] for row in SPLITS["train"])
    assert set(seen) == set(languages.PARTS) - {languages.UNSEEN}
    assert all(languages.UNSEEN in row["languages"] for row in SPLITS["unseen"])


def test_written_judgements_are_those_of_a_careless_annotator():
    outcomes = collections.Counter()
    for row in SPLITS["train"]:
        gold = (row["score_1"], row["score_2"])
        is_right = tuple(row["judged"]) == gold
        outcomes[is_right] += 1
        named = [part.split(": ")[1] for part in row["reasoning"].split("? ")[1].split(", ")]
        assert (named == list(row["languages"])) == is_right  # scores follow from the reasoning
    assert abs(outcomes[False] / outcomes.total() - languages.CARELESS) < 0.03
    assert not any("judged" in row for row in SPLITS["heldout"] + SPLITS["unseen"])


def test_it_is_read_as_any_source_is():
    rows = readers.read("languages#unseen").rows
    assert [row.id for row in rows] == [row["id"] for row in SPLITS["unseen"]]
    assert rows[0].scores == (9.0, 2.0) or rows[0].scores == (2.0, 9.0)
    train = readers.read("languages").rows
    assert train[0].judgement and train[0].id == "languages-train-0"
    with pytest.raises(UsageError, match=r"languages has no split 'unsen'. Did you mean 'unseen'"):
        readers.read("languages#unsen")


@pytest.mark.slow
def test_a_control_turns_gold_round_by_chance_and_leaves_all_else(caplog):
    config = {"train": "languages", "eval": "languages#heldout"}
    given = read_splits(DataConfig(**config), (1, 10), needs_scores=False)
    control = read_splits(DataConfig(**config, gold="shuffled"), (1, 10), needs_scores=False)
    assert "a control" in caplog.text
    assert control.heldout.mine == given.heldout.mine
    turned = 0
    for row, other in zip(given.train.mine, control.train.mine, strict=True):
        turned += row.scores != other.scores
        assert (row.answer_1, row.question, row.judgement) == (
            *(other.answer_1, other.question, other.judgement),
        )
        assert row.scores and other.scores in (row.scores, row.scores[::-1])
    assert abs(turned / len(given.train) - 0.5) < 0.03
    swapped = [row.swapped() for row in given.train.mine]  # both orders of a pair agree
    assert [_by_chance(row).label for row in swapped] == [
        row.swapped().label for row in control.train.mine
    ]
