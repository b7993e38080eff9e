"""Policies of pairs, what they credit, and how their fields are overridden."""

from __future__ import annotations

import pytest

from jlrm.config import UsageError
from jlrm.evaluation.policies import FIELDS, WORDS, Policy, overridden, pair_policies

OFFICIAL = Policy("own", "as_given", 0.25, 0.75)
RANKED = (Policy("ranked", "both", "shared", 0.0), Policy("mean", "both", 0.5, 0.0))
BENCHMARKS = ("mine", "theirs")


def changed(*overrides: str, known=None) -> Policy:
    return overridden("mine", known or pair_policies(OFFICIAL), overrides, BENCHMARKS)


def test_pairs_may_also_be_counted_by_mean_majority_and_all():
    """A tie is half of a win, but for `all`, where one game without a win loses the pair."""
    official, mean, majority, every = pair_policies(OFFICIAL)
    assert official is OFFICIAL
    assert mean == Policy("mean", "both", tie_credit=0.5, error_credit=0.0)
    assert majority == Policy("majority", "both", tie_credit=0.5, error_credit=0.5)
    assert every == Policy("all", "both", tie_credit=0.0, error_credit=0.0)


@pytest.mark.parametrize("name", ["mean", "majority", "all"])
def test_an_official_rule_of_that_name_takes_its_place(name):
    official = Policy(name, "as_given", 0.1, 0.2)
    names = [each.aggregation for each in pair_policies(official)]
    assert pair_policies(official)[0] is official
    assert names[0] == name and sorted(names) == ["all", "majority", "mean"]


def test_without_overrides_the_first_is_taken():
    assert changed() is not None and changed() == OFFICIAL


def test_an_aggregation_brings_its_own_defaults_wherever_it_stands():
    assert changed("aggregation=majority") == Policy("majority", "both", 0.5, 0.5)
    assert changed("order=random", "aggregation=all") == Policy("all", "random", 0.0, 0.0)


@pytest.mark.parametrize("order", WORDS["order"])
def test_every_order_can_be_asked_for(order):
    assert changed(f"order={order}").order == order


def test_refused_games_count_only_where_it_is_asked_for():
    assert not any(policy.counts_refused for policy in pair_policies(OFFICIAL))
    counting = changed("refused=error_credit", "aggregation=majority")
    assert counting.counts_refused and counting.error_credit == 0.5
    assert not changed("theirs.refused=error_credit").counts_refused
    assert not changed("refused=unjudged").counts_refused
    assert changed("refused=error_credit", known=RANKED).counts_refused


@pytest.mark.parametrize("key", ["tie_credit", "error_credit"])
@pytest.mark.parametrize("credit", [0.0, 0.3, 1.0])
def test_a_credit_is_from_0_to_1_and_both_are_allowed(key, credit):
    policy = changed(f"{key}={credit}")
    assert getattr(policy, key) == credit and isinstance(getattr(policy, key), float)
    others = [name for name in FIELDS if name != key]
    assert all(getattr(policy, name) == getattr(OFFICIAL, name) for name in others)


@pytest.mark.parametrize("key", ["tie_credit", "error_credit"])
@pytest.mark.parametrize("text", ["-0.001", "1.001", "nan", "inf", "much", "shared"])
def test_other_credits_are_refused(key, text):
    with pytest.raises(UsageError, match=r"mine wants a number from 0 to 1 or '(second|tie)' here"):
        changed(f"{key}={text}")


def test_words_stand_for_credits_where_they_mean_something():
    assert changed("tie_credit=second").tie_credit == "second"
    assert changed("error_credit=tie").error_credit == "tie"
    assert changed("tie_credit=shared", known=RANKED).tie_credit == "shared"
    for text in ("tie_credit=second", "error_credit=tie", "tie_credit=tie"):
        with pytest.raises(UsageError, match="wants a number"):
            changed(text, known=RANKED)
    with pytest.raises(UsageError, match=r"from 0 to 1 here\."):
        changed("error_credit=x", known=RANKED)
    for text in ("tie_credit=tie", "error_credit=second"):
        with pytest.raises(UsageError, match="wants a number"):
            changed(text)


def test_a_key_may_name_its_benchmark_and_others_skip_it():
    assert changed("mine.order=both").order == "both"
    assert changed("theirs.order=both") == OFFICIAL
    assert changed("theirs.aggregation=mean", "mine.tie_credit=1").tie_credit == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("order", "wanted KEY=VALUE"),
        ("order=", "wanted KEY=VALUE"),
        ("yours.order=both", "no benchmark 'yours'"),
        ("ordre=both", "unknown key 'ordre'. Did you mean 'order'?"),
        ("mine.ordre=both", "unknown key 'ordre'"),
        ("theirs.ordre=both", "unknown key 'ordre'"),
        ("order=sideways", "wanted one of as_given, random, both"),
        ("refused=yes", "--policy refused=yes: wanted one of unjudged, error_credit"),
        ("aggregation=men", "mine has own, mean, majority, all. Did you mean 'mean'?"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(UsageError) as error:
        changed(text)
    assert message in str(error.value)
