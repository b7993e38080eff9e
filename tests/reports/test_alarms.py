"""Alarms: each rule speaks where it should, once a stage, and is silent on a run that learns."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jlrm.config import UsageError
from jlrm.reports import alarms, run_page, tracking

GOOD = {
    "judge/parse_rate": 100.0,
    "judge/agreement": 75.0,
    "frac_reward_zero_std": 0.2,
    "entropy": 0.1,
    "completions/clipped_ratio": 0.0,
}
HELDOUT = {"eval/agreement": 75.0, "eval/delta_bias": 5.0, "eval/parse_rate": 100.0}


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Return steps with the given metrics (`__` for `/`); the last one has held-out metrics."""
    values = GOOD | {name.replace("__", "/"): value for name, value in changes.items()}
    steps = [{"stage": "grpo", "step": step + 1, **values} for step in range(count)]
    steps[-1] = {**HELDOUT, **steps[-1]}
    return steps


def said(made: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(alarm.step, alarm.text) for alarm in alarms.alarms(made)]


@pytest.mark.parametrize(
    ("changes", "step", "text"),
    [
        (
            {"judge__parse_rate": 0.0, "judge__agreement": 0.0, "completions__clipped_ratio": 0.9},
            5,
            "no completion of the last 5 steps holds a verdict, .*90 % were cut",
        ),
        (
            {"eval__delta_bias": 90.0, "eval__parse_rate": 1.0},
            1,
            "follow the place of the answer .lean 90 %",
        ),
        (
            {"eval__delta_bias": 50.0, "eval__parse_rate": 1.0},
            2,
            "follow the place of the answer .lean 50 %",
        ),
        ({"frac_reward_zero_std": 0.95}, 10, "95 % of the groups .* 75 % of the verdicts"),
        ({"entropy": 0.004}, 10, "explores no more"),
        ({"judge__agreement": 89.0, "eval__agreement": 74.0}, 10, "learned by heart"),
        ({"completions__clipped_ratio": 0.5}, 5, "50 % of the completions are cut"),
        ({"kl": 1.0}, 5, "KL divergence 1.00 nats"),
    ],
)
def test_a_rule_speaks_when_its_steps_are_full_and_once(changes, step, text):
    ((when, what),) = said(rows(12, **changes))
    assert when == step
    assert re.search(text, what)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"judge__parse_rate": 1.0},
        {"eval__delta_bias": 49.0},
        {"eval__delta_bias": 95.0, "eval__parse_rate": 0.0},
        {"frac_reward_zero_std": 0.89},
        {"frac_reward_zero_std": 1.0, "judge__agreement": 90.0, "eval__agreement": 88.0},
        {"entropy": 0.0101},
        {"entropy": 0.0, "judge__agreement": 90.0, "eval__agreement": 88.0},
        {"judge__agreement": 89.0, "eval__agreement": 74.5},
        {"completions__clipped_ratio": 0.49},
        {"kl": 0.99},
    ],
)
def test_a_run_just_inside_the_limits_hears_nothing(changes):
    assert not said(rows(12, **changes))


def test_a_form_that_is_lost_again_is_told_from_one_that_was_never_there():
    learned, lost = rows(6), rows(6, judge__parse_rate=60.0)
    ((_, text),) = said(learned + lost)
    assert "68 % can be read, 100 % could" in text
    assert not said(rows(20, judge__parse_rate=60.0))
    assert not said(learned + rows(6, judge__parse_rate=81.0))


def test_a_mean_takes_steps_of_one_stage_alone_and_needs_all_of_them():
    quiet = rows(4, judge__parse_rate=0.0)
    assert not said([{**row, "stage": "sft"} for row in quiet] + quiet)
    gap = [{**row, "entropy": float("nan")} if row["step"] == 5 else row for row in rows(10)]
    assert not said([row | {"entropy": row["entropy"] * 0} for row in gap])


def test_the_next_stage_is_warned_anew():
    bad = rows(12, eval__delta_bias=100.0)
    assert len(said([{**row, "stage": "sft"} for row in bad] + bad + bad)) == 2


def test_a_lean_that_is_seen_once_is_waited_for_and_one_that_passed_is_said_to_be_over():
    lean = rows(12)
    lean[3] = {**lean[3], **HELDOUT, "eval/delta_bias": 60.0}
    assert not said(lean)
    lean[5] = {**lean[5], **HELDOUT, "eval/delta_bias": 95.0}
    (alarm,) = alarms.alarms(lean)
    assert alarm.is_over and alarm.step == 6
    (alarm,) = alarms.alarms(lean[:11])  # nothing has been judged since
    assert not alarm.is_over


@pytest.mark.slow
def test_a_run_says_it_and_its_page_says_it_again_and_a_restart_does_not(tmp_path, capsys):
    settings: dict[str, Any] = dict(stage="grpo", tensorboard=False, wandb_project="", config={})
    made = rows(12, entropy=0.004)

    def go_on(first: int, last: int) -> str:
        with tracking.Tracker(
            tmp_path, **settings, num_steps=12, first_step=first, is_writer=True
        ) as tracker:
            for row in made[first:last]:
                metrics = {name: row[name] for name in row if name not in ("stage", "step")}
                tracker.log(row["step"], metrics)
        return capsys.readouterr().err

    assert go_on(0, 11).count("grpo step 10, alarm entropy: the judge writes the same") == 1
    assert "explores no more" not in go_on(11, 12)
    run_page.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("explores no more") == 1 and "grpo, step 10" in page


def turning(count: int, at: int, before: dict[str, float], after: dict[str, float]):
    """Return steps whose metrics change after so many."""
    made = rows(count)
    return [row | (before if i < at else after) for i, row in enumerate(made)]


def test_a_reward_that_falls_by_more_than_it_varied_is_told():
    good, worse = {"reward": 3.0, "reward_std": 1.5}, {"reward": 1.4, "reward_std": 0.0}
    ((step, text),) = said(turning(40, 20, good, worse))
    assert step == 30 and "fallen from 3.00 to 1.40" in text and "(1.50)" in text
    assert not said(turning(40, 20, good, {"reward": 1.5, "reward_std": 0.0}))
    assert not said(turning(40, 20, {"reward": 1.4, "reward_std": 1.5}, good))  # it rises
    # A dip of some steps, as every run has, tells nothing.
    dip = turning(40, 20, good, worse)
    assert not said(dip[:25] + [row | good for row in dip[25:]])


def test_completions_that_grow_and_win_nothing_are_told():
    length, agreement = "completions/mean_length", "judge/agreement"
    short = {length: 100.0, agreement: 75.0}
    ((step, text),) = said(turning(40, 15, short, {length: 200.0, agreement: 75.0}))
    assert step == 25 and "grow from 100 to 200 tokens" in text
    assert not said(turning(40, 15, short, {length: 199.0, agreement: 75.0}))
    assert not said(turning(40, 15, short, {length: 300.0, agreement: 76.0}))  # it is worth it


def test_a_name_that_is_no_alarms_is_refused():
    alarms.check_names(list(alarms.RULES))
    with pytest.raises(UsageError, match=r"run\.stop_on: no alarm 'klx'\. Did you mean 'kl'\?"):
        alarms.check_names(["place", "klx"])
