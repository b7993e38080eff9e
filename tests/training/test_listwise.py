"""Judgements of lists: paid, counted and imitated by the pairs that their answers make."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from jlrm.config import DataConfig, RewardConfig, SamplingConfig, UsageError
from jlrm.data import batches, sharded
from jlrm.data.batches import Example
from jlrm.data.comparisons import AnswerList
from jlrm.data.tokenizer import decode, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.judgement.verdict import parse
from jlrm.training import setup
from jlrm.training.heldout import list_figures
from jlrm.training.scoring import judge_responses, metrics

SCORED = AnswerList("s", "Name tools.", "axe saw", "was", rest=("saw",), golds=(3.0, 1.0, 2.0))
RANKED = AnswerList(
    "r", "Name tools.", "a", "b", rest=("c", "d"), golds=(-1, -2, None, -2), is_ranked=True
)


def response(*scores: float) -> str:
    return "why</think>" + "".join(f"<answer>{score}</answer>" for score in scores)


def judged(rows, texts):
    examples = [Example(row, "prompt", [1]) for row in rows]
    return examples, judge_responses(RewardConfig(), [], examples, texts, [[1]] * len(rows), 8)


def test_a_list_is_paid_by_the_share_of_its_pairs_that_gold_agrees_with():
    texts = [response(3, 1, 2), response(1, 3, 2), response(3, 1), response(9, 4, 5, 4)]
    _, judgements = judged([SCORED, SCORED, SCORED, RANKED], texts)
    right, wrong, short, ranked = judgements
    assert [each.is_right for each in judgements] == [1.0, 0.0, 0.0, 1.0]
    assert (right.terms["relation"], right.terms["absolute"]) == (2.0, 1.0)
    assert wrong.terms["relation"] == -1.5 and short.verdict.status == "too_few_answers"
    assert short.reward == RewardConfig().malformed
    assert ranked.terms["preference"] == 2.0 and ranked.terms["relation"] is None
    assert ranked.table_row()["verdict"] == [9, 4, 5, 4]
    (half,) = judged([SCORED], [response(3, 2, 2)])[1]
    assert half.is_right == pytest.approx(2 / 3)
    assert half.terms["relation"] == pytest.approx((2 * 2.0 - 1.5) / 3)
    means = metrics(judgements, np.ones(4), np.ones(4, bool))
    assert means["judge/agreement"] == 50.0 and means["judge/parse_rate"] == 75.0


def test_held_out_lists_count_pair_by_pair_in_both_orders():
    rows = [SCORED, RANKED]
    both = [*rows, *(row.swapped() for row in rows)]
    # Right in the reverse order alone.
    texts = [response(1, 2, 1.5), response(4, 5, 1, 4.5), response(2, 1, 3), response(4, 1, 4, 5)]
    examples, judgements = judged(both, texts)
    found = list_figures(examples, judgements)
    rights = [each.is_right for each in judgements]
    assert rights[2:] == [1.0, 1.0]
    assert found["agreement"] == pytest.approx(100 * np.mean(rights[:2]))
    assert found["pairs"] == 2 and found["parse_rate"] == 100.0
    assert found["reward"] == pytest.approx(np.mean([each.reward for each in judgements]))
    turned = [response(2, 1, 1.5), response(5, 4, 1, 4), *texts[2:]]
    same = list_figures(*judged(both, turned))
    assert same["swap_consistency"] == 100 and found["swap_consistency"] < 100
    lost = list_figures(*judged(both, ["none", *turned[1:]]))
    assert lost["parse_rate"] == 75.0 and lost["swap_consistency"] == 50.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    toy.save_tokenizer(directory)
    return load_tokenizer(directory)


def test_lists_of_any_length_are_shown_and_imitated(tokenizer):
    data = DataConfig(train="", prompt="toy", max_prompt_tokens=99, judging="lists")
    written = dataclasses.replace(SCORED, meta={"reasoning": "Why.", "judged": [4, 1, 1]})
    examples = batches.encode_prompts(sharded.deal([written, RANKED]), tokenizer, data)
    scored, ranked = (each.prompt for each in examples.take([0, 1]))
    assert "1: axe saw\n2: was\n3: saw<|im_end|>" in scored and "4: d<|im_end|>" in ranked
    found = batches.encode_targets(examples, tokenizer, 99, 0, (1, 10), data=data)
    assert [each.reason for each in found.dropped] == ["no_judgement"]
    (text,) = decode(tokenizer, [found.take([0])[0].target_ids[:-1]])
    verdict = parse(text, num_scores=3)
    assert (verdict.reasoning, *verdict.scores, *verdict.rest) == ("Why.", 4, 1, 1)
    labels = batches.encode_targets(examples, tokenizer, 99, 0, (1, 10), "none", data)
    assert len(labels) == 1  # one of the ranked answers has no place
    (text,) = decode(tokenizer, [labels.take([0])[0].target_ids[:-1]])
    assert text.endswith("<answer>3</answer><answer>1</answer><answer>2</answer>")
    paper = dataclasses.replace(data, prompt="judgelrm_train", max_prompt_tokens=2000)
    with pytest.raises(UsageError, match="'judgelrm_train' has no form for 3 answers: take jlrm"):
        batches.encode_prompts(sharded.deal([SCORED]), tokenizer, paper)


@pytest.mark.parametrize("count", [2, 3, 4, None])
def test_no_judgement_is_ended_before_its_last_score(count):
    data = DataConfig(train="", judging="lists")
    stops = {} if count is None else {"</answer>": count}
    config = types.SimpleNamespace(data=data, sampling=SamplingConfig(stop_strings=stops))
    rows = [types.SimpleNamespace(rows=sharded.deal([each])) for each in (SCORED, RANKED)]
    opened = types.SimpleNamespace(train=rows[0], heldout=rows[1])
    if count in (2, 3):
        with pytest.raises(UsageError, match=rf"after {count} .*Set sampling.stop_strings=.*: 4}}"):
            setup.check_stop(config, opened)
    else:
        setup.check_stop(config, opened)
