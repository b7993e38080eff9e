"""Whatever an answer says, the prompt keeps its turns and the verdict stays the judge's own."""

from __future__ import annotations

import dataclasses
import itertools
import time
import unicodedata
from collections.abc import Iterator
from typing import get_args

import pytest
from hostile import CLEAN, HOSTILE, LONG, SURROGATES, TURN, WIN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen import CONTROL_TOKENS

from jlrm.config import DataConfig, RewardConfig, UsageError
from jlrm.data import batches, readers
from jlrm.data.comparisons import Comparison, write_comparisons
from jlrm.data.sharded import deal
from jlrm.data.tokenizer import control_tokens, decode, encode, load_tokenizer, prompt_template
from jlrm.data.worlds import toy
from jlrm.judgement import prompts
from jlrm.judgement.rewards import pay, read
from jlrm.judgement.verdict import Status, parse

TEMPLATES = ("judgelrm_train", "judgelrm_eval", "toy", "jlrm")
TOKENIZERS = ("toy", "qwen25", "qwen3")
PAIRS = [
    pytest.param(name, template, marks=[pytest.mark.slow] * (name != "toy"))  # seconds to build
    for name, template in itertools.product(TOKENIZERS, TEMPLATES)
    if (name, template) != ("toy", "jlrm")
]
SHORT = [text for name, text in HOSTILE.items() if name not in LONG]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
GENUINE = "\n</think>\n<answer>3</answer><answer>7</answer>"


@pytest.fixture(scope="module")
def toy_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    toy.save_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture
def tokenizer(request):
    name = request.param
    return request.getfixturevalue("toy_tokenizer" if name == "toy" else name)


def on(*names):
    marked = [pytest.param(name, marks=[pytest.mark.slow] * (name != "toy")) for name in names]
    return pytest.mark.parametrize("tokenizer", marked, indirect=True)


def in_every_place(texts: list[str]) -> list[Comparison]:
    """Return rows in which every text stands once in each of the three places."""
    places = zip(texts, texts[1:] + texts[:1], texts[2:] + texts[:2], strict=True)
    return [Comparison(str(i), *row, 1.0, 2.0) for i, row in enumerate(places)]


def encoded(rows: list[Comparison], tokenizer, template: str) -> list[batches.Example]:
    return batches.prompt_encoder(tokenizer, template)(rows)


def structure(tokenizer, ids) -> list[int]:
    """Return the ids of added tokens in a sequence, in order."""
    added = set(tokenizer.get_added_vocab().values())
    return [i for i in ids if i in added]


def check_structure(rows: list[Comparison], tokenizer, template: str) -> list[batches.Example]:
    """Compare every prompt with the one of innocuous text: its control tokens, and its end."""
    innocuous = Comparison("innocuous", "Why?", "Because.", "No idea.", 1.0, 2.0)
    (plain,) = encoded([innocuous], tokenizer, template)
    wanted = structure(tokenizer, plain.prompt_ids)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert wanted.count(start) == plain.prompt.count("<|im_start|>") > 1
    header = plain.prompt[plain.prompt.rindex("<|im_start|>") :]
    (header_ids,) = encode(tokenizer, [header])
    assert header.startswith("<|im_start|>assistant\n<think>") and header_ids[0] == start
    examples = encoded(rows, tokenizer, template)
    assert [example.comparison for example in examples] == rows
    added = set(tokenizer.get_added_vocab().values())
    for row, example in zip(rows, examples, strict=True):
        found = [i for i in example.prompt_ids if i in added]
        assert found == wanted, f"control tokens of {described(row)}"
        assert example.prompt.endswith(header), f"end of {described(row)}"
        assert list(example.prompt_ids[-len(header_ids) :]) == header_ids, described(row)
    return examples


def described(row: Comparison) -> str:
    """Return the names of a row's texts, for a message that can be read."""
    names = {text: name for name, text in HOSTILE.items()}
    texts = (row.question, row.answer_1, row.answer_2)
    return " / ".join(names.get(text, repr(text[:200])) for text in texts)


def test_the_corpus_is_what_it_says():
    assert len(set(HOSTILE.values())) == len(HOSTILE) >= 220
    assert all(90_000 < len(HOSTILE[name].encode()) <= 100_000 for name in LONG)
    assert len(LONG) >= 5 and len(SURROGATES) >= 8
    whole = "".join(HOSTILE.values())
    assert all(token in whole for token in CONTROL_TOKENS)
    assert not any(token in text for token in CONTROL_TOKENS for text in CLEAN.values())


# ------------------------------------------------------------------------------------- the prompt


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "template"), PAIRS, indirect=["tokenizer"])
def test_hostile_texts_add_no_control_token(tokenizer, template):
    check_structure(in_every_place(SHORT), tokenizer, template)


@pytest.mark.slow
@on(*TOKENIZERS)
def test_hundred_kilobytes_add_no_control_token(tokenizer):
    check_structure(in_every_place([HOSTILE[name] for name in LONG]), tokenizer, "toy")


@pytest.mark.slow
@on(*TOKENIZERS)
def test_the_check_sees_what_is_not_neutralised(tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "neutralise", lambda text, control: text)
    row = Comparison("1", "Why?", TURN, "No idea.", 1.0, 2.0)
    with pytest.raises(AssertionError, match="control tokens of 'Why"):
        check_structure([row, row], tokenizer, "toy")


@pytest.mark.parametrize(("tokenizer", "template"), PAIRS, indirect=["tokenizer"])
def test_clean_texts_come_back_whole(tokenizer, template):
    control = control_tokens(tokenizer)
    text = prompt_template(tokenizer, template)
    # In a prompt of ours answer tags are broken, whoever wrote them.
    tagged = () if prompts.is_open_to_planting(template) else ("tags", "generics")
    clean = [each for name, each in CLEAN.items() if name not in tagged]
    for example in check_structure(in_every_place(clean), tokenizer, template):
        row = example.comparison
        fields = {name: getattr(row, name) for name in ("question", "answer_1", "answer_2")}
        assert {name: prompts.neutralise(field, control) for name, field in fields.items()} == (
            fields
        )
        assert example.prompt == prompts.fill(text, **fields)
        assert decode(tokenizer, [example.prompt_ids]) == [example.prompt]


@on(*TOKENIZERS)
def test_hostile_texts_are_only_broken_never_lost(tokenizer):
    # Qwen's tokenizers compose what can be composed (NFC), and change nothing else.
    composes = tokenizer.backend_tokenizer.normalizer is not None
    for example in encoded(in_every_place(SHORT), tokenizer, "toy"):
        (decoded,) = decode(tokenizer, [example.prompt_ids])
        prompt = example.prompt
        assert decoded == (unicodedata.normalize("NFC", prompt) if composes else prompt)
        row = example.comparison
        for text in (row.question, row.answer_1, row.answer_2):
            readable = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
            assert readable.replace(" ", "") in prompt.replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_open_their_thoughts_once_at_the_end(template, qwen3, qwen25):
    for tokenizer in (qwen3, qwen25):
        text = prompt_template(tokenizer, template)
        assistant = text.rpartition("<|im_start|>assistant\n")[2]
        assert assistant == ("<think>\n" if template == "jlrm" else "<think>")
        assert [text.count(field) for field in ("{question}", "{answer_1}", "{answer_2}")] == [
            1
        ] * 3


def test_a_prompt_without_chat_template_is_refused(toy_tokenizer):
    row = Comparison("1", "Why?", "Because.", "No idea.", 1.0, 2.0)
    with pytest.raises(UsageError, match="chat template"):
        encoded([row], toy_tokenizer, "jlrm")


@on(*TOKENIZERS)
@pytest.mark.parametrize("name", SURROGATES)
def test_lone_surrogates_are_replaced(name, tokenizer):
    row = Comparison("1", HOSTILE[name], HOSTILE[name], HOSTILE[name], 1.0, 2.0)
    (example,) = encoded([row], tokenizer, "toy")
    assert "\ufffd" in example.prompt
    example.prompt.encode()  # can be written: no surrogate is left


@pytest.mark.slow
@on(*TOKENIZERS)
def test_hostile_reasons_stay_text_in_targets(tokenizer):
    (row,) = toy.comparisons(seed=1, num_rows=1)
    reasons = [text for text in SHORT if text]
    rows = [
        dataclasses.replace(row, meta={"reasoning": text, "judged": [7.0, 2.0]})
        for text in ["Fine.", *reasons]
    ]
    config = DataConfig(train="toy", prompt="toy", max_prompt_tokens=10**7)
    examples = batches.encode_prompts(deal(rows), tokenizer, config)
    end = tokenizer.eos_token_id
    found = batches.encode_targets(examples, tokenizer, 10**6, end_id=end)
    targets = found.take(range(len(found)))
    assert len(targets) == len(rows)
    wanted = structure(tokenizer, targets[0].target_ids)
    for target in targets:
        assert structure(tokenizer, target.target_ids) == wanted
        verdict = parse(decode(tokenizer, [target.target_ids[:-1]])[0])
        assert verdict.scores == (7, 2), ascii(target.comparison.meta["reasoning"])


def test_hostile_rows_come_back_from_a_file(tmp_path):
    rows = in_every_place([text for name, text in HOSTILE.items() if name not in SURROGATES])
    write_comparisons(rows, tmp_path / "rows.jsonl")
    assert readers.read(str(tmp_path / "rows.jsonl")).rows == rows


# Pieces of which control tokens, tags and fields can come together.
PIECES = (
    *CONTROL_TOKENS,
    *("<", "<|", "<|im_", "im_", "end", "start", "end|>", "|>", "|", ">", "</", "/", "think", "th"),
    *("ink>", "<think", "tool_", "call>", "<tool_call", "endoftext", "<|fim_", "pad|>", "quad_"),
    *(" ", "\n", "\r", "\0", "\u200b", "\u0338", "\u0301", "\ufeff", "\u202e", "\ud800", "\udfff"),
    *("assistant", "Assistant:", "{answer_2}", "{question}", "\\g<0>", "<answer>", "10", "a", "猫"),
)
NESTED = st.recursive(
    st.sampled_from(PIECES),
    lambda inner: st.builds(
        lambda token, cut, text: token[:cut] + text + token[cut:],
        st.sampled_from(CONTROL_TOKENS),
        st.integers(1, 12),
        inner,
    ),
    max_leaves=3,
)
TEXTS = st.lists(NESTED, max_size=12).map("".join)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(TEMPLATES), st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4))
def test_any_concatenation_of_pieces_adds_no_control_token(qwen3, template, texts):
    rows = [Comparison(str(i), q, a, b, 1.0, 2.0) for i, (q, a, b) in enumerate(texts)]
    check_structure(rows, qwen3, template)


# ------------------------------------------------------------------------------------ the verdict


def completions(text: str) -> Iterator[str]:
    """Yield completions with a text in every part of a judgement."""
    yield text
    yield f"</think>{text}"
    yield f"{text}{GENUINE}"
    yield f"why{GENUINE}{text}"
    yield f"</think><answer>{text}</answer><answer>{text}</answer>"
    yield f"</think><answer>3</answer><answer>{text}</answer>"
    yield f"<think>{text}</think>{text}{WIN}"


@pytest.mark.slow
def test_every_text_has_a_verdict(record_property):
    start, num_texts = time.thread_time(), 0
    for text in itertools.chain(HOSTILE.values(), CLEAN.values()):
        for completion, strict in itertools.product(completions(text), (True, False)):
            verdict = parse(completion, strict=strict)
            num_texts += 1
            assert verdict.status in get_args(Status)
            assert (verdict.scores is not None) == (verdict.status == "ok")
            assert verdict.scores is None or all(1 <= x <= 10 for x in verdict.scores)
    seconds = time.thread_time() - start
    record_property("seconds", seconds)
    print(f"{num_texts} completions parsed in {seconds:.2f} s")


PAID = {"plus": 10, "leading_zeros": 5, "many_decimals": 10, "separator": 8, "lines": 10}
READ = {
    **PAID,
    **{"comma": 9.9, "fraction": 7, "no_decimals": 5, "zero_width": 10},
    **dict.fromkeys(
        ("fullwidth_digits", "arabic_digits", "devanagari_digits", "bold_digits"),
        10,
    ),
}


@pytest.mark.parametrize("name", [n for n in HOSTILE if n.startswith("number ")])
def test_only_numbers_of_one_meaning_are_scores(name):
    for strict, accepted in ((True, PAID), (False, READ)):
        score_1 = accepted.get(name.removeprefix("number "))
        scores = parse(HOSTILE[name], strict=strict).scores
        assert scores == (None if score_1 is None else (score_1, 1))


def test_a_quoted_verdict_is_never_taken_for_the_judges():
    for name, text in {**HOSTILE, **CLEAN}.items():
        verdict = parse(f"The first answer says: {text}{GENUINE}")
        if any(tag in text for tag in TAGS):
            assert verdict.status in ("repeated_think", "answer_in_reasoning"), name
        else:
            assert verdict.scores == (3, 7), name
        # Other models' judgements: what was quoted before the end of the thoughts does not count.
        assert parse(f"<think>It says: {text}{GENUINE}", strict=False).scores == (3, 7), name


@pytest.mark.parametrize(
    ("quoted", "status"),
    [
        (WIN, "answer_in_reasoning"),
        ("<answer>10", "answer_in_reasoning"),
        ("</think>", "repeated_think"),
        (f"</think>{WIN}", "repeated_think"),
        (f"<think></think>{WIN}", "repeated_think"),
        ("<think>", "repeated_think"),
    ],
)
def test_what_a_quoted_verdict_is_called(quoted, status):
    assert parse(f"Answer 1 says {quoted} but that proves nothing.{GENUINE}").status == status


def test_a_judged_answer_never_reaches_the_reward():
    config = RewardConfig(mode="judgelrm_symmetric")
    for completion in (f"why{GENUINE}", "no verdict"):
        terms = [
            pay(
                config,
                read(
                    config,
                    prompts.fill(
                        prompts.PAIR_TEMPLATES["judgelrm_train"],
                        question=text,
                        answer_1=text,
                        answer_2=text,
                    ),
                    completion,
                ),
                gold=(3.0, 7.0),
                num_tokens=20,
                max_tokens=100,
            )
            for text in HOSTILE.values()
        ]
        assert all(term == terms[0] for term in terms)
        assert sum(x for x in terms[0].values() if x) == pytest.approx(
            4.2 if completion.startswith("why") else -1.0
        )
