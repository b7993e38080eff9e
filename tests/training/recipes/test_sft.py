"""How SFT presents its rows: swapped by chance, with references, and where the reasoning stands."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from jlrm.config import Config, DataConfig, ModelSource, RunConfig, SFTConfig, UsageError
from jlrm.data import batches, sharded
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import decode, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.judgement.verdict import parse
from jlrm.training.recipes.sft import presented

REVIEW = "Assistant 1 is right. The answer #2 misses ASSISTANT 12 and 2 words; Response 2 too."
ROW = Comparison(
    "row", "Name tools.", "saw", "was", 5.0, 2.0, meta={"reasoning": REVIEW, "reference": "saw axe"}
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    toy.save_tokenizer(directory)
    chat = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    (directory / "chat_template.jinja").write_text(chat)
    return load_tokenizer(directory)


def run_of(tokenizer, rows, prompt: str = "jlrm", **sft):
    """Return what `presented` looks at of a run."""
    data = DataConfig(train="", prompt=prompt, max_prompt_tokens=2000)
    source = ModelSource(preset="toy", tokenizer="toy")
    config = Config(RunConfig("r"), data, source, sft=SFTConfig(steps=1, **sft))
    train = batches.encode_prompts(sharded.deal(rows), tokenizer, data)
    parts = types.SimpleNamespace
    return parts(config=config, data=parts(train=train), policy=parts(tokenizer=tokenizer))


def rows(count: int) -> list[Comparison]:
    return [dataclasses.replace(ROW, id=str(i)) for i in range(count)]


def written(tokenizer, reasoning: str, row: Comparison = ROW) -> str:
    examples = run_of(tokenizer, [row], "toy").data.train
    found = batches.encode_targets(examples, tokenizer, 400, 0, (1, 5), reasoning)
    return decode(tokenizer, [found.take([0])[0].target_ids[:-1]])[0]


def test_a_mirrored_row_names_its_answers_by_their_new_places():
    row = ROW.mirrored()
    reasoning, judged = row.judgement
    assert reasoning == REVIEW.replace("Assistant 1 ", "Assistant 2 ").replace("#2", "#1").replace(
        "Response 2", "Response 1"
    )
    assert judged == (2.0, 5.0) == row.scores and row.label == 2
    assert row.mirrored().judgement[0] == REVIEW and row.reference == "saw axe"
    bare = dataclasses.replace(ROW, meta={})
    assert bare.mirrored() == bare.swapped()


def test_gold_of_a_preference_alone_is_the_whole_scale():
    for preference, gold in {1: (5, 1), 2: (1, 5), 0: (3, 3)}.items():
        row = Comparison("r", "q", "a", "b", preference=preference)
        assert row.gold((1, 5)) == gold
    assert ROW.gold((1, 10)) == (5.0, 2.0)


def test_a_share_of_rows_is_swapped_always_the_same_ones(tokenizer):
    ids = [row.id for row in rows(200)]
    halves = [
        [row.is_swapped for row in presented(run_of(tokenizer, rows(200), swap=0.3)).rows.mine]
        for _ in range(2)
    ]
    assert halves[0] == halves[1] and len(ids) == 200
    assert 0.15 < np.mean(halves[0]) < 0.45
    assert not any(row.is_swapped for row in presented(run_of(tokenizer, rows(9))).rows.mine)


def test_a_share_of_rows_shows_its_reference_and_others_have_none_to_show(tokenizer):
    given = [*rows(60), dataclasses.replace(ROW, id="bare", meta={})]
    examples = presented(run_of(tokenizer, given, reference=0.5))
    shown = {
        each.comparison.id: "[Reference Answer]\nsaw axe\n" in each.prompt
        for each in examples.take(range(len(examples)))
    }
    assert list(shown) == [row.id for row in given]
    assert 0.2 < np.mean(list(shown.values())) < 0.8 and not shown["bare"]
    of_judgelm = dataclasses.replace(ROW, meta={"reference": {"text": "from an object"}})
    assert of_judgelm.reference == "from an object"


def test_reasoning_stands_before_the_scores_after_them_or_nowhere(tokenizer):
    scores = "</think>\n<answer>5</answer><answer>2</answer>"
    assert written(tokenizer, "before") == f"\n{REVIEW}\n{scores}"
    assert written(tokenizer, "after") == f"\n\n{scores}\n{REVIEW}"
    bare = dataclasses.replace(ROW, meta={}, score_1=None, score_2=None, preference=2)
    assert written(tokenizer, "none", bare) == "\n\n" + scores.replace("5", "0").replace(
        "2", "5"
    ).replace("0", "1")
    for place in ("before", "after", "none"):
        assert parse(written(tokenizer, place)).status == "ok"
    with pytest.raises(UsageError, match=r"Set sft\.reasoning=none"):
        written(tokenizer, "after", bare)


def test_without_a_label_only_a_judgement_with_its_own_scores_is_imitated(tokenizer):
    nothing = {"score_1": None, "score_2": None, "preference": None}
    judged = dataclasses.replace(ROW, **nothing, meta={"reasoning": "Why.", "judged": [2, 4]})
    assert written(tokenizer, "before", judged).endswith("<answer>2</answer><answer>4</answer>")
    with pytest.raises(UsageError, match=r"none of 1 rows has a written judgement"):
        written(tokenizer, "before", dataclasses.replace(ROW, **nothing))
    with pytest.raises(UsageError, match=r"none of 1 rows has a label\. Set sft\.steps=0"):
        written(tokenizer, "none", judged)


def test_a_judgement_of_one_answer_stands_alone(tokenizer):
    texts = {"reasoning": ["First.", "Second."], "judged": [4, 3]}
    row = dataclasses.replace(ROW, meta=texts)
    both = [row, row.swapped()]
    assert [each.judgement_of_one for each in both] == [("First.", (4,)), ("Second.", (3,))]
    assert row.judgement is None and row.swapped().swapped() == row
    assert ROW.judgement_of_one is None and "reasoning" not in ROW.swapped().meta
    alone = DataConfig(train="", prompt="toy", max_prompt_tokens=99, judging="single")
    examples = batches.encode_prompts(sharded.deal(both), tokenizer, alone)
    assert ["was" in each.prompt for each in examples.take([0, 1])] == [False, True]
    for place, wanted in (
        (
            "before",
            ["\nFirst.\n</think>\n<answer>4</answer>", "\nSecond.\n</think>\n<answer>3</answer>"],
        ),
        ("none", ["\n\n</think>\n<answer>5</answer>", "\n\n</think>\n<answer>2</answer>"]),
    ):
        found = batches.encode_targets(examples, tokenizer, 400, 0, (1, 5), place, alone)
        assert decode(tokenizer, [e.target_ids[:-1] for e in found.take([0, 1])]) == wanted
    plain = batches.encode_prompts(sharded.deal([ROW]), tokenizer, alone)
    with pytest.raises(UsageError, match="a list of two texts `reasoning`"):
        batches.encode_targets(plain, tokenizer, 400, 0, (1, 5), "before", alone)


def test_a_rubric_is_written_before_the_judgement(tokenizer):
    row = dataclasses.replace(ROW, meta={**ROW.meta, "rubric": "Right words.</rubric>"})
    data = DataConfig(train="", prompt="toy_rubric", max_prompt_tokens=99)
    examples = batches.encode_prompts(sharded.deal([row, ROW]), tokenizer, data)
    found = batches.encode_targets(examples, tokenizer, 400, 0, (1, 5), "before", data)
    assert [each.reason for each in found.dropped] == ["no_judgement"]  # it has no rubric
    (example,) = found.take([0])
    (text,) = decode(tokenizer, [example.target_ids[:-1]])
    wanted = "\nRight words.< /rubric>\n</rubric>\n<think>\n"
    assert text.startswith(wanted + REVIEW) and example.prompt.endswith("<rubric>")
    verdict = parse(text, has_rubric=True)
    assert verdict.scores == (5, 2) and verdict.reasoning == REVIEW
    bare = batches.encode_prompts(sharded.deal([ROW]), tokenizer, data)
    with pytest.raises(UsageError, match="a text `rubric`, and a text `reasoning`"):
        batches.encode_targets(bare, tokenizer, 400, 0, (1, 5), "before", data)
    chat = dataclasses.replace(data, prompt="jlrm_rubric", max_prompt_tokens=2000)
    (asked,) = batches.encode_prompts(sharded.deal([row]), tokenizer, chat).take([0])
    assert asked.prompt.endswith("[assistant] <rubric>\n") and "<think>\n" not in asked.prompt
    targets = batches.encode_targets(
        batches.encode_prompts(sharded.deal([row]), tokenizer, chat),
        tokenizer,
        400,
        0,
        (1, 5),
        data=chat,
    )
    (text,) = decode(tokenizer, [targets.take([0])[0].target_ids[:-1]])
    assert text.startswith("Right words.")  # the prompt has the line break already
