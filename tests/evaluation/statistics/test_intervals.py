"""Clusters are drawn whole, what is nearly certain has the exact interval, and a null is a null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import special

from jlrm.evaluation.benchmarks.registry import BENCHMARKS
from jlrm.evaluation.games import Item, ItemVerdicts
from jlrm.evaluation.reading import reader
from jlrm.evaluation.statistics import intervals, results
from jlrm.evaluation.statistics.clusters import cluster_items, design_effect
from jlrm.judges.recorded import Recorded


def items(*questions: str, ids=None) -> list[Item]:
    names = ids or [str(number) for number in range(len(questions))]
    return [Item(*each, ("x", "y"), 1) for each in zip(names, questions, strict=True)]


# Clusters


def test_items_of_one_folded_question_are_one_cluster():
    found = cluster_items(items("Why?", "How so", "why", "“How so?”", "Why not", "WHY!"))
    assert found.tolist() == [0, 1, 0, 1, 2, 0]


def test_items_without_a_question_share_none():
    assert cluster_items(items("", " ", "")).tolist() == [0, 1, 2]
    assert cluster_items([]).tolist() == []


def test_a_group_joins_and_what_is_joined_through_others_is_together():
    made = items("a", "b", "c", "b", "d", ids=["g1", "g1", "g2", "g3", "none"])
    names = cluster_items(made, lambda item: item.id if item.id != "none" else None)
    assert names.tolist() == [0, 0, 1, 0, 2]  # g1 and g3 both ask b


def test_the_benchmarks_with_groups_of_their_own():
    ppe, ties = BENCHMARKS["ppe_correctness"].group, BENCHMARKS["rewardbench2"].group
    assert ppe and ties
    pairs = items("a", "a ", "x", ids=["MATH:7:0-3", "MATH:7:4-1", "GPQA:7:0-3"])
    assert cluster_items(pairs, ppe).tolist() == [0, 0, 1]
    rows = [
        Item(name, f"question of {name}", ("x", "y"), subset=subset)
        for name, subset in (
            *(("ref:3", "Ties"), ("tied:3", "Ties"), ("tied:4", "Ties"), ("tied:3#2", "Ties")),
            *(("3", "Math"), ("x:3", "Math")),
        )
    ]
    assert cluster_items(rows, ties).tolist() == [0, 0, 1, 0, 2, 3]


def test_pandalm_asks_170_questions(reference):
    asked = BENCHMARKS["pandalm"].read(str(reference / "pandalm" / "testset-v1.json"))
    assert len(set(cluster_items(asked).tolist())) == 170


# Design effect


def test_the_design_effect_of_whole_copies_is_their_number_and_of_opposites_nought():
    values = np.array([1.0, 0, 0, 1, 1, 0])
    assert design_effect(values, np.arange(6)) == pytest.approx(1.0)
    assert design_effect(np.repeat(values, 5), np.repeat(np.arange(6), 5)) == pytest.approx(5.0)
    assert design_effect(np.tile([0.0, 1.0], 9), np.repeat(np.arange(9), 2)) == 0.0


def test_without_differences_or_a_second_cluster_there_is_no_design_effect():
    assert design_effect(np.ones(4), np.array([0, 0, 1, 1])) is None
    assert design_effect(np.array([0.0, 1.0]), np.array([0, 0])) is None
    assert design_effect(np.array([]), np.array([], int)) is None


# Resampling


def test_a_resample_holds_whole_clusters():
    clusters = np.array([0, 1, 0, 2, 1, 0])
    judged = [ItemVerdicts(item, ()) for item in items(*"abcdef")]

    def counts(sample) -> dict[str, float]:
        return {str(i): sum(e.item.id == str(i) for e in sample) for i in range(6)}

    draws = intervals.resampled(judged, counts, clusters=clusters, num=200)
    assert (draws["0"] == draws["2"]).all() and (draws["0"] == draws["5"]).all()
    assert (draws["1"] == draws["4"]).all() and (draws["0"] + draws["1"] + draws["3"] == 3).all()
    assert np.ptp(draws["3"]) >= 2


def test_sums_of_clusters_are_resampled_like_their_items():
    """Every resample that there is, by hand: three clusters of one, two and three items."""
    values, clusters = np.array([1.0, 0, 1, 0, 0, 1]), np.array([0, 1, 1, 2, 2, 2])
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters).astype(float)
    every = [
        sums[list(chosen)].sum() / sizes[list(chosen)].sum()
        for chosen in itertools.product(range(3), repeat=3)
    ]
    parts = np.concatenate(list(intervals._drawn(sums, sizes, 40_000)))
    found, often = np.unique(np.round(parts[:, 0] / parts[:, 1], 9), return_counts=True)
    wanted, frequency = np.unique(np.round(every, 9), return_counts=True)
    assert found.tolist() == wanted.tolist()
    assert often / 40_000 == pytest.approx(frequency / 27, abs=0.01)


def test_a_paired_interval_is_wider_by_the_root_of_the_design_effect():
    rng = np.random.default_rng(0)
    a, b = (rng.random(300) < share for share in (0.6, 0.5))
    alone = intervals.paired(a.astype(float), b.astype(float))
    copies = [np.repeat(each, 4).astype(float) for each in (a, b)]
    clusters = np.repeat(np.arange(300), 4)
    found = intervals.paired(*copies, clusters=clusters)
    assert found.interval == pytest.approx(alone.interval, abs=0.4)
    assert found.p_value == pytest.approx(alone.p_value, abs=0.01)
    assert np.ptp(intervals.paired(*copies).interval) == pytest.approx(
        np.ptp(found.interval) / 2, rel=0.06
    )


def test_mcnemar_needs_items_of_their_own():
    one, two = [1, 1, 0, 1, 0], [0, 1, 0, 0, 1]
    assert intervals.paired(one, two, clusters=np.arange(5)).mcnemar_p == 1.0
    assert intervals.paired(one, two, clusters=np.array([0, 1, 2, 3, 3])).mcnemar_p is None


# Exact intervals


@pytest.mark.parametrize(("right", "n"), [(1, 12), (11, 12), (6, 12), (1, 2), (29, 30), (3, 500)])
def test_the_exact_interval_is_where_a_tail_of_the_binomial_is_25_in_a_thousand(right, n):
    low, high = (end / 100 for end in intervals.clopper_pearson(right / n, n))

    def tail(p: float, counts) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in counts)

    assert tail(low, range(right, n + 1)) == pytest.approx(0.025)
    assert tail(high, range(right + 1)) == pytest.approx(0.025)


def test_nothing_and_everything_have_the_exact_interval_of_their_clusters():
    ones = np.ones(12)
    assert intervals.of_share(0 * ones, ones) == (0.0, pytest.approx(26.46, abs=0.01))
    assert intervals.of_share(ones, ones) == (pytest.approx(73.54, abs=0.01), 100.0)
    # sixty items of twelve questions tell no more than twelve: a sixth of a kind may go with five
    assert intervals.of_share(5 * ones, 5 * ones, 60) == intervals.of_share(ones, ones)
    assert np.isnan(intervals.of_share(np.zeros(3), np.zeros(3))).all()


def test_few_items_have_the_exact_interval_and_of_copies_no_narrower_one():
    values = np.repeat([1.0, 0.0], [9, 3])
    exact = intervals.clopper_pearson(9 / 12, 12)
    assert intervals.of_share(values, np.ones(12), 12) == pytest.approx(exact)
    copied = intervals.of_share(5 * values, np.full(12, 5.0), 60)
    assert copied[0] < exact[0] and copied[1] > exact[1]  # degrees of freedom are the clusters'


def test_half_credits_are_no_surer_than_as_many_items():
    """A judge that follows the place has half of each pair right, whatever the number of pairs."""
    found = intervals.of_share(np.full(6, 0.5), np.ones(6), 6)
    assert found == pytest.approx(intervals.clopper_pearson(0.5, 6))


def test_one_cluster_says_next_to_nothing():
    low, high = intervals.of_share(np.array([70.0]), np.array([100.0]), 100)
    assert low < 5 and high > 98


def test_a_rare_fault_among_many_has_the_exact_interval_too():
    values = np.ones(200)
    values[0] = 0.0
    found = intervals.of_share(values, np.ones(200), 200)
    assert found == pytest.approx(intervals.clopper_pearson(199 / 200, 200))
    assert found[1] < 100.0  # where the bootstrap would say 98.5 to 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_clusters", "size", "share", "correlation"),
    [(12, 1, 0.95, 0.0), (20, 6, 0.8, 0.2), (29, 1, 0.8, 0.0), (60, 6, 0.8, 0.2)],
)
def test_intervals_of_shares_cover_the_truth(num_clusters, size, share, correlation):
    """The percentile interval of 12 items covers 95 % in 47 of 100 cases."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        rates = np.full(num_clusters, share)
        if correlation:
            spread = (1 - correlation) / correlation
            rates = rng.beta(share * spread, (1 - share) * spread, num_clusters)
        sizes = rng.integers(1, 2 * size, num_clusters) if size > 1 else np.ones(num_clusters, int)
        right = rng.binomial(sizes, rates).astype(float)
        low, high = intervals.of_share(right, sizes.astype(float), float(sizes.sum()))
        covered += low <= 100 * share <= high
    assert covered / 300 >= 0.9


def test_a_percentage_that_is_no_mean_is_exact_at_the_edge_and_for_few():
    certain = np.full(100, 100.0)
    assert intervals.of_metric(100.0, certain, 40, 40) == (
        pytest.approx(100 * 0.025 ** (1 / 40)),
        100.0,
    )
    draws = np.random.default_rng(0).normal(60, 5, 1000)
    assert intervals.of_metric(60.0, draws, 400, 40) == intervals.percentiles(draws)
    low, high = intervals.of_metric(60.0, draws, 80, 20)
    assert low < np.percentile(draws, 2.5) and high > np.percentile(draws, 97.5)
    assert intervals.of_metric(-3.0, draws - 63, 80, 20) == intervals.percentiles(draws - 63)


# A null


@pytest.fixture(scope="module")
def pandalm(reference):
    """Credits of two recorded judges, and the clusters of their items."""
    folder, bench = reference / "pandalm", BENCHMARKS["pandalm"]
    asked = bench.read(str(folder / "testset-v1.json"))
    credits = []
    for name in ("results_judgelrm3b.json", "gpt-3.5-turbo-testset-v1.json"):
        said = Recorded(str(folder / name), asked)
        games = said.as_played(bench.games(asked, bench.policy, 0))
        read = reader("judgelrm")
        made = results.Evaluation(bench, bench.policy, games, said.responses, read)
        credits.append([bench.credit(each, bench.policy).value for each in made.judged()[0]])
    return *map(np.array, credits), cluster_items(asked)


@pytest.mark.slow
def test_two_equal_judges_are_told_apart_as_often_as_the_test_says(pandalm):
    """The judges change places on half of the questions: neither is better than the other."""
    one, two, clusters = pandalm
    rng, by_cluster, by_item = np.random.default_rng(0), [], []
    for seed in range(150):
        is_swapped = (rng.random(clusters.max() + 1) < 0.5)[clusters]
        pair = np.where(is_swapped, two, one), np.where(is_swapped, one, two)
        by_cluster.append(intervals.paired(*pair, clusters=clusters, num=999, seed=seed).p_value)
        by_item.append(intervals.paired(*pair, num=999, seed=seed).p_value)
    rejected = [np.mean(np.array(found) <= 0.05) for found in (by_cluster, by_item)]
    assert 0.02 <= rejected[0] <= 0.09 and rejected[1] > 0.13
    assert np.mean(np.array(by_cluster) <= 0.01) <= 0.03


def test_one_item_and_few_alike_prove_nothing_of_a_difference():
    one = intervals.paired([1], [0])
    assert one.p_value == 1.0 and one.interval == pytest.approx((-95.0, 100.0))
    five = intervals.paired([1] * 5, [0] * 5)
    assert five.p_value == five.mcnemar_p == 0.0625 and five.interval[0] < 0
    assert intervals.paired([1] * 60, [0] * 60).interval[0] > 85


def test_a_hundred_ties_are_no_certainty():
    low, high = intervals.of_share(np.full(100, 0.5), np.ones(100), 100)
    assert 39 < low < 41 and 59 < high < 61


def test_the_exact_interval_of_what_is_no_mean_has_the_effective_size():
    """Resamples of 70 and 90 % have a variance of 0.01, as a share of 0.8 of 16 items has."""
    low, high = intervals.of_metric(80.0, np.array([70.0, 90.0]), num_items=100, num_clusters=4)
    wider = (special.stdtrit(99, 0.975) / special.stdtrit(3, 0.975)) ** 2
    assert (low, high) == pytest.approx(intervals.clopper_pearson(0.8, 16 * wider))


def test_the_limits_of_what_is_resampled():
    enough, few = intervals.FEW_CLUSTERS, intervals.FEW_CASES
    assert not intervals.is_sparse(0.5, 2.0 * few, enough)
    assert intervals.is_sparse(0.5, 2.0 * few, enough - 1)
    assert intervals.is_sparse(0.5, 2.0 * few - 0.01, enough)
    assert intervals.is_sparse(0.9, 2.0 * few, enough)


def test_ends_of_a_paired_interval_are_differences_that_can_be():
    """Of ten items the judges differ by tenths, and so do the resamples' means."""
    a, b = [1.0] * 6 + [0.0] * 4, [0.0] * 3 + [1.0] * 4 + [0.0] * 3
    ends = intervals.paired(a, b, num=1001, seed=0).interval
    assert ends[0] < 0 < ends[1] and [end % 10 for end in ends] == pytest.approx([0.0, 0.0])


def test_what_is_no_mean_is_resampled_from_30_clusters_on():
    draws = np.linspace(70.0, 90.0, 101)
    assert intervals.of_metric(80.0, draws, 100, intervals.FEW_CLUSTERS) == (70.5, 89.5)
    assert intervals.of_metric(80.0, draws, 100, intervals.FEW_CLUSTERS - 1) != (70.5, 89.5)


def test_more_clusters_than_items_make_nothing_surer():
    """As of half credits, of which two make an item."""
    size = intervals.effective_size(0.5, 0.01, num_items=5, num_clusters=50, most=100)
    assert size == pytest.approx(25.0)


def test_as_many_resamples_are_drawn_as_are_asked_for(monkeypatch):
    sums, sizes = np.array([1.0, 0.0, 1.0]), np.ones(3)
    assert sum(map(len, intervals._drawn(sums, sizes, 100, 0))) == 100
    monkeypatch.setattr(intervals, "BLOCK", 30)  # in several parts
    assert next(len(part) for part in intervals._drawn(sums, sizes, 100, 0)) < 100
    assert sum(map(len, intervals._drawn(sums, sizes, 100, 0))) == 100
