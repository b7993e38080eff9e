"""What counts as contaminated: the share of n-grams, its bounds, and the source that is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.config import UsageError
from jlrm.data.comparisons import fold
from jlrm.data.contamination import Benchmarks, _ngrams, read_benchmarks, warn_of_benchmark
from jlrm.evaluation.benchmarks.registry import BENCHMARKS

CLEAN = ("", "")


def words(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def benchmarks(num_words: int = 3, **sources: str) -> Benchmarks:
    """Return the questions of sources, by name; the first that has an n-gram keeps it."""
    ngrams: dict[str, str] = {}
    for source, text in sources.items():
        for ngram in _ngrams(text, num_words):
            ngrams.setdefault(ngram, source)
    return Benchmarks({text: name for name, text in sources.items()}, ngrams, num_words)


@pytest.mark.parametrize(
    ("num_words", "count"), [(1, 5), (2, 4), (3, 3), (4, 2), (5, 1), (6, 0), (7, 0)]
)
def test_ngrams_are_all_runs_of_so_many_words(num_words, count):
    ngrams = _ngrams("a, b; c d-e", num_words)
    assert len(ngrams) == count
    assert ngrams == [" ".join("abcde"[i : i + num_words]) for i in range(count)]


def test_characters_of_scripts_without_spaces_are_words():
    assert _ngrams("日本語 and かな", 1) == ["日", "本", "語", "and", "か", "な"]


@pytest.mark.parametrize(
    ("overlap", "is_contaminated"), [(0.5, True), (0.501, False), (0.499, True), (1.0, False)]
)
def test_the_share_of_ngrams_may_reach_the_bound(overlap, is_contaminated):
    """Six n-grams, of which the benchmark has three: exactly one half."""
    known = benchmarks(b=words(0, 5))
    question = f"{words(0, 5)} x y z"
    wanted = ("contaminated_ngram", "b") if is_contaminated else CLEAN
    assert known.find([question], overlap) == [wanted]


def test_all_ngrams_shared_reach_an_overlap_of_one():
    assert benchmarks(b=words(0, 9)).find([words(2, 7)], 1.0) == [("contaminated_ngram", "b")]


def test_nothing_shared_is_clean_at_any_overlap():
    assert benchmarks(b=words(0, 9)).find([words(20, 29), "short"], 0.0) == [CLEAN, CLEAN]


def test_a_question_shorter_than_an_ngram_is_compared_as_a_whole():
    known = benchmarks(b="why not")
    assert known.find(["Why  NOT", "why"], 0.1) == [("contaminated_exact", "b"), CLEAN]


def test_the_source_with_most_of_the_ngrams_is_named():
    known = benchmarks(few=words(0, 4), many=words(10, 16))
    assert known.find([f"{words(0, 4)} {words(10, 16)}"], 0.1)[0] == ("contaminated_ngram", "many")
    assert known.find([f"{words(10, 16)} {words(0, 4)}"], 0.1)[0] == ("contaminated_ngram", "many")


@given(st.lists(st.sampled_from(["a b c d", "a b c x", "p q r s", ""]), max_size=6))
def test_each_question_has_its_own_answer_in_order(questions):
    known = benchmarks(b="a b c d")
    alone = {"a b c d": ("contaminated_exact", "b"), "a b c x": ("contaminated_ngram", "b")}
    assert known.find(questions, 0.5) == [alone.get(each, CLEAN) for each in questions]


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_questions_are_read_from_any_of_the_known_fields(tmp_path):
    chat = [{"role": "system", "content": "no"}, {"role": "user", "content": "In a chat?"}]
    rows = [
        {"question": "One?", "prompt": "not this"},
        {"question_body": "Two?"},
        {"prompt": "Three?"},
        {"instruction": "Four", "input": "five?"},
        {"instruction": "Six?"},
        {"prompt": chat},
    ]
    known = read_benchmarks([write(tmp_path / "b.jsonl", rows)], 2)
    assert set(known.questions) == {"one", "two", "three", "four five", "six", "in a chat"}
    assert known.num_words == 2 and set(known.ngrams) == {"four five", "in a", "a chat"}


def test_the_first_source_of_a_question_is_kept_and_lacking_rows_are_counted(tmp_path, caplog):
    first = write(tmp_path / "a.jsonl", [{"question": "One two?"}, {"other": 1}, {"question": ""}])
    second = write(tmp_path / "b.jsonl", [{"question": "one TWO?"}])
    known = read_benchmarks([first, second], 2)
    assert known.questions == {"one two": first} and known.ngrams == {"one two": first}
    (message,) = [record.getMessage() for record in caplog.records if "have no" in record.message]
    assert message == f"{first}: 2 of 3 rows have no question"


def test_a_source_without_questions_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no question texts"):
        read_benchmarks([write(tmp_path / "a.jsonl", [{"other": 1}])], 2)


# A whole question within more text

SHEEP = "how many sheep does the farmer have"


@pytest.mark.parametrize(
    ("question", "is_found"),
    [
        (f"Answer briefly. {SHEEP.upper()}?! Think, {words(0, 60)}", True),
        (f"{words(0, 60)} **How** many sheep -- does the “farmer” have", True),
        ("How many sheep does the farmer's wife have?", False),  # the words must follow each other
        ("How many sheep does the farmer", False),
        ("have how many sheep does the farmer", False),
        ("many sheep does the farmer have", False),
    ],
)
def test_a_short_question_is_found_whole_inside_a_longer_one(question, is_found):
    """Seven words, of which no n-gram of 13 can be made."""
    known = benchmarks(13, b=SHEEP)
    wanted = ("contaminated_whole", "b") if is_found else CLEAN
    assert known.find([question], 0.5) == [wanted]


def test_the_longest_of_questions_with_one_opening_are_told_apart():
    known = benchmarks(13, short=SHEEP, long=f"{SHEEP} today")
    assert known.find([f"so {SHEEP} now"], 0.5) == [("contaminated_whole", "short")]
    only_long = benchmarks(13, long=f"{SHEEP} today")
    assert only_long.find([f"so {SHEEP} now"], 0.5) == [CLEAN]


def test_a_question_of_few_words_is_not_looked_for_inside_others():
    known = benchmarks(13, b="who are you", c="write a poem about love", d="今天天气怎么样")
    others = ["Say: who are you now?", "Write a poem about love and war", "请问今天天气怎么样呢"]
    assert known.find(others, 0.5) == [CLEAN] * 3
    assert known.find(["Who are you?!"], 0.5) == [("contaminated_exact", "b")]


def test_characters_of_scripts_without_spaces_count_half():
    sheep = "农 夫 有 十 七 只 羊 还 剩 几 只 羊"  # twelve
    assert benchmarks(13, b=sheep).find(["请问：农夫有十七只羊，还剩几只羊？谢谢"], 0.5) == [
        ("contaminated_whole", "b")
    ]
    assert benchmarks(13, b=sheep[:-2]).find(["请问：农夫有十七只羊，还剩几只？"], 0.5) == [CLEAN]


def test_signs_tell_a_whole_question_from_another():
    known = benchmarks(13, b="tell me what is 12 + 3")
    found = known.find(["Hi! Tell me: what is 12+3?", "Hi! Tell me: what is 12-3?"], 0.5)
    assert found == [("contaminated_whole", "b"), CLEAN]


def test_short_questions_are_compared_by_words(tmp_path):
    known = read_benchmarks([write(tmp_path / "b.jsonl", [{"question": "Why, “so”?"}])], 13)
    asked = ["why so", "WHY: so!", "ｗｈｙ　ｓｏ", "why not so"]
    is_exact = [reason == "contaminated_exact" for reason, _ in known.find(asked, 0.5)]
    assert is_exact == [True, True, True, False]


# Benchmarks by name


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("hf:allenai/reward-bench#filtered", "RewardBench"),
        ("hf:allenai/reward-bench-2#test", "RewardBench 2"),
        ("hf:AllenAI/Reward-Bench@main", "RewardBench"),
        ("hf:THU-KEG/RM-Bench", "RM-Bench"),
        ("hf:ScalerLab/JudgeBench#gpt", "JudgeBench"),
        ("hf:princeton-nlp/LLMBar", "LLMBar"),
        ("https://raw.githubusercontent.com/WeOpenML/PandaLM/main/data/testset-v1.json", "PandaLM"),
        ("hf:lmarena-ai/PPE-MBPP-Plus-Best-of-K#train", "PPE"),
        ("hf:lmarena-ai/PPE-Human-Preference-V1#test", "PPE"),
        ("hf:ilgee/RMB-Pairwise", "RMB"),
        ("/data/Zhou-Zoey/RMB-Reward-Model-Benchmark/RMB_dataset", "RMB"),
        ("hf:nvidia/HelpSteer3:preference#validation", "HelpSteer3's validation split"),
        ("hf:nvidia/HelpSteer3:preference#train", ""),
        ("hf:nvidia/HelpSteer3", ""),
        ("~/.cache/huggingface/hub/datasets--allenai--reward-bench/snapshots/1", "RewardBench"),
        ("hf:allenai/reward-bench-results", ""),
        ("hf:someone/reward-bench", ""),
        ("pairs.jsonl", ""),
    ],
)
def test_a_benchmark_that_is_named_as_training_data_is_warned_of(source, named, caplog):
    warn_of_benchmark(source)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(named)
    assert all(text.startswith(f"{source} is a benchmark ({named}): ") for text in said)


def test_every_benchmark_of_the_hub_is_known(caplog):
    sources = {each.source for each in BENCHMARKS.values() if each.source.startswith("hf:")}
    for source in sources:
        warn_of_benchmark(source + "#validation" if source.endswith("JudgeLM-100K") else source)
    assert len(caplog.records) == len(sources) >= 8


def test_the_question_of_a_row_of_conversations_is_read(tmp_path):
    turns = {
        f"conversation_{side}": [
            {"role": "user", "content": "Which river runs through Vienna?"},
            {"role": "assistant", "content": side},
        ]
        for side in "ab"
    }
    path = tmp_path / "arena.jsonl"
    path.write_text(json.dumps({**turns, "winner": "model_a"}) + "\n")
    known = read_benchmarks([str(path)], 8)
    assert list(known.questions) == [fold("which river runs through Vienna")]
