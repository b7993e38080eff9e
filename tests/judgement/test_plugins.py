"""Rewards of users: both forms, what does not apply, and every way they can fail."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import pickle
import sys
import types
from typing import Any

import pytest

from jlrm.config import RunError, UsageError
from jlrm.data.comparisons import Comparison
from jlrm.judgement import plugins
from jlrm.judgement.notes import PluginContext, TrainerState
from jlrm.judgement.turns import Turn

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


# --- the forms that TRL takes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "numpy.array([1.0, 2.0], numpy.float32)",
        "numpy.array([1, 2])",
        "numpy.array([1.0, 2.0]).astype(object)",
        "[numpy.float64(1), numpy.array(2.0)]",
        "jax.numpy.array([1.0, 2.0], jax.numpy.bfloat16)",
        "list(jax.numpy.array([1.0, 2.0]))",
        "(x for x in (1, 2))",
        "map(float, (1, 2))",
        "(True, 2)",
        "{'a': 1, 'b': 2}.values()",
    ],
)
def test_whatever_holds_a_number_for_each_completion_is_taken(given):
    code = "import numpy, jax\n" if "jax" in given else "import numpy\n"
    plugin = load(f"{code}def reward(completions, **columns):\n    return {given}\n", weight=2.0)
    assert plugin.pay(rows("a", "b")) == [2.0, 4.0]


@pytest.mark.slow  # torch takes seconds to import
def test_tensors_of_torch_are_taken():
    pytest.importorskip("torch")
    for given in (
        "torch.tensor([1.0, 2.0], requires_grad=True)",
        "torch.tensor([1, 2])",
        "torch.tensor([1.0, 2.0], dtype=torch.bfloat16)",
        "[torch.tensor(1.0), torch.tensor([2.0])]",
    ):
        plugin = load(f"import torch\ndef reward(completions):\n    return {given}\n")
        assert plugin.pay(rows("a", "b")) == [1.0, 2.0]
    verl = "import torch\ndef reward(solution_str):\n    return {'score': torch.tensor(3.0)}\n"
    assert load(verl).pay(rows("a")) == [3.0]


def test_none_in_an_array_of_objects_does_not_apply_and_nan_in_any_array_is_refused():
    code = "import numpy\ndef reward(completions):\n    return numpy.array([{}, 1.0])\n"
    assert load(code.format("None")).pay(rows("a", "b")) == [None, 1.0]
    with pytest.raises(RunError, match="gave nan for row row-0, wanted a finite number or None"):
        load(code.format("numpy.nan")).pay(rows("a", "b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("'0.5'", "gave '0.5' for 2 completions"),
        ("['0.5', 1]", "gave '0.5' for row row-0"),
        ("[[1.0], [2.0]]", r"gave \[1.0\] for row row-0"),
        ("None", "gave None for 2 completions"),
        ("{1.0, 2.0}", r"gave \{1.0, 2.0\} for 2 completions"),
        ("[10**400, 1]", "gave 1000"),
        ("{'row': 1, 'other': 2}", "for 2 completions"),
        ("(1 / 0 for _ in completions)", "failed on row row-0: ZeroDivisionError"),
    ],
)
def test_what_holds_no_numbers_is_named(given, message):
    with pytest.raises(RunError, match=message):
        load(f"def reward(completions):\n    return {given}\n").pay(rows("a", "b"))


def test_async_rewards_of_a_batch_wait_together():
    """Each waits for a sign that only the other gives: one after the other, they would hang."""
    code = (
        "import asyncio\n"
        "first, second = asyncio.Event(), asyncio.Event()\n"
        "async def one(completions, **columns):\n"
        "    first.set()\n"
        "    await asyncio.wait_for(second.wait(), 20)\n"
        "    return [len(text) for text in completions]\n"
        "async def two(solution_str):\n"
        "    second.set()\n"
        "    await asyncio.wait_for(first.wait(), 20)\n"
        "    return len(solution_str) + 0.5\n"
    )
    module = types.ModuleType(f"user_rewards_{next(COUNTER)}")
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module
    loaded = plugins.load({f"{module.__name__}:one": 1.0, f"{module.__name__}:two": 2.0})
    for _ in range(2):  # what a module keeps open belongs to one loop
        paid = plugins.pay(loaded, rows("a", "abc"), PluginContext())
        assert paid == {"one": [1.0, 3.0], "two": [3.0, 7.0]}


def test_a_reward_may_run_a_loop_of_its_own_or_be_asked_from_a_running_one():
    code = (
        "import asyncio\n"
        "async def ask(text):\n    return len(text)\n"
        "def reward(completions):\n    return [asyncio.run(ask(text)) for text in completions]\n"
        "async def other(completions):\n    return [await ask(text) for text in completions]\n"
    )
    assert load(code).pay(rows("abc")) == [3.0]

    async def notebook() -> list[float | None]:
        return load(code, "other").pay(rows("abc"))

    assert asyncio.run(notebook()) == [3.0]


OBJECTS = (
    "import functools\n"
    "class Judge:\n"
    "    def __init__(self, unit=1):\n        self.unit = unit\n"
    "    def __call__(self, completions, **columns):\n"
    "        return [self.unit * len(text) for text in completions]\n"
    "    def double(self, completions):\n        return [2 * len(text) for text in completions]\n"
    "    async def later(self, completions):\n        return [3 * len(t) for t in completions]\n"
    "class Asked:\n"
    "    async def __call__(self, completions):\n        return [4 * len(t) for t in completions]\n"
    "class Needs:\n    def __init__(self, url):\n        pass\n"
    "class Silent:\n    pass\n"
    "judge, asked = Judge(5), Asked()\n"
    "def of(unit, completions):\n    return [unit * len(text) for text in completions]\n"
    "partial = functools.partial(of, 6)\n"
)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("judge", 5), ("Judge", 1), ("judge.double", 2), ("judge.later", 3), ("asked", 4),
        ("Asked", 4), ("partial", 6),
    ],
)  # fmt: skip
def test_callable_objects_of_every_kind(name, unit):
    plugin = load(OBJECTS, name)
    assert plugin.name == name and plugin.pay(rows("ab")) == [2.0 * unit]


def test_a_class_that_cannot_be_made_or_called_is_refused():
    with pytest.raises(UsageError, match=r"is a class.*'url'.*Name an object of it"):
        load(OBJECTS, "Needs")
    with pytest.raises(UsageError, match="has no function 'Silent'"):
        load(OBJECTS, "Silent")


def test_texts_are_strings_and_conversations_at_once():
    code = (
        "def reward(prompts, completions):\n"
        "    assert [text.upper() for text in completions] == ['ABC', '']\n"
        "    assert [c[0]['content'] for c in completions] == ['abc', '']\n"
        "    assert [c[-1]['content'] for c in completions] == ['abc', '']\n"
        "    assert completions[0][0].get('role') == 'assistant'\n"
        "    assert prompts[0] == 'p' and prompts[0][-1]['content'] == 'p'\n"
        "    assert prompts[0][0]['role'] == 'user' and prompts[0][0].get('name') is None\n"
        "    assert completions[0][0] == 'a' and completions[0][-1] == 'c'\n"
        "    assert completions[0][1:] == 'bc' and list(completions[0]) == ['a', 'b', 'c']\n"
        "    return [len(text) for text in completions]\n"
    )
    assert load(code).pay(rows("abc", "")) == [3.0, 0.0]


def test_a_turn_travels_to_other_processes_whole():
    turn = pickle.loads(pickle.dumps(Turn("text", "user")))
    assert turn == "text" and turn[0]["role"] == "user" and turn[2]["content"] == "text"
    assert json.dumps({"text": turn}) == '{"text": "text"}'
    with pytest.raises(IndexError):
        turn[4]
    with pytest.raises(KeyError):
        turn[0]["name"]


def test_own_columns_are_lists_beside_ours_and_hide_none_of_them():
    code = (
        "def reward(completions, difficulty, id, meta, **columns):\n"
        "    assert id == ['row-0', 'row-1'] and columns['topic'] == [None, 'x']\n"
        "    assert columns['prompts'] == ['p', 'p'] and meta[1]['prompts'] == 'mine'\n"
        "    return difficulty\n"
    )
    first, second = rows("a", "b")
    first["meta"] = {"difficulty": 3, "id": "mine"}
    second["meta"] = {"difficulty": 0.5, "topic": "x", "prompts": "mine"}
    assert load(code).pay([first, second]) == [3.0, 0.5]


def test_a_column_that_no_row_has_is_named_unless_it_has_a_default():
    with pytest.raises(RunError, match=r"takes 'difficulty', which no row.*Give the parameter a d"):
        load("def reward(completions, difficulty):\n    return difficulty\n").pay(rows("a"))
    code = "def reward(completions, difficulty=None):\n    return [difficulty is None]\n"
    assert load(code).pay(rows("a")) == [1.0]


def test_the_state_of_the_stage_and_what_is_logged():
    code = (
        "def reward(completions, trainer_state, log_metric, log_extra):\n"
        "    share = trainer_state.global_step / trainer_state.max_steps\n"
        "    log_metric('share', share)\n"
        "    log_extra('length', [len(text) for text in completions])\n"
        "    log_extra('kind', (object if text == 'a' else text for text in completions))\n"
        "    return [share * trainer_state.epoch] * len(completions)\n"
    )
    context = PluginContext(TrainerState(3, 12, 2.0))
    assert load(code).pay(rows("a", "abc"), context) == [0.5, 0.5]
    assert context.numbers() == [("share", 0.25)]
    assert context.by_row(2) == [
        {"length": 1, "kind": "<class 'object'>"},
        {"length": 3, "kind": "abc"},
    ]


@pytest.mark.parametrize("value", ["float('nan')", "'high'", "None", "[1, 2]"])
def test_a_metric_that_is_no_number_is_named_with_its_reward(value):
    code = "def reward(completions, log_metric):\n    log_metric('m', {})\n    return [1]\n"
    context = PluginContext()
    load(code.format(value)).pay(rows("a"), context)
    with pytest.raises(RunError, match=r"The reward reward logs the metric 'm' as .*, wanted"):
        context.numbers()


def test_a_logged_column_has_a_value_for_each_completion():
    code = "def reward(completions, log_extra):\n    log_extra('c', [1])\n    return [1, 1]\n"
    context = PluginContext()
    load(code).pay(rows("a", "b"), context)
    with pytest.raises(RunError, match="logs the column 'c' with 1 values for 2 completions"):
        context.by_row(2)


@pytest.mark.parametrize("form", ["def", "async def"])
@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("sys.exit(0)", r"it called sys\.exit\(0\)"),
        ("sys.exit()", r"it called sys\.exit\(\)"),
        ("exit('done')", r"it called sys\.exit\('done'\)"),
        ("raise asyncio.CancelledError", r"CancelledError\(\)"),
        ("raise KeyError('x')", r"KeyError\('x'\)"),
    ],
)
def test_a_reward_that_ends_the_program_is_an_error_with_its_row(form, ending, told):
    for head, name in (("reward(completions)", "trl"), ("reward(solution_str)", "verl")):
        text = "completions[-1]" if name == "trl" else "solution_str"
        code = (
            f"import asyncio, sys\n{form} {head}:\n    if 'bad' in {text}:\n        {ending}\n"
            f"    return {'[1.0] * len(completions)' if name == 'trl' else '1.0'}\n"
        )
        with pytest.raises(RunError, match=rf"The reward reward failed on row row-1: {told}"):
            load(code).pay(rows("good", "bad"))


def test_a_module_that_ends_the_program_is_refused(tmp_path, monkeypatch):
    (tmp_path / "ending_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"importing 'ending_rewards' failed: SystemExit\(0\)"):
        plugins.load({"ending_rewards:reward": 1.0})


def test_a_dictionary_of_verl_without_a_score_is_named():
    code = "def reward(solution_str):\n    return {'acc': 1.0, 'pred': 'x'}\n"
    with pytest.raises(RunError, match=r"without 'score' for row row-0 \(keys: acc, pred\)"):
        load(code).pay(rows("a"))
    code = "def reward(solution_str):\n    return {'score': None}\n"
    assert load(code).pay(rows("a")) == [None]


def test_a_reward_changes_no_row():
    own = [{**row, "meta": {"tags": ["a"]}} for row in rows("a", "b")]
    change = "    tags[0].append(1)\n    meta[1].clear()\n    return [0, 0]\n"
    trl = f"def reward(completions, tags, meta, **columns):\n{change}"
    verl = "def reward(solution_str, extra_info):\n    extra_info['x'] = 1\n    return 0\n"
    assert load(trl).pay(own) == [0.0, 0.0]
    own = [{**row, "meta": {**row["meta"], "extra_info": {}}} for row in own]
    load(verl).pay(own)
    assert [row["meta"] for row in own] == [{"tags": ["a"], "extra_info": {}}] * 2
