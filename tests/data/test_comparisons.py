"""When two texts ask the same question: by words and signs, whatever else differs."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.data.comparisons import count_words, fold, fold_as_text, question_key, words

ALIKE = [
    (
        "What is 2+2?",
        "what is 2 + 2",
        "WHAT  is\n2+2 !",
        "**What** is 2+2…",
        "Ｗｈａｔ is ２＋２？",
    ),
    ("It's a well-known state-of-the-art", "it’s a WELL known state of the art."),
    ("Café or tea", "Cafe\u0301 or tea?", "«Café», or tea"),
    ("日本語は、どう？", "日本語 は どう", "日 本 語 は ど う。"),
    ("カタカナ ＡＢＣ", "ｶﾀｶﾅ ABC"),
    ("Straße", "STRASSE"),
    ("zero\u200bwidth so\u00adft", "zerowidth soft"),
    ("1-1", "1 - 1", "1–1", "1 − 1"),
    ("2³", "2^3", "2 ^ 3"),
    ("# Title\n* one\n* two", "title: one, two"),
    ("COVID-19", "covid 19"),
    ("हिन्दी में?", "हिन्दी में"),
    ("and/or", "and or"),
]
DIFFERENT = [
    ("1+1", "1-1", "1*1", "1/1", "1^1", "1 1", "1=1", "1<1", "1>1"),
    ("Explain C", "Explain C++", "Explain C#"),
    ("5 degrees", "-5 degrees", "5% degrees", "$5 degrees", "€5 degrees", "5.5 degrees"),
    ("3²", "32", "3"),
    ("2½", "21/2", "2 12"),
    ("a = b", "a != b", "a b", "a - b"),
    ("🙂", "🙁", "?", "!", "...", "", "-", "+"),
    ("कि", "की"),
    ("cafe", "café"),
    ("resume", "re sume"),
    ("x < y", "x > y"),
]


@pytest.mark.parametrize("texts", ALIKE, ids=lambda texts: texts[0][:20])
def test_the_same_words_are_one_question(texts):
    assert len({fold(text) for text in texts}) == 1


@pytest.mark.parametrize("texts", DIFFERENT, ids=lambda texts: texts[0][:20])
def test_what_changes_the_meaning_stays(texts):
    for one, two in itertools.combinations(texts, 2):
        assert fold(one) != fold(two)


PLAIN = st.lists(
    st.text(st.sampled_from("abcdefghäéßжшあい日本12345"), min_size=2, max_size=8), min_size=1
)


@given(PLAIN, st.sampled_from([" ", "\n", ", ", "; ", " “", "”: ", " (", ") ", "... ", "?! ", "¿"]))
def test_punctuation_case_and_forms_of_characters_are_ignored(parts, between):
    text = " ".join(parts)
    other = unicodedata.normalize("NFD", between.join(parts).title() + "?")
    assert fold(other) == fold(text) != ""


@given(st.text())
def test_no_text_is_lost_and_spaces_at_the_ends_do_not_matter(text):
    folded = fold(text)
    assert bool(folded) == bool(fold(f" {text}\n")) and folded == fold(f" {text}\n")
    assert " ".join(folded.split()) == folded


def test_words_of_scripts_without_spaces_are_characters_and_count_half():
    assert words("日本語 and かな, C++") == ["日", "本", "語", "and", "か", "な", "C"]
    assert count_words("日本語 and かな") == 3.5
    assert count_words("one two, three") == 3 and count_words("") == count_words("+ ?") == 0


def test_a_key_is_of_its_folding():
    assert question_key("Why so?") == question_key("why, so")
    assert question_key("Why so?", "text") == question_key("WHY  so?", "text")
    assert question_key("Why so?", "text") != question_key("why, so", "text")
    assert fold_as_text(" Why,\tSO? ") == "why, so?"
