"""A metric describes some of the items; without a verdict under it there is none."""

from __future__ import annotations

import numpy as np
import pytest

from jlrm.evaluation.benchmarks.registry import BENCHMARKS, policy_of
from jlrm.evaluation.benchmarks.rewardbench2 import TiesRow, ties_score
from jlrm.evaluation.games import Game, Item, Response
from jlrm.evaluation.reading import reader
from jlrm.evaluation.statistics import intervals, metrics, results
from jlrm.evaluation.statistics.clusters import cluster_items
from jlrm.reports.results_file import SubsetResult, headline

NONE = "not a word of a verdict"


def evaluation(name: str, items: list[Item], say, *overrides: str) -> results.Evaluation:
    """Return what a judge said: `say(game)` is the place it names, 0: a tie, None: nothing."""
    bench, policy = BENCHMARKS[name], policy_of(name, overrides)
    games = bench.games(items, policy, 0)
    responses = {game.id: _response(game, say(game)) for game in games}
    return results.Evaluation(bench, policy, games, responses, reader("lenient"))


def _response(game: Game, said: int | None) -> Response:
    if said is None:
        return Response(game.id, texts=(NONE,))
    return Response(game.id, preference=said)


def right(game: Game) -> int:
    return 1 if game.first == 0 else 2


def pairs(num: int, subsets=("even", "odd"), same: int = 1) -> list[Item]:
    """Items whose first answer is right; every `same` of them share a question."""
    return [
        Item(f"p{i}", f"question {i // same}", ("x", "y"), 1, subset=subsets[i % len(subsets)])
        for i in range(num)
    ]


def test_a_subset_without_a_verdict_has_no_figure_and_the_rest_keeps_its_own(caplog):
    made = evaluation("pairs", pairs(60), lambda g: right(g) if g.item.subset == "even" else None)
    entry = results.entry(made, 9.0)
    assert entry.metrics["even"] == 100.0 and entry.metrics["odd"] is None
    assert entry.metrics["overall"] == 50.0 and "odd" not in entry.intervals
    assert entry.subsets["odd"] == SubsetResult(30, None)
    assert entry.silent == ("odd",) and not entry.has_no_verdict
    assert "pairs: NO VERDICT for odd." in results.silence("pairs", entry)
    assert headline(entry)["odd"] is None and headline(entry)["clusters"] == 60


def test_a_section_is_of_its_subsets():
    rows = [
        Item(f"{subset}{i}", f"{subset} {i}", ("x", "y"), 1, subset=subset)
        for subset in ("refusals-dangerous", "donotanswer", "hep-cpp", "mt-bench-hard")
        for i in range(10)
    ]
    silent = ("refusals-dangerous", "donotanswer")
    made = evaluation("rewardbench", rows, lambda g: None if g.item.subset in silent else right(g))
    entry = results.entry(made, 9.0)
    assert set(entry.silent) == {"Safety", *silent}
    assert entry.metrics["Reasoning"] == entry.metrics["Chat Hard"] == 100.0
    # ten items, all right: the exact interval of ten, not of forty
    assert entry.intervals["Reasoning"] == pytest.approx(intervals.clopper_pearson(1.0, 10))
    assert entry.intervals["hep-cpp"] == entry.intervals["Reasoning"]


def test_a_judge_without_any_verdict_has_no_figure_at_all():
    made = evaluation("pairs", pairs(12), lambda game: None, "error_credit=1")
    entry = results.entry(made, 9.0)
    assert set(entry.metrics.values()) == {None} and entry.intervals == {}
    assert entry.has_no_verdict and set(entry.silent) == set(entry.metrics)
    assert results.silence("pairs", entry) == ""  # results.warning says it
    assert entry.diagnostics.consistency and entry.diagnostics.consistency.percent is None


@pytest.mark.parametrize("is_mine", [True, False])
def test_a_judge_without_a_verdict_is_compared_with_none(is_mine):
    judges = [evaluation("pairs", pairs(12), say) for say in (right, lambda game: None)]
    assert results.comparison(*judges[:: 1 if is_mine else -1], "other") is None
    found = results.comparison(judges[0], judges[0], "other")
    assert found and found.difference == 0.0 and found.clusters == 12


@pytest.mark.slow
def test_metrics_that_are_means_are_those_of_the_slow_way():
    """Whatever way a figure is resampled, its interval is that of resamples of clusters."""
    rng = np.random.default_rng(0)
    said = dict(zip((f"p{i}" for i in range(240)), rng.random(240) < 0.7, strict=True))
    made = evaluation("pairs", pairs(240, same=4), lambda g: right(g) if said[g.item.id] else 1)
    judged, _ = made.judged()
    clusters = cluster_items([each.item for each in judged])
    found = results.entry(made, 9.0).intervals
    slow = intervals.bootstrap(
        judged, lambda sample: made.benchmark.metrics(sample, made.policy), clusters=clusters
    )
    for name in ("overall", "even", "odd"):
        assert found[name] == pytest.approx(slow[name], abs=1.0)  # one step is 0.83
    assert found["consistency"] == pytest.approx(slow["consistency"])


def test_few_items_have_exact_intervals_by_their_effective_number():
    made = evaluation("pairs", pairs(12), lambda g: right(g) if g.item.id < "p5" else 0)
    entry = results.entry(made, 9.0)
    share = (entry.metrics["overall"] or 0) / 100
    assert entry.intervals["overall"] == pytest.approx(intervals.clopper_pearson(share, 12))
    assert entry.clusters == 12 and entry.design_effect == pytest.approx(1.0)
    shared = evaluation("pairs", pairs(12, same=4), lambda g: right(g) if g.item.id < "p5" else 0)
    wide = results.entry(shared, 9.0)
    assert wide.metrics == entry.metrics and wide.clusters == 3
    assert np.ptp(wide.intervals["overall"]) > np.ptp(entry.intervals["overall"])


def test_a_figure_of_a_subset_is_of_its_items_were_it_one_alone():
    rows = [*pairs(61, subsets=("many",)), Item("one", "alone", ("x", "y"), 1, subset="one")]
    entry = results.entry(evaluation("pairs", rows, right), 9.0)
    assert entry.metrics["one"] == entry.metrics["many"] == 100.0
    assert entry.intervals["one"] == pytest.approx(intervals.clopper_pearson(1.0, 1))
    assert entry.intervals["many"] == pytest.approx(intervals.clopper_pearson(1.0, 61))


def test_a_metric_that_is_named_as_a_subset_is_the_mean_of_it():
    made = evaluation("pairs", pairs(240), lambda g: right(g) if g.item.id < "p17" else 1)
    judged, _ = made.judged()
    credits = [made.benchmark.credit(each, made.policy) for each in judged]
    credited = metrics.Credited(made.benchmark, made.policy, judged, credits, np.arange(240))
    values, ranges = metrics.metrics(credited)
    part = credited.by_subset()["odd"]
    assert 50 < (values["odd"] or 0) < 100
    assert ranges["odd"] == metrics._of_mean(part)
    assert metrics._is_mean("odd", values["odd"] or 0, part)
    assert not metrics._is_mean("consistency", values["odd"] or 0, part)


def test_what_is_no_percentage_is_left_to_resampling():
    rows = [Item(f"Natural-{i}", f"q {i}", ("x", "y"), 1 + i % 2) for i in range(8)]
    entry = results.entry(evaluation("llmbar", rows, right), 9.0)
    assert entry.metrics["kappa_agreement"] == 1.0
    assert entry.intervals["kappa_agreement"] == (1.0, 1.0)  # and not 1 % of eight items


def test_ties_prompts_that_are_drawn_twice_count_twice():
    """RewardBench 2's ref and tied prompts of one number are one cluster, drawn together."""
    good = [TiesRow("ref:1", (9, 1), 1), TiesRow("tied:1", (9, 8.5, 1), 2)]
    bad = [TiesRow("ref:2", (1, 9), 1), TiesRow("tied:2", (1, 2, 9), 2)]
    once, twice = ties_score([*good, *bad]), ties_score([*good, *good, *bad])
    assert 0 < once < twice < ties_score(good)


def test_a_support_is_found_once_for_all_metrics_of_it():
    made = evaluation("pairs", pairs(20), right)
    judged, _ = made.judged()
    credits = [made.benchmark.credit(each, made.policy) for each in judged]
    credited = metrics.Credited(made.benchmark, made.policy, judged, credits, np.arange(20))
    support = metrics._support(credited, credited.total())
    assert support["overall"] is support["consistency"] is credited
    assert {each.item.subset for each in support["odd"].judged} == {"odd"}
