"""What files write for labels and scores means what people mean by it, or is refused."""

from __future__ import annotations

import collections
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.config import UsageError
from jlrm.judgement import labels
from jlrm.judgement.labels import Unusable


def preference(label: object, **values: int) -> int | None:
    return labels.preference(label, labels.meanings(values), "here")


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        *((1, 1), (2.0, 2), ("0", 0), ("1.0", 1), (" 2 ", 2), ("２", 2)),
        *((1.0000002038, 1), (0.99999994, 1), (1.9876, 2), (1.5, 0), ("1.5", 0), (1.45, 0)),
        *(("A", 1), ("[[B]]", 2), ("Model A", 1), ("model_b", 2), ("Response 2", 2), ("left", 1)),
        *(("A>B", 1), ("A>>B", 1), ("B>A", 2), ("A<B", 2), ("b<<a", 1), ("A=B", 0), ("A==B", 0)),
        *(
            ("tie", 0),
            ("Tie (bothbad)", 0),
            ("both_bad", 0),
            ("draw", 0),
            ("tie (inconsistent)", 0),
        ),
        *(("the first answer", 1), ("Answer B is slightly better", 2), ("a_wins", 1), ("1>2", 1)),
        *(("completion_b", 2), ("2nd", 2), ("[[C]]", 0), ("neither", 0), ("Both are good", 0)),
        *((None, None), (math.nan, None), ("nan", None), ("", None), ("N/A", None)),
    ],
)
def test_a_label_that_means_one_thing_everywhere_is_read(label, meant):
    assert preference(label) == meant


@pytest.mark.parametrize("label", [1.25, 1.7, "1.3", 1.11])
def test_a_graded_label_between_two_classes_is_left_out(label):
    with pytest.raises(Unusable, match="unclear_preference"):
        preference(label)


@pytest.mark.parametrize(
    "label", [3, -1, 0.4, 0.8, 2.5, math.inf, "gpt", "model_c", "x>y", "C", [1], {}]
)
def test_a_label_that_could_mean_anything_stops_and_says_how_to_go_on(label):
    with pytest.raises(UsageError, match=r"here: the preference must be .* got ") as error:
        preference(label)
    assert ("data.values={" in str(error.value)) == isinstance(label, (int, float, str))


def test_booleans_are_read_once_it_is_said_what_they_mean():
    with pytest.raises(UsageError, match=r"data\.values=\{true: 1, false: 2\}"):
        preference(True)
    with pytest.raises(UsageError, match=r"data\.values=\{true: 1, false: 2\}"):
        preference("FALSE")
    for true, false in ((True, False), ("TRUE", "False"), ("yes", "no")):
        assert preference(true, true=1, false=2) == 1
        assert preference(false, yes=1, no=2) == 2


def test_labels_of_another_numbering_are_read_by_their_meanings():
    known = labels.meanings({0: 1, "1": "2", 2.0: 0, "GPT": 1, -3: 2})
    assert known == {"0": 1, "1": 2, "2": 0, "gpt": 1, "-3": 2}
    given_labels = (0, 1.0, "2", 0.0, 1.99999, "gpt ", "tie", "model_b", -3)
    read = [labels.preference(label, known, "here") for label in given_labels]
    assert read == [1, 2, 0, 1, 0, 1, 0, 2, 2]
    with pytest.raises(UsageError, match=r"label 3 is not among those of data\.values=\{0: 1"):
        labels.preference(3, known, "here")
    with pytest.raises(Unusable, match="unclear"):
        labels.preference(0.5, known, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [({0: 3}, "can't mean 3"), ({"a": "first"}, "can't mean 'first'"), ({0: None}, "can't mean")],
)
def test_a_label_means_one_of_three(values, message):
    with pytest.raises(UsageError, match=message):
        labels.meanings(values)
    with pytest.raises(UsageError, match="'1' stands twice"):
        labels.meanings({"1": 1, "1.0": 2})


# ---------------------------------------------------------------------------------------- numbering


@pytest.mark.parametrize(
    ("counts", "column", "advice"),
    [
        ({"0": 12, "1": 13}, "preference", "data.values={0: 1, 1: 2};"),
        ({"0": 12, "1": 13}, "winner", "data.values={0: 1, 1: 2};"),
        ({"0": 12, "1": 13}, "winner", "{1: 1, 0: 2}"),
        ({"0": 2, "1": 1}, "preference", "data.values={0: 1, 1: 2};"),
        ({"0": 2, "1": 2, "2": 1}, "preference", "data.values={0: 1, 1: 2, 2: 0};"),
        ({"0": 40, "1": 35, "2": 60}, "preference", "data.values={0: 1, 1: 2, 2: 0};"),
        ({"0": 10, "1": 35, "2": 60}, "label", "data.values={0: 1, 1: 2, 2: 0};"),
        ({"0": 5, "2": 5}, "preference", "data.values={0: 1, 1: 2, 2: 0};"),
        ({"0": 5}, "preference", "data.values={0: 1, 1: 2};"),
        ({"1": 30}, "preference", "data.orders=both"),
    ],
)
def test_counts_that_look_like_another_numbering_are_named_with_what_helps(counts, column, advice):
    said = labels.doubts(counts, column)
    assert advice in said and f"'{column}'" in said
    assert all(f"{name} ({count}" in said for name, count in counts.items())
    assert "data.values={" + ", ".join(f"{name}: {name}" for name in counts) + "}" in said


@pytest.mark.parametrize(
    "counts",
    [
        *({"1": 5, "2": 5}, {"1": 1, "2": 40}, {"0": 3, "1": 40, "2": 35}, {"1": 3}, {}),
        {"0": 158, "1": 266, "2": 930},
        {"0": 969, "1": 3237, "2": 3724},
        {"1": 30, "1.5": 2},
    ],
)
def test_counts_that_look_like_ours_are_not_nagged_about(counts):
    assert labels.doubts(counts, "preference") == ""


def test_only_numbers_are_counted():
    counted = [
        labels.numbering(x) for x in (0, 1.0, "2", 1.0000002, 1.5, "A", "tie", True, None, 7)
    ]
    assert counted == ["0", "1", "2", "1", "1.5", "", "", "", "", ""]
    assert labels.doubts(collections.Counter(counted), "preference") == ""


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("pair", "wanted"),
    [
        *((["8", "5.0"], (8, 5)), ([8, "2.5"], (8, 2.5)), (["**8**", " 7 "], (8, 7))),
        *((["8/10", "3 / 10"], (8, 3)), (["7,5", "8"], (7.5, 8)), (["８", "7．5"], (8, 7.5))),
        *(("8 2.5", (8, 2.5)), ("[8, 2.5]", (8, 2.5)), ("[8.  2.5]", (8, 2.5))),
        *(([-0.7, "-3.25"], (-0.7, -3.25)), ([1e-3, "1e-3"], (0.001, 0.001))),
        *(([None, 4], (None, 4)), ([math.nan, 4], (None, 4)), (["", "NaN"], (None, None))),
    ],
)
def test_scores_are_read_where_they_are_clear(pair, wanted):
    assert labels.scores(pair, "here") == wanted


@pytest.mark.parametrize(
    "pair",
    [
        *(
            ["1,234", "8"],
            ["8/10", "4/5"],
            ["8/10", 8],
            ["8", "seven"],
            ["7-8", "9"],
            ["8/0", "1/0"],
        ),
        *([True, 1], [1], [1, 2, 3], "8", 8, {}, ["80%", "7"], [[8], 7], ["8²", "1"], ["1_0", "1"]),
    ],
)
def test_scores_that_are_not_clear_stop(pair):
    with pytest.raises(UsageError, match="here: the scores must be two numbers"):
        labels.scores(pair, "here")


@pytest.mark.parametrize("pair", [[math.inf, 1], [10**400, 1], ["1e999", 1]])
def test_scores_are_finite(pair):
    with pytest.raises(UsageError, match="must be finite"):
        labels.scores(pair, "here")


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-9, 9))
def test_a_number_and_its_text_are_one_score(one, two):
    assert labels.scores([repr(one), str(two)], "here") == (one, two)


# ------------------------------------------------------------------------------ columns of winners

CLASSES = ("winner_model_a", "winner_model_b", "winner_tie")


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        (dict(zip(CLASSES, (1, 0, 0), strict=True)), "answer_1"),
        (dict(zip(CLASSES, ("0", "1.0", "0"), strict=True)), "answer_2"),
        (dict(zip(CLASSES, (False, None, True), strict=True)), "tie"),
        (dict(zip(CLASSES, (0, 0, 0), strict=True)), None),
        ({"winner": "GPT", "model_a": "other", "model_b": "gpt"}, "answer_2"),
        ({"preference": "g1", "generator_1": "g1", "generator_2": "g2"}, "answer_1"),
        ({"winner": "B", "score_1": 9, "score_2": math.nan}, "B"),
        ({"winner": "B", "score": [9, 1]}, "B"),
        ({"winner": "B", "preference": math.nan}, "B"),
    ],
)
def test_columns_tell_a_winner(row, meant):
    assert labels.labelled(row, "here")["preference"] == meant


@pytest.mark.parametrize(
    "row",
    [
        {"winner": 0, "score_1": 1, "score_2": 2},  # a number of an unknown numbering
        {"winner_model_a": 1, "winner_id": 2},
        {"chosen": "x", "rejected": "y", "winner": "model_b"},
    ],
)
def test_what_does_not_tell_a_winner_stays(row):
    assert labels.labelled(row, "here") == row


def test_columns_that_tell_no_one_winner_are_said():
    assert labels.labelled({"winner": "g", "model_a": "g", "model_b": "g"}, "")["preference"] == "g"
    with pytest.raises(Unusable, match="several_winners"):
        labels.labelled(dict.fromkeys(CLASSES, 1), "here")
    with pytest.raises(UsageError, match=r"here: 'winner_model_a' must be 0 or 1, got 0\.3"):
        labels.labelled(dict.fromkeys(CLASSES, 0.3), "here")


def test_a_winner_that_is_named_goes_before_columns_of_classes():
    row = {"winner": "model_a", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    assert labels.labelled(row, "row 1")["preference"] == "model_a"
    assert labels.labelled(row | {"winner": None}, "row 1")["preference"] == "answer_2"


def test_ties_that_are_as_many_as_a_side_are_doubtful_and_fewer_are_not():
    assert labels.doubts({"0": 5, "1": 5, "2": 9}, "preference")
    assert not labels.doubts({"0": 4, "1": 5, "2": 9}, "preference")
