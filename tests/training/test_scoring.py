"""One record of a judgement: what pays, what ranks checkpoints and what is shown can't disagree."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import numpy as np
import pytest

from jlrm.config import RewardConfig, RunConfig
from jlrm.data.batches import Example
from jlrm.data.comparisons import Comparison
from jlrm.data.worlds import toy
from jlrm.evaluation.benchmarks import pairs
from jlrm.evaluation.games import Game
from jlrm.judgement import prompts, rewards
from jlrm.judgement.verdict import parse, swap_preference
from jlrm.training.heldout import figures
from jlrm.training.scoring import Judgement, judge_responses, metrics

BEST_METRICS = get_args(get_type_hints(RunConfig)["best_metric"])
MODES = {"judgelrm": rewards.JUDGELRM, "judgelrm_symmetric": RewardConfig()}
GIVEN = [row for row in toy.comparisons(seed=6, num_rows=40) if row.label]
ROWS = [*GIVEN, *(row.swapped() for row in GIVEN)]
GAMES = [
    Game(item, *order) for order in ((0, 1), (1, 0)) for item in pairs.items(GIVEN, "the toy world")
]


def examples() -> list[Example]:
    template = prompts.PAIR_TEMPLATES["toy"]
    texts = [
        prompts.fill(template, question=r.question, answer_1=r.answer_1, answer_2=r.answer_2)
        for r in ROWS
    ]
    return [Example(row, text, [1]) for row, text in zip(ROWS, texts, strict=True)]


def judged(config: RewardConfig, responses: list[str]) -> list[Judgement]:
    ids = [[1, 2, 3]] * len(responses)
    return judge_responses(config, [], examples(), responses, ids, 8)


def well_formed(label: int) -> str:
    first, second = {1: (8, 4), 2: (4, 8), 0: (5, 5)}[label]
    return f"why</think><answer>{first}</answer><answer>{second}</answer>"


MALFORMED = {
    "a third score": lambda text: text + "<answer>1</answer>",
    "thinks twice": lambda text: "a</think>" + text,
    "a score in its reasoning": lambda text: "<answer>3</answer>" + text,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_format_that_the_reward_calls_malformed_never_ranks_first(mode: str, fault: str) -> None:
    """Always right to a lenient reader, but malformed, against right in two of three and paid."""
    right = [MALFORMED[fault](well_formed(row.label)) for row in ROWS]
    assert all(
        parse(text, strict=False).preference == row.label
        for text, row in zip(right, ROWS, strict=True)
    )
    half = len(GIVEN)
    said = [row.label if i % half % 3 else swap_preference(row.label) for i, row in enumerate(ROWS)]
    sloppy = judged(MODES[mode], right)
    careful = judged(MODES[mode], [well_formed(label or 0) for label in said])
    assert all(each.terms["format"] == MODES[mode].malformed for each in sloppy)
    for name in BEST_METRICS:
        assert figures(GAMES, sloppy)[name] < figures(GAMES, careful)[name], name
    assert figures(GAMES, sloppy)["agreement"] == figures(GAMES, sloppy)["parse_rate"] == 0


def test_decimals_are_a_verdict_where_they_are_paid() -> None:
    texts = [well_formed(row.label).replace("8", "8.5") for row in ROWS]
    rates = {mode: figures(GAMES, judged(config, texts)) for mode, config in MODES.items()}
    assert rates["judgelrm"]["parse_rate"] == rates["judgelrm"]["agreement"] == 0
    assert rates["judgelrm_symmetric"]["parse_rate"] == 100
    assert rates["judgelrm_symmetric"]["agreement"] == 100


@pytest.mark.parametrize("mode", MODES)
def test_a_step_and_the_held_out_set_count_the_same_verdicts(mode: str) -> None:
    texts = [
        f"{i}</think><answer>{i % 9}</answer><answer>{'4.5' if i % 4 else i % 7}</answer>"
        for i in range(len(ROWS))
    ]
    whole = judged(MODES[mode], texts)
    step = metrics(whole, np.ones(len(ROWS)), np.ones(len(ROWS), bool))
    held_out = figures(GAMES, whole)
    assert 0 < step["judge/parse_rate"] < 100
    assert held_out["parse_rate"] == pytest.approx(step["judge/parse_rate"])
    assert held_out["reward"] == pytest.approx(step["reward"])
    as_given = metrics(whole[: len(GIVEN)], np.ones(1), np.ones(1, bool))
    assert held_out["agreement"] == pytest.approx(as_given["judge/agreement"])


SAID = {"1": well_formed(1), "2": well_formed(2), "0": well_formed(0), "-": "no verdict"}


def unlabelled(row: Comparison) -> Comparison:
    return dataclasses.replace(row, score_1=None, score_2=None, preference=None)


def by_majority(votes: str, num_swapped: int = 0, has_label: bool = True) -> list[Judgement]:
    """Return judgements of one pair, the last ones in the other order, paid by their majority."""
    row = next(row for row in GIVEN if row.label == 2)
    row = row if has_label else unlabelled(row)
    rows = [row] * (len(votes) - num_swapped) + [row.swapped()] * num_swapped
    group = [Example(row, "prompt", [1]) for row in rows]
    texts, ids = [SAID[vote] for vote in votes], [[1]] * len(votes)
    return judge_responses(RewardConfig(), [], group, texts, ids, 8, electorate=len(votes))


@pytest.mark.parametrize(
    ("votes", "num_swapped", "wanted"),
    [
        ("112", 0, "rrw"),  # gold prefers the second answer, and is not asked
        ("1-12-", 0, "rmrwm"),
        ("001", 0, "rrw"),
        ("1122", 2, "rrrr"),  # both orders name the same answer
        ("1112", 2, "rrwr"),
        ("12", 0, ""),
        ("1111", 2, ""),  # always the first place: no answer has a majority
        ("--", 0, ""),
    ],
)
def test_a_group_is_paid_for_what_most_of_it_prefer(votes, num_swapped, wanted) -> None:
    config, judgements = RewardConfig(), by_majority(votes, num_swapped)
    paid = {"r": config.preference, "w": config.wrong_preference, "m": 0.0}
    if not wanted:
        assert all(each.reward is None for each in judgements)
    else:
        assert [each.terms["preference"] for each in judgements] == [paid[w] for w in wanted]
        assert all(each.terms["relation"] is None for each in judgements)


def test_answers_that_are_judged_alone_are_compared_with_those_of_the_other() -> None:
    row = next(row for row in GIVEN if row.label == 2)
    said = ["4", "9", "-", "6", "-", "9"]
    texts = [f"r</think><answer>{each}</answer>" if each != "-" else "none" for each in said]
    config = RewardConfig(preference=1.0, wrong_preference=0.0)
    bare = dataclasses.replace(row, score_1=None, score_2=None, preference=2)
    bares = [bare] * 3 + [bare.swapped()] * 3  # as a group stands in a batch
    group = [Example(each, "prompt", [1]) for each in [*bares, *bares]]
    other = ["r</think><answer>5</answer>"] * 6  # of another group, to which nothing leaks
    judgements = judge_responses(config, [], group, texts + other, [[1]] * 12, 8, per_answer=3)
    paid = [each.terms["preference"] for each in judgements]
    # 4 is below 6 and 9; 9 is not below either; 6 is above 4 alone, as 9 is.
    assert paid == [1.0, 0.0, 0.0, 0.5, 0.0, 0.5, *[0.0] * 6]
    assert [each.terms["format"] for each in judgements[:6]] == [1, 1, -1, 1, -1, 1]
    pairs = [each.verdict.scores for each in judgements[:6]]
    assert pairs == [(4, 6), None, None, (6, 4), None, None]
    assert [each.is_right for each in judgements[:6]] == [True, False, False, True, False, False]
    assert [each.table_row()["verdict"] for each in judgements[:3]] == [[4, 6], [9], None]


def test_a_majority_leaves_metrics_their_gold_and_groups_to_themselves() -> None:
    row = next(row for row in GIVEN if row.label == 2)
    group = [Example(row, "prompt", [1])] * 6
    texts = [SAID[vote] for vote in "112221"]
    judgements = judge_responses(RewardConfig(), [], group, texts, [[1]] * 6, 8, electorate=3)
    assert [each.is_right for each in judgements] == [False, False, True, True, True, False]
    right, wrong = RewardConfig().preference, RewardConfig().wrong_preference
    found = [each.terms["preference"] for each in judgements]
    assert found == [right, right, wrong, right, right, wrong]


@pytest.mark.parametrize(("votes", "num_swapped"), [("1-12-", 0), ("1112", 2), ("12", 0)])
def test_a_row_without_a_label_is_paid_as_any_other_and_counted_in_no_agreement(votes, num_swapped):
    judgements = by_majority(votes, num_swapped, has_label=False)
    labelled = by_majority(votes, num_swapped)
    assert [each.terms for each in judgements] == [each.terms for each in labelled]
    assert {each.is_right for each in judgements} == {None}  # "-" is no tie with a missing label
    sizes = np.ones(len(votes)), np.ones(len(votes), bool)
    found, wanted = metrics(judgements, *sizes), metrics(labelled, *sizes)
    agreement = wanted.pop("judge/agreement")
    assert found == wanted
    both = metrics([*judgements, *labelled], *sizes)
    assert both["judge/agreement"] == agreement


@pytest.mark.parametrize("mode", MODES)
def test_a_verdict_is_what_was_paid(mode: str) -> None:
    """Content is paid for exactly those responses that have a verdict."""
    config = dataclasses.replace(MODES[mode], wrong_relation=-1.5)
    texts = [well_formed(1), "no verdict", well_formed(1) + "<answer>2</answer>", "</think>"]
    texts += [well_formed(2).replace("4", score) for score in ("4.5", "11", "eight", "")]
    for text in texts:
        first, *_ = judged(config, [text] * len(ROWS))
        has_content = bool(first.terms["relation"])
        assert has_content == (first.verdict.status == "ok"), (text, first)
        assert first.table_row()["verdict"] == ((has_content and [*first.verdict.scores]) or None)
