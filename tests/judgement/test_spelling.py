"""What reads the same is the same: characters of other widths, scripts and without width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.judgement.spelling import ZERO_WIDTH, in_brackets, plain, without_end_tokens

TOKENS = frozenset({"</answer>", "<think>", "<|im_end|>", "plain", "<>"})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\uff21\uff10\uff1c\uff0f\uff1e\uff5e", "A0</>~"),
        ("a\u3000b", "a b"),
        ("8\u204410", "8/10"),
        ("\u0667 \u096f \U0001d7d8", "7 9 0"),
        ("a\u200bn\ufeffs", "ans"),
        ("\u00e9\u4e03\u2167", "\u00e9\u4e03\u2167"),  # no decimal digits, and of no other width
        ("plain <b> 1/2", "plain <b> 1/2"),
    ],
)
def test_what_reads_the_same_is_written_in_ascii(text: str, wanted: str) -> None:
    assert plain(text) == wanted
    assert plain(wanted) == wanted


@given(st.text("ab<>/ \uff41\u0661" + ZERO_WIDTH, max_size=30))
def test_plain_text_is_plain(text: str) -> None:
    assert plain(plain(text)) == plain(text)
    assert not set(plain(text)) & set(ZERO_WIDTH)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a</answer>b", "a[/answer]b"),
        ("<THINK>", "[think]"),
        ("< | im_end |\n>", "[|im_end|]"),
        ("\\<think\\>", "[think]"),
        ("&lt;think&gt", "[think]"),
        ("&amp;amp;#0060;think&#x3E;", "[think]"),
        ("\u3008\uff54hin\u212a\u3009", "[think]"),
        ("</\u0430n\u0301swer>", "[/answer]"),
        ("<think>" * 3, "[think]" * 3),
        ("<thinks> <thin> think> <think", "<thinks> <thin> think> <think"),
        ("plain <> <answer>", "plain <> <answer>"),  # neither is a control text in brackets
    ],
)
def test_control_texts_lose_their_brackets_in_any_spelling(text: str, wanted: str) -> None:
    assert in_brackets(text, TOKENS) == wanted


def test_the_longest_name_is_taken() -> None:
    assert in_brackets("<ab> <a>", frozenset({"<a>", "<ab>"})) == "[ab] [a]"


@pytest.mark.parametrize(
    "text",
    ["x<|im_end|>", "x <|im_end|><|endoftext|>\n", "x</s>", "x\0 \n", "x <\uff5ceot\uff5c> "],
)
def test_what_ends_a_sequence_is_no_text(text: str) -> None:
    assert without_end_tokens(text) == "x"


def test_what_only_looks_like_an_end_stays() -> None:
    assert without_end_tokens("x <b>") == "x <b>"
    assert without_end_tokens("<|im_end|> x") == "<|im_end|> x"
    many = "x" + "</s>" * 17
    assert without_end_tokens(many) == "x</s>"


@pytest.mark.parametrize("mark", ["!", "~", "a"])
def test_every_character_of_a_name_is_found_in_full_width(mark: str) -> None:
    wide = chr(ord(mark) + 0xFEE0)
    assert in_brackets(f"\uff1c{wide}\uff1e", frozenset({f"<{mark}>"})) == f"[{mark}]"
