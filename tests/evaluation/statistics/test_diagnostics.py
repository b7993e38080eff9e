"""Intervals, comparisons and diagnostics against closed forms, brute force and counts by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from jlrm.evaluation.games import GameVerdict, Item, ItemVerdicts, Response
from jlrm.evaluation.statistics import diagnostics, intervals
from jlrm.reports import contracts
from jlrm.reports.results_file import Diagnostics


def item(name: str = "a", lengths: tuple[int, ...] = (4, 4), **fields) -> Item:
    return Item(name, "?", tuple("x" * length for length in lengths), **fields)


def game(
    preference: int | None, scores=None, order=(0, 1), status: str | None = None
) -> GameVerdict:
    return GameVerdict(
        *order, preference, scores, status or ("no_answer", "ok")[preference is not None]
    )


def scored(one: float, two: float, order=(0, 1)) -> GameVerdict:
    return game((0, 1, 2)[(one > two) + 2 * (one < two)], (one, two), order)


def swapped(one: int | None, two: int | None) -> tuple[GameVerdict, GameVerdict]:
    """Two games of an item, each with the answer it names as shown."""
    return game(one), game(two, order=(1, 0))


def summary(judged, responses=None, **options):
    """Return the diagnostics as `results.json` has them."""
    made = diagnostics.summary(judged, responses or {}, **options)
    written = json.loads(json.dumps(contracts.encode(made), allow_nan=False))
    assert contracts.decode(Diagnostics, written, "") == made  # read back alike
    return written


# Bootstrap


def share_right(judged) -> dict[str, float]:
    return {"right": 100 * sum(each.item.label == 1 for each in judged) / len(judged)}


def labelled(values) -> list[ItemVerdicts]:
    return [ItemVerdicts(item(str(i), label=int(v)), ()) for i, v in enumerate(values)]


def test_intervals_are_those_of_all_resamples_that_there_are():
    judged = labelled([1, 1, 2])
    every = [
        share_right([judged[i] for i in chosen])["right"]
        for chosen in itertools.product(range(3), repeat=3)
    ]
    found = intervals.bootstrap(judged, share_right, num=4000)["right"]
    exact = np.percentile(every, (2.5, 97.5), method="inverted_cdf")
    assert found == pytest.approx(tuple(exact)) == (0.0, 100.0)  # 1 of 27, and 8
    judged = labelled([1] * 6 + [2])
    shares = np.cumsum([math.comb(7, k) * 6**k / 7**7 for k in range(8)])
    exact = [100 * np.searchsorted(shares, share) / 7 for share in (0.025, 0.975)]
    assert intervals.bootstrap(judged, share_right, num=4000)["right"] == pytest.approx(exact)


def test_the_interval_of_a_share_is_the_binomial_one():
    low, high = intervals.bootstrap(labelled([1] * 120 + [2] * 80), share_right)["right"]
    half = 196 * math.sqrt(0.6 * 0.4 / 200)
    assert (low, high) == pytest.approx((60 - half, 60 + half), abs=0.8)


@pytest.mark.slow
def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(3)
    covered = 0
    for run in range(200):
        judged = labelled(np.where(rng.random(100) < 0.7, 1, 2))
        low, high = intervals.bootstrap(judged, share_right, num=200, seed=run)["right"]
        covered += low <= 70 <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_a_seed_gives_the_same_interval_and_another_seed_another():
    judged = labelled(np.random.default_rng(0).integers(1, 3, 50))
    first, again, other = (
        intervals.bootstrap(judged, share_right, num=50, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_resample_without_a_class_says_nothing_of_its_metrics():
    def score(judged) -> dict[str, float]:
        rare = [each for each in judged if each.item.subset == "rare"]
        absent = {"sometimes": 7.0} if rare else {}
        return {"of_rare": 40.0 if rare else math.nan, "never": math.nan, **absent}

    judged = [ItemVerdicts(item("rare", subset="rare"), ()), *labelled([1] * 5)]
    found = intervals.bootstrap(judged, score, num=100)
    assert found["of_rare"] == (40.0, 40.0) and found["sometimes"] == (7.0, 7.0)
    assert np.isnan(found["never"]).all() and len(found["never"]) == 2


def test_bootstrap_of_nothing_and_of_one_item():
    assert intervals.bootstrap([], share_right) == {}
    assert intervals.bootstrap(labelled([1]), share_right, num=5) == {"right": (100.0, 100.0)}


# Two judges


def credits(both: int, a_alone: int, b_alone: int, neither: int):
    counts = (both, a_alone, b_alone, neither)
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


@pytest.mark.parametrize(
    ("a_alone", "b_alone", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 2 / 64),
        (6, 0, 2 / 64),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (8, 1, 2 * (1 + 9) / 512),
        (1500, 1400, math.erfc(99 / math.sqrt(2900) / math.sqrt(2))),  # the normal approximation
    ],
)
def test_mcnemar_is_the_exact_binomial_test(a_alone, b_alone, p):
    found = intervals.paired(*credits(7, a_alone, b_alone, 3), num=10)
    assert found.mcnemar_p == pytest.approx(p, abs=1e-12 if a_alone < 1500 else 1e-4)
    points = 100 * (a_alone - b_alone) / (10 + a_alone + b_alone)
    assert found.difference == pytest.approx(points)


def test_mcnemar_is_left_out_where_credits_are_shared():
    assert intervals.paired([1, 0.5, 0], [1, 0, 0]).mcnemar_p is None
    assert intervals.paired([1, 0, 0], [1, 0.5, 0]).mcnemar_p is None


def test_the_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    a = rng.choice([0, 0.5, 1], 400, p=[0.2, 0.2, 0.6])
    b = rng.choice([0, 0.5, 1], 400, p=[0.3, 0.2, 0.5])
    found = intervals.paired(a, b)
    half = 196 * np.std(a - b) / 20
    assert found.interval == pytest.approx(
        (found.difference - half, found.difference + half), abs=0.4
    )
    z = found.difference / (100 * np.std(a - b) / 20)
    assert found.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)
    back = intervals.paired(b, a)
    assert back.difference == -found.difference and abs(back.p_value - found.p_value) < 0.01


def test_items_that_both_judges_have_right_do_not_widen_the_interval():
    few = intervals.paired(*credits(0, 30, 10, 0))
    many = intervals.paired(*credits(360, 30, 10, 0))
    assert np.ptp(few.interval) == pytest.approx(10 * np.ptp(many.interval), rel=0.2)


def test_paired_resamples_are_those_that_there_are():
    # Three items with differences 1, 0 and -1: 27 resamples, 10 above 0, 7 at 0, 10 below.
    found = intervals.paired([1, 1, 0], [0, 1, 1], num=20_000)
    assert found.p_value == 1.0 and found.difference == 0.0
    # 1, 1, -1: below 0 where -1 is drawn twice or three times: 7 of 27
    found = intervals.paired([1, 1, 0], [0, 0, 1], num=20_000)
    assert found.p_value == pytest.approx(2 * 7 / 27, abs=0.02)


def test_the_smallest_p_value_is_not_zero():
    assert intervals.paired([1] * 50, [0] * 50, num=99).p_value == pytest.approx(2 / 100)
    same = intervals.paired([1, 0, 1 / 3], [1, 0, 1 / 3])
    assert same == (0.0, (0.0, 0.0), 1.0, None)


def test_blocks_of_draws_make_no_difference_to_what_is_computed(monkeypatch):
    rng = np.random.default_rng(1)
    a, b = rng.random(300), rng.random(300)
    whole = intervals.paired(a, b, num=2000)
    monkeypatch.setattr(intervals, "BLOCK", 999)  # three rows at a time, the last block shorter
    parts = intervals.paired(a, b, num=2000)
    assert parts.interval == pytest.approx(whole.interval) and parts.p_value == whole.p_value


def test_paired_refuses_other_items_and_knows_nothing_of_none():
    with pytest.raises(ValueError, match="2 credits against 1"):
        intervals.paired([1, 0], [1])
    found = intervals.paired([], [])
    assert math.isnan(found.difference) and math.isnan(found.p_value) and found.mcnemar_p is None


# Diagnostics


def test_failures_ties_and_places_are_counted_over_what_they_are_shares_of():
    games = (game(1), game(1), game(2), game(0), game(None), game(None, status="no_think_end"))
    found = summary(
        [ItemVerdicts(item(str(i), label=1 + i % 2), (one,)) for i, one in enumerate(games)]
    )
    assert found["items"] == found["games"] == 6
    assert found["statuses"] == {"ok": 4, "no_answer": 1, "no_think_end": 1}
    assert found["parse_failures"] == {"percent": pytest.approx(100 / 3), "n": 6}
    assert found["ties"] == {"percent": 25.0, "n": 4}
    assert (found["first"]["percent"], found["first"]["n"]) == (50.0, 4)
    assert (found["second"]["percent"], found["second"]["n"]) == (25.0, 4)
    assert found["labels_first"] == {"percent": 50.0, "n": 6}
    assert found["consistency"] is None and found["lean_to_first"] is None
    low, high = found["first"]["interval"]
    assert low < 50 < high


def test_labels_first_follows_the_order_shown():
    both = ItemVerdicts(item(label=1), swapped(1, 1))
    assert summary([both])["labels_first"] == {"percent": 50.0, "n": 2}
    assert (
        summary([ItemVerdicts(item(label=1), (game(1, order=(1, 0)),))])["labels_first"]["percent"]
        == 0
    )


@pytest.mark.parametrize(
    ("one", "two", "is_consistent", "lean"),
    [
        (1, 2, True, 0),
        (2, 1, True, 0),
        (0, 0, True, 0),
        (1, 1, False, 1),
        (2, 2, False, -1),
        (1, 0, False, 1),
        (0, 1, False, 1),
        (2, 0, False, -1),
        (0, 2, False, -1),
        (None, 1, False, 0),
        (2, None, False, 0),
        (None, None, None, 0),  # nothing was said, so there is no share
    ],
)
def test_two_orders_of_one_pair(one, two, is_consistent, lean):
    for verdicts in (swapped(one, two), swapped(one, two)[::-1]):
        found = summary([ItemVerdicts(item(label=1), verdicts)])
        percent = None if is_consistent is None else 100 * is_consistent
        assert found["consistency"]["percent"] == percent
        assert found["consistency"]["n"] == 1
        expected = {
            "points": 100 * lean if lean else None,
            "n": abs(lean),
            "first": int(lean == 1),
            "second": int(lean == -1),
        }
        assert found["lean_to_first"] == expected


def test_consistency_and_lean_over_items():
    pairs = [(1, 2)] * 5 + [(1, 1)] * 3 + [(2, 2)] + [(None, 1)]
    judged = [ItemVerdicts(item(str(i), label=1), swapped(*pair)) for i, pair in enumerate(pairs)]
    judged.append(ItemVerdicts(item("one order"), (game(1),)))
    found = summary(judged)
    assert (found["consistency"]["percent"], found["consistency"]["n"]) == (50.0, 10)
    assert found["lean_to_first"] == {"points": 50.0, "n": 4, "first": 3, "second": 1}


def test_the_interval_of_consistency_is_binomial_over_items():
    pairs = [(1, 2)] * 160 + [(1, 1)] * 40
    judged = [ItemVerdicts(item(str(i), label=1), swapped(*pair)) for i, pair in enumerate(pairs)]
    found = summary(judged)["consistency"]
    half = 196 * math.sqrt(0.8 * 0.2 / 200)
    assert found["interval"] == pytest.approx([80 - half, 80 + half], abs=0.8)
    # ten pairs of an item that go together tell no more than one
    many = [
        ItemVerdicts(
            item(str(i), lengths=(3,) * 5),
            tuple(
                game(1 if a < b or i % 5 == 0 else 2, order=(a, b))
                for a, b in itertools.permutations(range(5), 2)
            ),
        )
        for i in range(200)
    ]
    wide = summary(many)["consistency"]
    assert (wide["percent"], wide["n"]) == (80.0, 2000)
    assert wide["interval"] == pytest.approx([80 - half, 80 + half], abs=0.8)


def test_a_consistent_judge_names_each_place_half_the_time_without_doubt():
    judged = [ItemVerdicts(item(str(i)), swapped(1, 2)) for i in range(20)]
    assert summary(judged)["first"] == {"percent": 50.0, "n": 40, "interval": [50.0, 50.0]}


def test_length_bias_by_hand():
    judged = [
        ItemVerdicts(item("a", (10, 90), label=2), swapped(2, 2)),  # longer, then shorter
        ItemVerdicts(item("b", (90, 10), label=2), swapped(1, 2)),  # longer twice
        ItemVerdicts(item("c", (50, 50), label=1), swapped(1, 1)),  # equal: no share
        ItemVerdicts(item("d", (9, 10), label=0), (game(0),)),
        ItemVerdicts(item("e", (9, 10), label=1), (game(None),)),  # a label, no verdict
        ItemVerdicts(item("f", (9, 10)), (game(2),)),  # a verdict, no label
    ]
    found = summary(judged)["length"]
    assert found["verdicts"] == {"percent": 80.0, "n": 5}
    assert found["labels"] == {"percent": pytest.approx(100 / 3), "n": 3}
    assert found["correlation"]["n"] == 6


def test_length_correlations_are_those_of_regression():
    rng = np.random.default_rng(0)
    ratio = rng.normal(size=600)
    label = np.where(0.5 * ratio + rng.normal(size=600) > 0, 1, 2)
    verdict = np.where(0.8 * ratio + 1.5 * (label == 1) - 0.7 + rng.normal(size=600) > 0, 1, 2)
    lengths = [(int(1000 * math.exp(r)), 1000) for r in ratio]
    judged = [
        ItemVerdicts(item(str(i), lengths[i], label=int(label[i])), (game(int(verdict[i])),))
        for i in range(600)
    ]
    found = summary(judged)["length"]["correlation"]
    x = np.log([(1 + one) / (1 + two) for one, two in lengths])
    y, z = (verdict == 1).astype(float), (label == 1).astype(float)
    assert found["verdicts"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["labels"] == pytest.approx(np.corrcoef(x, z)[0, 1])
    base = np.stack([np.ones(600), z], 1)
    residuals = [v - base @ np.linalg.lstsq(base, v, rcond=None)[0] for v in (x, y)]
    partial = np.corrcoef(residuals)[0, 1]
    assert found["verdicts_given_label"] == pytest.approx(partial) and partial > 0.3


def test_a_judge_that_is_always_right_has_no_taste_of_its_own():
    judged = [
        ItemVerdicts(item(str(i), (9, i), label=1 + (i > 9)), (game(1 + (i > 9)),))
        for i in range(20)
    ]
    found = summary(judged)["length"]["correlation"]
    assert found["verdicts"] == found["labels"] != 0 and found["verdicts_given_label"] is None


def test_calibration_by_hand():
    # margins over a span of 10: 0.5, 0.5, 1 (an edge), 7, 10 and a tie
    scores = [(5, 4.5), (4.5, 5), (6, 5), (1, 8), (10, 0), (3, 3)]
    labels = [1, 1, 1, 2, 2, 1]
    judged = [
        ItemVerdicts(item(str(i), label=label), (scored(*pair),))
        for i, (pair, label) in enumerate(zip(scores, labels, strict=True))
    ]
    judged += [
        ItemVerdicts(item("tied", label=0), (scored(9, 1),)),
        ItemVerdicts(item("none"), (scored(9, 1),)),
        ItemVerdicts(item("decided", label=1), (game(1),)),
    ]
    found = summary(judged)["calibration"]
    assert (found["span"], found["n"], found["ties"]) == (10.0, 5, 1)
    filled = {b["from"]: (b["n"], b["confidence"], b["accuracy"]) for b in found["bins"] if b["n"]}
    assert filled == {
        50: (2, pytest.approx(52.5), 50.0),
        55: (1, pytest.approx(55.0), 100.0),
        85: (1, pytest.approx(85.0), 100.0),
        95: (1, pytest.approx(100.0), 0.0),
    }
    assert [b["to"] - b["from"] for b in found["bins"]] == [5] * 10 and found["bins"][9][
        "to"
    ] == 100
    assert found["ece"] == pytest.approx((2 * 2.5 + 45 + 15 + 100) / 5)
    squares = 0.475**2 + 0.525**2 + 0.45**2 + 0.15**2 + 1
    assert found["brier"] == pytest.approx(squares / 5)
    assert found["accuracy"] == 60.0
    assert found["confidence"] == pytest.approx((52.5 + 52.5 + 55 + 85 + 100) / 5)


@pytest.mark.parametrize("steps", range(10))
def test_edges_belong_to_the_bin_above(steps):
    judged = [ItemVerdicts(item(label=1), (scored(1 + 0.9 * steps + (steps == 0) * 0.1, 1),))]
    bins = summary(judged, span=9)["calibration"]["bins"]
    assert [b["n"] for b in bins].index(1) == steps


def test_a_given_span_sets_the_confidence_and_caps_it():
    judged = [
        ItemVerdicts(item("a", label=1), (scored(8, 5),)),
        ItemVerdicts(item("b", label=1), (scored(9, 1),)),
    ]
    assert summary(judged, span=6)["calibration"]["confidence"] == pytest.approx((75 + 100) / 2)
    assert summary(judged)["calibration"]["span"] == 8
    for span in (0, -1, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            diagnostics.summary(judged, {}, span=span)


def test_swapped_games_are_right_in_the_order_shown():
    judged = [ItemVerdicts(item(label=1), (scored(9, 1), scored(1, 9, order=(1, 0))))]
    assert summary(judged)["calibration"]["accuracy"] == 100.0
    judged = [ItemVerdicts(item(label=1), (scored(1, 9), scored(9, 1, order=(1, 0))))]
    assert summary(judged)["calibration"]["accuracy"] == 0.0


def test_items_with_more_answers_are_labelled_by_what_is_correct():
    many = item(lengths=(1, 2, 3), num_correct=1)
    verdicts = (scored(9, 1), scored(9, 1, (1, 0)), scored(9, 1, (1, 2)))
    found = summary([ItemVerdicts(many, verdicts)])
    assert found["calibration"]["n"] == 2 and found["calibration"]["accuracy"] == 50.0
    assert found["labels_first"] == {"percent": 50.0, "n": 2}
    assert found["length"]["labels"] == {"percent": 0.0, "n": 1} and found["confusion"] is None


def test_confusion_by_hand():
    judged = [
        ItemVerdicts(item("a", label=1), swapped(1, 2)),
        ItemVerdicts(item("b", label=2), swapped(0, None)),
        ItemVerdicts(item("c", label=0), (game(2),)),
        ItemVerdicts(item("d"), (game(1),)),
    ]
    found = summary(judged)["confusion"]
    assert found == {
        "labels": [0, 1, 2],
        "verdicts": [0, 1, 2, None],
        "counts": [[0, 0, 1, 0], [0, 2, 0, 0], [1, 0, 0, 1]],
        "n": 5,
    }


def test_cost_by_hand():
    judged = [ItemVerdicts(item(), swapped(1, 2)), ItemVerdicts(item("b"), (game(1),))]
    judged.append(ItemVerdicts(item("c"), (game(1),)))
    responses = {
        "a:0-1": Response("a:0-1", texts=("",), prompt_tokens=10, num_tokens=100, seconds=2.0),
        "a:1-0": Response("a:1-0", texts=("",), prompt_tokens=30, num_tokens=50),
        "b:0-1": Response("b:0-1", texts=("",), num_tokens=60, seconds=3.0),
        "c:0-1": Response("c:0-1", texts=("",), seconds=4.0),
        "b:1-0": Response("b:1-0", texts=("",), num_tokens=9999, seconds=99.0),  # was not judged
    }
    assert summary(judged, responses)["cost"] == {
        "num_tokens": {"total": 210, "mean": 70.0, "n": 3},
        "prompt_tokens": {"total": 40, "mean": 20.0, "n": 2},
        "seconds": {"total": 9.0, "mean": 3.0, "n": 3},
        "tokens_per_second": 32.0,
    }
    assert summary(judged, {"a:0-1": Response("a:0-1", preference=1)})["cost"] is None


@pytest.mark.parametrize(
    "judged",
    [
        [],
        [ItemVerdicts(item(), ())],
        [ItemVerdicts(item(label=1), (game(None),))],
        [ItemVerdicts(item(str(i), label=1), swapped(None, None)) for i in range(3)],
    ],
    ids=["empty", "no games", "one unparsed", "all unparsed"],
)
def test_without_verdicts_no_share_is_made_up(judged):
    found = summary(judged)
    assert found["first"] == found["second"] == {"percent": None, "n": 0, "interval": None}
    assert found["ties"] == {"percent": None, "n": 0}
    assert found["length"] is None and found["calibration"] is None
    num_games = sum(len(each.verdicts) for each in judged)
    assert found["parse_failures"] == {"percent": 100.0 if num_games else None, "n": num_games}


def test_one_item_alone():
    found = summary([ItemVerdicts(item(lengths=(3, 5), label=2), (scored(2, 7),))])
    assert found["length"]["verdicts"] == {"percent": 100.0, "n": 1}
    assert found["length"]["correlation"]["verdicts"] is None
    assert found["calibration"]["confidence"] == 100.0  # the only margin seen is the widest
    assert found["confusion"]["counts"][2] == [0, 0, 1, 0]


def test_scores_that_are_all_equal_state_no_confidence():
    assert summary([ItemVerdicts(item(label=1), (scored(5, 5),))])["calibration"] is None


# Bounds


def test_a_span_below_one_is_a_span_and_zero_is_none():
    judged = [ItemVerdicts(item(label=1), (scored(0.75, 0.5),))]
    assert summary(judged, span=0.5)["calibration"]["confidence"] == pytest.approx(75.0)
    for span in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            diagnostics.summary(judged, {}, span=span)


def test_scores_without_a_preference_to_check_are_not_calibrated():
    """A tie names no answer, and a margin without a label is neither right nor wrong."""
    judged = [
        ItemVerdicts(item("a", label=1), (scored(5, 5),)),
        ItemVerdicts(item("b"), (scored(7, 3),)),
    ]
    assert summary(judged)["calibration"] is None


def test_two_games_correlate_and_one_does_not():
    """Lengths 8:2 and 2:8, and the longer is named: as correlated as can be."""
    judged = [
        ItemVerdicts(item("a", (8, 2)), (game(1),)),
        ItemVerdicts(item("b", (2, 8)), (game(2),)),
    ]
    assert diagnostics._correlation(np.array([1.0, 2.0]), np.array([5.0, 3.0])) == pytest.approx(-1)
    assert diagnostics._correlation(np.array([1.0]), np.array([5.0])) is None
    assert summary(judged)["length"] is not None


def test_a_response_of_no_tokens_has_a_speed_of_none_a_second():
    judged = [ItemVerdicts(item(), (game(None),))]
    responses = {"a:0-1": Response("a:0-1", num_tokens=0, seconds=2.0)}
    assert summary(judged, responses)["cost"]["tokens_per_second"] == 0.0
