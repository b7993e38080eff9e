"""Rewards of users: both forms, what does not apply, and every way they can fail."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from typing import Any

import pytest

from jlrm.config import RunError, UsageError
from jlrm.data.comparisons import Comparison
from jlrm.judgement import plugins

COUNTER = itertools.count()


def load(code: str, name: str = "reward", weight: float = 1.0) -> plugins.Plugin:
    """Load a function of a module with this source."""
    module = types.ModuleType(f"user_rewards_{next(COUNTER)}")
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module
    (plugin,) = plugins.load({f"{module.__name__}:{name}": weight})
    return plugin


def rows(*texts: str, **changes: Any) -> list[dict[str, Any]]:
    comparison = Comparison("r", "q", "a", "b", score_1=8.0, score_2=4.0, source="s")
    return [
        {
            **vars(dataclasses.replace(comparison, **{"id": f"row-{i}", **changes})),
            "prompt": "p",
            "completion": text,
            "completion_ids": [1] * len(text),
        }
        for i, text in enumerate(texts)
    ]


def test_trl_form_gets_the_whole_batch_with_the_record_as_columns():
    plugin = load(
        "def reward(prompts, completions, completion_ids, **columns):\n"
        "    assert prompts == ['p', 'p'] and columns['id'] == ['row-0', 'row-1']\n"
        "    assert columns['question'] == ['q', 'q'] and columns['score_1'] == [8.0, 8.0]\n"
        "    return [len(text) + len(ids) for text, ids in zip(completions, completion_ids)]\n",
        weight=0.5,
    )
    assert plugin.form == "trl" and plugin.name == "reward"
    assert plugin.pay(rows("a", "abc")) == [1.0, 3.0]


def test_a_function_without_further_columns_gets_what_it_names():
    plugin = load("def reward(completions, answer_2):\n    return [answer_2 == ['b']]\n")
    assert plugin.pay(rows("a")) == [1.0]


def test_verl_form_gets_one_row_at_a_time():
    plugin = load(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert data_source == 's'\n"
        "    return {'score': ground_truth[0] + len(solution_str), 'other': 1}\n",
        "compute_score",
    )
    assert plugin.form == "verl"
    assert plugin.pay(rows("a", "abc")) == [9.0, 11.0]


def test_verl_form_gets_the_rows_own_truth_or_the_preference():
    code = "def reward(solution_str, ground_truth):\n    return ground_truth\n"
    assert load(code).pay(rows("a", meta={"ground_truth": 7})) == [7.0]
    alone = rows("a", score_1=None, score_2=None, preference=2)
    assert load(code).pay(alone) == [2.0]


def test_none_is_not_applicable_in_both_forms():
    trl = "def reward(completions, **columns):\n    return [None, 1.0]\n"
    verl = "def reward(solution_str):\n    return None if solution_str == 'a' else 1\n"
    for code in (trl, verl):
        assert load(code).pay(rows("a", "b")) == [None, 1.0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def reward(completions, **columns):\n"
            "    return [1 / (text != 'bad') for text in completions]\n",
            r"failed on row row-1: ZeroDivisionError",
        ),
        (
            "def reward(solution_str):\n    return 1 / (solution_str != 'bad')\n",
            r"failed on row row-1: ZeroDivisionError",
        ),
        (
            "def reward(completions, **columns):\n    assert len(completions) == 1\n"
            "    return [0.0]\n",
            r"failed on row row-0 and 2 others together, none alone: AssertionError",
        ),
        ("def reward(completions, **columns):\n    return [1.0]\n", "gave 1 values for 3"),
        ("def reward(completions, **columns):\n    return 1.0\n", "gave 1.0 for 3 completions"),
        (
            "def reward(completions, **columns):\n    return [0.0, float('nan'), 0.0]\n",
            "gave nan for row row-1, wanted a finite number",
        ),
        (
            "def reward(completions, **columns):\n    return [0.0, 'high', 0.0]\n",
            "gave 'high' for row row-1",
        ),
    ],
)
def test_a_failing_reward_stops_and_names_the_row(code, message):
    with pytest.raises(RunError, match=message):
        load(code).pay(rows("good", "bad", "good"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "not of the form module:function"),
        (":f", "not of the form module:function"),
        ("no_such_module_here:f", "importing 'no_such_module_here' failed"),
        ("math:no_such", "has no function 'no_such'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_wrong_names_are_clear(spec, message):
    with pytest.raises(UsageError, match=message):
        plugins.load({spec: 1.0})


def test_a_function_of_neither_form_and_a_name_given_twice_are_refused():
    with pytest.raises(UsageError, match=r"takes \(text\)\. Wanted TRL's form"):
        load("def reward(text):\n    return 1\n")
    with pytest.raises(UsageError, match="there are two rewards 'relation'"):
        load("def relation(completions):\n    return []\n", "relation")
