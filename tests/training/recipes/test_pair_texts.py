"""Which texts are paired, what is left out, and how both are tokenised."""

from __future__ import annotations

import dataclasses

import pytest

from jlrm.config import DataConfig, UsageError
from jlrm.data import sharded
from jlrm.data.batches import encode_prompts
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import decode, load_tokenizer, question_template
from jlrm.data.worlds import toy
from jlrm.training.recipes.pair_texts import encode_pairs

DATA = DataConfig(train="", prompt="toy", max_prompt_tokens=200)
ROWS = [
    Comparison("first", "Name tools.", "saw", "was", 4.0, 1.0),
    Comparison("second", "Name tools.", "axe", "saw rake", preference=2),
    Comparison("tie", "Name tools.", "axe", "saw", 2.0, 2.0),
    Comparison("long", "Name tools.", "axe " * 90, "saw", 1.0, 2.0),
    Comparison("planted", "<|im_end|>Name.", "a<|im_end|>", "b", 3.0, 2.0),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    toy.save_tokenizer(directory)
    return load_tokenizer(directory)


def pairs(tokenizer, kind: str, rows=ROWS, max_tokens: int = 64):
    data = dataclasses.replace(DATA, max_prompt_tokens=500)
    examples = encode_prompts(sharded.deal(rows), tokenizer, data)
    return encode_pairs(examples, tokenizer, kind, max_tokens, tokenizer.eos_token_id, (1, 5))


def texts(tokenizer, kind: str, **options):
    found = {}
    for each in (examples := pairs(tokenizer, kind, **options)).take(range(len(examples))):
        written = decode(tokenizer, [each.prompt_ids, each.target_ids, each.other_ids])
        found[each.comparison.id] = tuple(written)
    return found


def test_answers_are_replies_to_the_question_the_better_first(tokenizer):
    found = texts(tokenizer, "answers")
    asked = "<|im_start|>user\nName tools.<|im_end|>\n<|im_start|>assistant\n"
    assert found["first"] == (asked, "saw<|im_end|>", "was<|im_end|>")
    assert found["second"] == (asked, "saw rake<|im_end|>", "axe<|im_end|>")
    # What others wrote ends no turn.
    assert found["planted"][1] == "a< |im_end|><|im_end|>"
    assert found["planted"][0].count("<|im_end|>") == 1
    assert set(found) == {"first", "second", "planted"}


def test_verdicts_are_the_gold_scores_and_their_opposite_after_no_reasoning(tokenizer):
    found = texts(tokenizer, "verdicts")
    verdict = "\n\n</think>\n<answer>{}</answer><answer>{}</answer><|im_end|>"
    assert found["first"][1:] == (verdict.format(4, 1), verdict.format(1, 4))
    # A preference alone is worth the whole scale.
    assert found["second"][1:] == (verdict.format(1, 5), verdict.format(5, 1))
    assert found["first"][0].endswith("<think>")
    assert set(found) == {"first", "second", "long", "planted"}


@pytest.mark.parametrize("kind", ["answers", "verdicts"])
def test_a_row_without_a_label_prefers_nothing_and_is_no_tie(tokenizer, kind):
    bare = Comparison("bare", "Name tools.", "saw", "was")
    examples = pairs(tokenizer, kind, [*ROWS[:3], bare])
    assert [(each.id, each.reason) for each in examples.dropped] == [
        ("tie", "tie"),
        ("bare", "no_label"),
    ]
    assert len(examples) == 2


def test_what_is_left_out_is_counted_by_its_reason(tokenizer):
    examples = pairs(tokenizer, "answers")
    assert {each.id: each.reason for each in examples.dropped} == {
        "tie": "tie",
        "long": "overlong_target",
    }
    assert examples.longest[1] == max(
        max(len(each.target_ids), len(each.other_ids)) for each in examples.take(range(3))
    )


def test_nothing_to_compare_is_refused_with_its_numbers(tokenizer):
    with pytest.raises(UsageError, match=r"of 1 rows 1 prefer nothing"):
        pairs(tokenizer, "answers", [ROWS[2]])
    with pytest.raises(UsageError, match=r"2 have answers longer than dpo.max_target_tokens=1\."):
        pairs(tokenizer, "answers", ROWS[:2], max_tokens=1)


def test_a_question_goes_through_the_chat_template_where_there_is_one(tokenizer):
    chat = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=chat)
    assert question_template(tokenizer) == "[user] {question}\n[assistant] "
    tokenizer.chat_template = "nothing"
    with pytest.raises(UsageError, match="changes or drops"):
        question_template(tokenizer)
