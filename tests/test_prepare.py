"""Preparing a dataset: nothing lost or changed unsaid, the same bytes again, whole or not there."""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from jlrm import prepare
from jlrm.config import DataConfig, UsageError
from jlrm.data import batches, contamination, dataset, sharded
from jlrm.data.comparisons import Comparison, fold, write_comparisons
from jlrm.data.dataset import write_dataset
from jlrm.data.readers import read
from jlrm.data.tokenizer import load_tokenizer
from jlrm.data.worlds import toy
from jlrm.runtime import commands
from jlrm.runtime.storage import open_place

ROOT = pathlib.Path(__file__).parent.parent
LONG = (
    "A farmer has seventeen sheep and all but nine of them run away one night, so how many sheep "
    "does the farmer have left in the morning when he counts them at the gate?"
)
# Scores that float32 holds in their shortest form, text that formats like to change.
ROWS = [
    Comparison(
        "a", "Why?\r\n{x} 猫", 'Be"cause,\n', "No.", 8.5, 2.0, None, "s", {"reasoning": "r"}
    ),
    Comparison("b", "Why not?", "", "No\tidea.", None, None, 0, "", {"n": [1, {"a": True}]}),
    Comparison("b", " When \0", "x\0", "y", 7.3, 0.0, 1, "t", {"deep": {"é": None}}),
    Comparison("7", "{question}", "x", "y", None, None, 2, "", {}),
    Comparison("c", "e\u0301", "x", "\u00e9", 5.0, 5.0, None, "", {"f": 0.1}),
]


def jsonl(path: pathlib.Path, rows: list[Comparison]) -> str:
    write_comparisons(rows, path)
    return str(path)


def made(out: pathlib.Path | str, *sources: str, flags: tuple[str, ...] = ("--validation=0",)):
    """Prepare by the command line and return the statistics."""
    prepare.main(["--input", *sources, "--out", str(out), *flags])
    place = open_place(str(out))
    return place.read_json("statistics.json")


def dropped(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def spawn(*arguments: str, **settings) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    toy.save_tokenizer(directory)
    return directory


@pytest.fixture
def pairs(tmp_path) -> str:
    return jsonl(tmp_path / "pairs.jsonl", distinct(60))


def distinct(num_rows: int) -> list[Comparison]:
    """Return toy rows, three to a question, no two of them alike."""
    rows = toy.comparisons(seed=3, num_rows=num_rows)
    return [
        dataclasses.replace(row, question=f"Task {i // 3}: name a few.", answer_2=f"{i}")
        for i, row in enumerate(rows)
    ]


# ------------------------------------------------------------------------------------ the dataset


def test_every_value_and_the_order_of_rows_are_read_back(tmp_path):
    splits = {"train": ROWS, "validation": ROWS[2:]}
    write_dataset(splits, tmp_path / "x")
    for name, rows in splits.items():
        assert read(f"{tmp_path / 'x'}#{name}").rows == rows
    made(tmp_path / "out", jsonl(tmp_path / "x.jsonl", ROWS))
    assert read(str(tmp_path / "out")).rows == ROWS


def test_plain_tfds_reads_it_at_random(tmp_path):
    import tensorflow_datasets as tfds

    rows = toy.comparisons(seed=0, num_rows=300)
    write_dataset({"train": rows}, tmp_path / "x")
    source = tfds.builder_from_directory(tmp_path / "x").as_data_source("train")
    assert len(source) == 300 and source[217]["id"].decode() == rows[217].id
    assert source[5]["preference"] == -1 and source[5]["score_1"] == rows[5].score_1


def test_many_shards_keep_the_order_and_stay_clear_of_tensorflow(tmp_path, monkeypatch):
    from tensorflow_datasets.core import shuffle

    # What does not fit there TFDS writes with TensorFlow, unless told how to make each shard.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    monkeypatch.setattr(dataset, "SHARD_CHARACTERS", 5000)
    rows = toy.comparisons(seed=0, num_rows=301)
    write_dataset({"train": rows, "validation": rows[:2]}, tmp_path / "x")
    assert read(f"{tmp_path / 'x'}#train").rows == rows
    assert read(f"{tmp_path / 'x'}#validation").rows == rows[:2]
    names = [path.name for path in (tmp_path / "x").glob("*-train*")]
    assert len(names) > 3 and all(name.endswith(f"-of-{len(names):05}") for name in names)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path, pairs):
    flags = ("--swap", "--validation", "0.2")
    made(tmp_path / "one", pairs, flags=flags)
    other = spawn(
        *("-m", "jlrm.prepare", "--input", pairs, "--out", str(tmp_path / "two"), *flags),
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert other.wait() == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert {"dataset_info.json", "dropped.jsonl", "statistics.json", "preparation.json"} < {*one}
    assert not any(str(tmp_path / "one").encode() in content for content in one.values())


@pytest.mark.slow
def test_neither_preparing_nor_reading_imports_tensorflow_or_jax(tmp_path, pairs):
    out = tmp_path / "out"
    script = f"""
import sys
from jlrm import prepare
from jlrm.data.readers import read
prepare.main(["--input", {pairs!r}, "--out", {str(out)!r}])
assert read("{out}#train").rows
print(sorted({{"tensorflow", "jax", "torch"}} & sys.modules.keys()))
"""
    process = spawn("-c", script)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == "[]"
    assert not errors  # TFDS has bars and messages of its own


def test_batches_are_those_of_the_jsonl_file(tmp_path, pairs, tokenizer_dir):
    out = tmp_path / "out"
    made(out, pairs, flags=("--validation", "0.2"))
    tokenizer = load_tokenizer(tokenizer_dir)
    config = DataConfig(train="", prompt="toy")
    jsonl(tmp_path / "train.jsonl", read(f"{out}#train").rows)
    examples = [
        batches.encode_prompts(sharded.read(source)[0], tokenizer, config)
        for source in (f"{out}#train", str(tmp_path / "train.jsonl"))
    ]
    for step in range(12):
        rows = batches.batch_rows(5, step, 8, len(examples[0]))
        first, second = (part.take(rows) for part in examples)
        assert first == second


# -------------------------------------------------------------------------------------- the steps


def test_swapping_doubles_the_training_rows_and_only_those(tmp_path, pairs):
    plain = made(tmp_path / "plain", pairs, flags=("--validation", "0.2"))["splits"]
    swapped = made(tmp_path / "both", pairs, flags=("--validation", "0.2", "--swap"))["splits"]
    assert swapped["train"]["rows"] == 2 * plain["train"]["rows"]
    assert swapped["validation"] == plain["validation"]
    given, both = (read(f"{tmp_path / name}#train").rows for name in ("plain", "both"))
    assert both[::2] == given
    assert both[1::2] == [
        dataclasses.replace(row.swapped(), id=f"{row.id}/swapped") for row in given
    ]
    assert swapped["train"]["labels"]["1"] == swapped["train"]["labels"]["2"]


@pytest.mark.parametrize("share", [0.001, 0.2, 0.9])
def test_no_question_is_in_both_splits(tmp_path, share):
    rows = distinct(60)
    rows += [
        dataclasses.replace(row, question=f"  {row.question.upper()}\n", answer_1="other")
        for row in rows
    ]
    out = tmp_path / "out"
    statistics = made(out, jsonl(tmp_path / "x.jsonl", rows), flags=(f"--validation={share}",))
    parts = [read(f"{out}#{name}").rows for name in ("train", "validation")]
    train, heldout = ({fold(row.question) for row in part} for part in parts)
    assert not train & heldout and len(train | heldout) == 20
    assert len(heldout) == max(1, round(20 * share))
    assert sum(map(len, parts)) == statistics["rows_kept"] == len(rows)
    order = {(row.question, row.answer_1, row.answer_2): i for i, row in enumerate(rows)}
    for part in parts:
        places = [order[row.question, row.answer_1, row.answer_2] for row in part]
        assert places == sorted(places)


def test_more_data_moves_no_question_into_training_that_was_held_out_at_the_same_count(tmp_path):
    rows = distinct(300)
    heldout = []
    for name, some in (("few", rows[:150]), ("many", rows)):
        made(tmp_path / name, jsonl(tmp_path / f"{name}.jsonl", some), flags=("--validation=0.2",))
        heldout.append({row.question for row in read(f"{tmp_path / name}#validation").rows})
    few, many = heldout
    assert len(few - many) <= 5


def test_duplicates_in_either_order_go_and_other_labels_stay(tmp_path):
    row = Comparison("first", "Caf\u00e9  or\ttea?", "Tea.", "Coffee.", 8.0, 5.0)
    again = dataclasses.replace(row, id="again", question=" Cafe\u0301 or tea? ", score_1=9.0)
    turned = dataclasses.replace(row.swapped(), id="turned")
    preferred = Comparison("preferred", row.question, "Tea.", "Coffee.", preference=1)
    others = [
        dataclasses.replace(row, id="other label", score_1=2.0),
        dataclasses.replace(row, id="tie", score_1=5.0),
        dataclasses.replace(row, id="other case", answer_1="tea."),
        dataclasses.replace(row, id="other question", question="Tea?"),
    ]
    source = jsonl(tmp_path / "x.jsonl", [row, again, turned, preferred, *others])
    statistics = made(tmp_path / "out", source)
    assert read(str(tmp_path / "out")).rows == [row, *others]
    assert [line["id"] for line in dropped(tmp_path / "out")] == ["again", "turned", "preferred"]
    assert statistics["dropped"] == {"duplicate": 3}
    assert statistics["pairs_with_differing_labels"] == 1


def test_answers_that_differ_in_white_space_alone_keep_their_labels(tmp_path):
    """Such as Python code with one line indented wrongly."""
    right, wrong = "if x:\n    y()\nz()", "if x:\n    y()\n    z()"
    row = Comparison("1", "Fix it.", right, wrong, preference=1)
    rows = [row, dataclasses.replace(row.swapped(), id="2"), dataclasses.replace(row, preference=2)]
    statistics = made(tmp_path / "out", jsonl(tmp_path / "x.jsonl", rows))
    assert statistics["dropped"] == {"duplicate": 1}
    assert statistics["pairs_with_differing_labels"] == 1


def test_pairs_that_are_labelled_both_ways_are_counted_and_shown(tmp_path, capsys):
    row = Comparison("first", "Tea or  coffee?", "Tea.", "Coffee.", preference=1)
    rows = [
        row,
        dataclasses.replace(row, id="same"),
        dataclasses.replace(row.swapped(), id="other", question="TEA or coffee?", preference=1),
        dataclasses.replace(row, id="alone", question="Which?", preference=2),
        dataclasses.replace(row, id="a", question="Tied?"),
        dataclasses.replace(row, id="b", question="Tied?", preference=0),
    ]
    statistics = made(tmp_path / "out", jsonl(tmp_path / "x.jsonl", rows))
    assert statistics["pairs_with_differing_labels"] == 2
    assert statistics["pairs_with_opposite_labels"] == 1
    opposite, tied = statistics["examples_of_differing_labels"]
    assert opposite["question"] == "Tea or coffee?" and opposite["answer_1"] == "Coffee."
    # by the order of the texts that are shown, whatever the rows' own order was
    assert [(each["id"], each["label"]) for each in opposite["rows"]] == [
        ("other", 1),
        ("first", 2),
    ]
    assert opposite["rows"][0]["where"] == f"{tmp_path}/x.jsonl, line 3"
    assert {each["label"] for each in tied["rows"]} == {0, 2}
    said = capsys.readouterr().out
    assert "pairs of differing labels          2" in said and "1 of them once 1 and once 2" in said
    assert "'Tea or coffee?': 'Coffee.' or 'Tea.': 1 (" in said and "tie (" in said
    assert not made(tmp_path / "none", jsonl(tmp_path / "y.jsonl", rows[:2]))[
        "examples_of_differing_labels"
    ]


@pytest.mark.parametrize(
    "spelling",
    [["0=1", "1=2", "2=0"], ["0=1,1=2,2=0"], ["{0: 1, 1: 2, 2: 0}"], "{0: 1, 1: 2, 2: 0}"],
)
def test_labels_are_mapped_in_every_spelling(tmp_path, spelling, capsys):
    lines = [
        {"prompt": f"q{i}", "response 1": "x", "response 2": f"{i}", "label": i % 3, "level": i}
        for i in range(6)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = spelling.split() if isinstance(spelling, str) else spelling  # a shell took the quotes
    flags = ("--validation=0", "--columns", "preference=label", "--values", *values)
    statistics = made(tmp_path / "out", str(tmp_path / "x.jsonl"), flags=flags)
    assert statistics["splits"]["train"]["labels"] == {"1": 2, "2": 2, "tie": 2}
    rows = read(str(tmp_path / "out")).rows
    assert [row.label for row in rows] == [1, 2, 0, 1, 2, 0]
    assert [row.meta for row in rows] == [{"level": i} for i in range(6)]
    described = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert described["values"] == {"0": 1, "1": 2, "2": 0}
    assert (
        commands.run(lambda: prepare.main(["--input", "x", "--out", "y", "--values", "0=3"])) == 2
    )
    assert "--values: '0' can't mean '3'" in capsys.readouterr().err


def test_planted_benchmark_questions_are_found_and_no_others(tmp_path):
    edited = LONG.replace("seventeen", "twenty").replace("gate?", "gate!")
    within = f"Think well. {LONG} Explain."
    questions = {
        "exact": "How are you?",
        "exact but for case and space": "  how are  YOU?",
        "edited": edited,
        "within": within,
        "short and similar": "How are you today?",
        "untouched": "Name three animals that live in the sea, and say what they eat down there.",
        "a little of it": LONG[:80] + " and " + " ".join(f"word{i}" for i in range(40)),
        "empty": "",
    }
    rows = [Comparison(name, text, "x", "y", preference=1) for name, text in questions.items()]
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "How are you?"}, {"prompt": LONG}]))
    source = jsonl(tmp_path / "x.jsonl", rows)
    against = ("--against", str(tmp_path / "bench.json"), "--validation=0")
    statistics = made(tmp_path / "out", source, flags=against)
    reasons = {line["id"]: line["reason"] for line in dropped(tmp_path / "out")}
    assert reasons == {
        "exact": "contaminated_exact",
        "exact but for case and space": "contaminated_exact",
        "edited": "contaminated_ngram",
        "within": "contaminated_ngram",
    }
    assert statistics["contaminated_by"] == {str(tmp_path / "bench.json"): 4}
    made(tmp_path / "all", source, flags=(*against, "--overlap", "1"))
    assert "edited" not in {line["id"] for line in dropped(tmp_path / "all")}
    made(tmp_path / "two", source, flags=(*against, "--ngram", "2"))
    assert "short and similar" in {line["id"] for line in dropped(tmp_path / "two")}


def test_texts_without_spaces_between_words_are_compared_too():
    benchmark = "农夫有十七只羊，一天夜里除了九只以外全部跑掉了，请问早上还剩下几只羊？"
    benchmarks = contamination.Benchmarks(
        {benchmark: "b"}, dict.fromkeys(contamination._ngrams(benchmark, 13), "b"), 13
    )
    edited = benchmark.replace("十七", "十八")
    other = "请写一首关于春天的诗，并且解释为什么你选择了这些意象和韵脚，不超过一百个字。"
    found = benchmarks.find([edited, other], 0.5)
    assert found == [("contaminated_ngram", "b"), ("", "")]


def parquet(path: pathlib.Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def table(path: pathlib.Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "Why so?"},
        {"question_body": "Why so?", "answer1_body": "x", "answer2_body": "y", "score": None},
        {"prompt": "Why so?", "chosen": "x", "rejected": "y"},
        {"prompt": "Why so?", "chosen": ["x", "y"], "rejected": ["z", "u"]},
        {"prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Why so?"}]},
        {"input": "Why so?", "output_1": "x"},
        {"instruction": "Why", "input": "so?"},
        {"instruction": "Why so?", "input": ""},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_benchmarks_of_any_form(tmp_path, fields):
    text = json.dumps(fields)
    (tmp_path / "b.jsonl").write_text(text)
    (tmp_path / "b.json").write_text(f"[{text}]")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    names = ["b.jsonl", "b.json", "b.jsonl.gz"]
    parquet(tmp_path / "b.parquet", [fields])
    names.append("b.parquet")
    if all(isinstance(value, str) for value in fields.values()):
        table(tmp_path / "b.csv", [fields])
        names.append("b.csv")
    for name in names:
        found = contamination.read_benchmarks([str(tmp_path / name)], 13)
        assert found.questions == {"why so": str(tmp_path / name)}, name


def save_uneven_tokenizer(directory: pathlib.Path) -> None:
    """Write a tokenizer to which "zebra" is shorter as the second answer than as the first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    toy.save_tokenizer(directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        special_tokens=[toy.PAD, "<|im_start|>", toy.END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n2: zebra"] * 9, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.mark.slow
def test_overlong_rows_are_dropped_when_either_order_is(tmp_path):
    tokenizer_dir = tmp_path / "tokenizer"
    save_uneven_tokenizer(tokenizer_dir)
    rows = [
        dataclasses.replace(row, answer_1="zebra" if i % 2 else row.answer_1, answer_2=f"{i}")
        for i, row in enumerate(toy.comparisons(seed=1, num_rows=300))
    ]
    rows += [dataclasses.replace(row.swapped(), question="Other one?") for row in rows[:150]]
    rows = [dataclasses.replace(row, id=str(i)) for i, row in enumerate(rows)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    tokenizer = load_tokenizer(tokenizer_dir)
    encode = batches.prompt_encoder(tokenizer, "toy")
    orders = (rows, [row.swapped() for row in rows])
    counts = [[len(example.prompt_ids) for example in encode(order)] for order in orders]
    limit = max(a for a, b in zip(*counts, strict=True) if a < b)  # fits one way only
    measure = ("--tokenizer", str(tokenizer_dir), "--prompt", "toy", "--validation", "0")
    measure += ("--max-prompt-tokens", str(limit))
    overlong = {}
    for name, flags, used in (("one", (), counts[:1]), ("two", ("--swap",), counts)):
        statistics = made(tmp_path / name, source, flags=(*measure, *flags))
        lines = dropped(tmp_path / name)
        duplicates = {line["id"] for line in lines if line["reason"] == "duplicate"}
        longest = {
            row.id: max(both)
            for row, both in zip(rows, zip(*used, strict=True), strict=True)
            if row.id not in duplicates
        }
        overlong[name] = {line["id"] for line in lines if line["reason"] == "overlong"}
        assert overlong[name] == {key for key, count in longest.items() if count > limit}
        fitting = [count for count in longest.values() if count <= limit]
        assert statistics["prompt_tokens"]["max"] == max(fitting)
        assert statistics["rows_kept"] == len(fitting)
    assert overlong["one"] < overlong["two"]


def test_every_row_is_kept_or_listed_once(tmp_path, tokenizer_dir):
    rows = distinct(90)
    more = [dataclasses.replace(row, id=f"again {row.id}") for row in rows[:20]]
    source = jsonl(tmp_path / "x.jsonl", [*rows, *more])
    failed = {"question_body": "q", "answer1_body": "a", "answer2_body": "b", "score": [-1, -1]}
    fine = failed | {"score": [1, 2], "question_body": rows[5].question, "review_id": "planted"}
    close = failed | {"score": [7.000000001, 7], "review_id": "close"}
    huge = failed | {"score": [1e39, 7], "review_id": "huge"}
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in (failed, fine, close, huge)))
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"question": rows[5].question}))
    flags = ("--against", str(bench), "--tokenizer", str(tokenizer_dir), "--prompt", "toy")
    flags += ("--max-prompt-tokens", "45", "--validation", "0.1")
    statistics = made(tmp_path / "out", source, str(other), flags=flags)
    kept = [*read(f"{tmp_path / 'out'}#train").rows, *read(f"{tmp_path / 'out'}#validation").rows]
    lines = dropped(tmp_path / "out")
    ids = [row.id for row in kept] + [line["id"] for line in lines]
    wanted = [row.id for row in (*rows, *more)] + ["1", "planted", "close", "huge"]
    assert sorted(ids) == sorted(wanted)
    assert len({line["where"] for line in lines}) == len(lines)
    reasons = collections.Counter(line["reason"] for line in lines)
    assert statistics["dropped"] == dict(sorted(reasons.items()))
    assert reasons["failed_review"] == 1 and reasons["unstorable_scores"] == 2
    assert reasons["duplicate"] == 20 and reasons["contaminated_exact"] == 4
    assert reasons["overlong"] > 0
    assert statistics["rows_read"] == len(wanted) == statistics["rows_kept"] + len(lines)


def test_statistics_count_what_is_written(tmp_path):
    statistics = made(tmp_path / "out", jsonl(tmp_path / "x.jsonl", ROWS))
    train = statistics["splits"]["train"]
    assert train["rows"] == 5 and train["labels"] == {"1": 2, "2": 1, "tie": 2}
    assert train["with_scores"] == 3 and train["preference_only"] == 2
    assert train["half_point_scores"] == 1
    assert train["score_histogram"] == {"0": 1, "2": 1, "5": 2, "7.5": 1, "8.5": 1}
    assert train["sources"] == {str(tmp_path / "x.jsonl"): 3, "s": 1, "t": 1}
    lengths = sorted(len(row.question + row.answer_1 + row.answer_2) for row in ROWS)
    assert train["characters"] == {
        "p50": lengths[2],
        "p90": lengths[4],
        "p99": lengths[4],
        "max": lengths[4],
    }
    records = (tmp_path / "out").glob("*.array_record*")
    assert statistics["bytes"] == sum(path.stat().st_size for path in records)


# --------------------------------------------------------------------------- whole, or not there


@pytest.mark.slow
def test_killed_while_writing_it_leaves_no_dataset_and_starts_anew(tmp_path):
    rows = [
        dataclasses.replace(row, answer_2=str(i))
        for i, row in enumerate(toy.comparisons(seed=3, num_rows=8000))
    ]
    source, out = jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out"
    command = ["-m", "jlrm.prepare", "--input", source, "--out", str(out)]
    process = spawn(*command)
    partial = tmp_path / "out.partial"
    while not any(partial.glob("*array_record*")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.exists() and not out.exists()
    prepare.main(command[2:])
    assert not partial.exists()
    parts = [read(f"{out}#{name}").rows for name in ("train", "validation")]
    assert sum(map(len, parts)) == 8000
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "out"}


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_no_dataset(tmp_path, pairs):
    process = spawn(
        *("-m", "jlrm.prepare", "--input", pairs, "--out", str(tmp_path / "out")),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    output, errors = process.communicate()
    assert process.returncode == 1 and not output
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "too large" in errors
    assert not (tmp_path / "out").exists()


def test_the_same_again_is_said_and_printed(tmp_path, pairs, capsys):
    out = tmp_path / "out"
    command = ["--input", pairs, "--out", str(out)]
    prepare.main([*command, "--json"])
    first = capsys.readouterr()
    before, changed = contents(out), (out / "dataset_info.json").stat().st_mtime_ns
    prepare.main([*command, "--json"])
    second = capsys.readouterr()
    assert json.loads(first.out) == json.loads(second.out) and first.out == second.out
    assert "already prepared" in second.err and "rows/s" in first.err
    assert contents(out) == before
    assert (out / "dataset_info.json").stat().st_mtime_ns == changed
    prepare.main(command)
    assert "already prepared" in capsys.readouterr().out


def test_another_preparation_or_anything_else_is_refused(tmp_path, pairs):
    out = tmp_path / "out"
    made(out, pairs)
    before = contents(out)
    for flags, named in ((("--swap",), "--swap"), (("--ngram", "5"), "--ngram")):
        with pytest.raises(UsageError, match=f"prepared with another {named}"):
            made(out, pairs, flags=("--validation=0", *flags))
    jsonl(pathlib.Path(pairs), distinct(30))
    with pytest.raises(UsageError, match="another content of what it reads"):
        made(out, pairs)
    assert contents(out) == before
    other = tmp_path / "other"
    other.mkdir()
    made(other, pairs)  # an empty directory is fine
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"no prepared dataset \(it holds notes.txt\)"):
        made(tmp_path / "mine", pairs)
    with pytest.raises(UsageError, match="is a file"):
        made(pairs, pairs)


def test_a_store_gets_the_same_files_and_is_read_back(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/set"
    local, remote = made(tmp_path / "out", pairs), made(url, pairs)
    assert remote == local
    system = fsspec.filesystem("memory")
    stored = {
        path.rpartition("/")[2]: system.cat_file(path) for path in system.find(f"/{tmp_path.name}")
    }
    assert stored == contents(tmp_path / "out")
    assert read(f"{url}#train").rows == read(f"{tmp_path / 'out'}#train").rows
    assert made(url, pairs) == remote  # already there
    with pytest.raises(UsageError, match="another --swap"):
        made(url, pairs, flags=("--validation=0", "--swap"))


def test_an_interrupted_upload_is_no_dataset_and_is_done_again(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "store"
    url = f"file://{directory}"
    made(url, pairs)
    whole = contents(directory)
    for name in ("features.json", "dataset_info.json"):
        (directory / name).unlink()
    (directory / "comparisons-train.array_record-00000-of-00002").write_text("of other settings")
    with pytest.raises(UsageError):
        read(url)
    made(url, pairs)
    assert contents(directory) == whole
    (directory / "dataset_info.json").unlink()
    (directory / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="no prepared dataset"):
        made(url, pairs)
    assert (directory / "notes.txt").exists()


# ------------------------------------------------------------------------------------ what is said

ERRORS = {
    "no such input": (["--input", "nowhere.jsonl"], "Cannot read the data file nowhere.jsonl"),
    "validation of one": (["--validation", "1"], "--validation=1.0 is outside [0, 1)"),
    "negative validation": (["--validation", "-0.1"], "--validation=-0.1 is outside [0, 1)"),
    "no number": (["--validation", "nan"], "--validation=nan is outside [0, 1)"),
    "ngram": (["--ngram", "0"], "--ngram=0 is too small"),
    "overlap": (["--overlap", "0"], "--overlap=0.0 is outside (0, 1]"),
    "no token": (
        ["--tokenizer", "TOKENIZER", "--max-prompt-tokens", "0"],
        "--max-prompt-tokens=0 is too small",
    ),
    "limit without tokenizer": (["--max-prompt-tokens", "9"], "--max-prompt-tokens needs --tok"),
    "prompt without tokenizer": (["--prompt", "toy"], "--prompt needs --tokenizer"),
    "unknown tokenizer": (["--tokenizer", "nowhere"], "No model directory at nowhere"),
    "offline tokenizer": (["--tokenizer", "org/nothing-here"], "the hub did not give it"),
    "no tokenizer in it": (["--tokenizer", "EMPTY"], "Set --tokenizer to a directory"),
    "unknown prompt": (["--tokenizer", "TOKENIZER", "--prompt", "judgelm"], "'judgelm'"),
    "everything is too long": (
        ["--tokenizer", "TOKENIZER", "--prompt", "toy", "--max-prompt-tokens", "3"],
        "No row is left of 60: 60 with a prompt that is too long.",
    ),
    "columns": (["--columns", "answer_1"], "--columns answer_1: wanted OURS=THEIRS"),
    "a column without a name": (["--columns", "answer_1="], "--columns='answer_1=' is not pairs"),
    "unknown column": (["--columns", "answer=x"], "--columns: unknown field 'answer'"),
    "no questions": (["--against", "NO_QUESTIONS"], "has no question texts"),
    "no benchmark": (["--against", "nowhere.json"], "Cannot read the data file nowhere.json"),
    "all held out": (["--validation", "0.999"], "holds out every question: there are 20"),
    "unknown store": (["--out", "nosuch://x/y"], "Cannot open nosuch://x/y"),
}


@pytest.mark.parametrize(
    "spelling",
    [["question=q", "answer_1=a"], ["question=q,answer_1=a"], ["{question: q, answer_1: a}"]],
)
def test_columns_are_spelled_as_in_a_config_too(spelling):
    parser = prepare._parser()
    args = parser.parse_args(["--input", "x", "--out", "y", "--columns", *spelling])
    assert commands.read_pair_flags(args)["columns"] == {"question": "q", "answer_1": "a"}


@pytest.mark.parametrize(("flags", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_done_is_said_in_one_sentence(
    tmp_path, pairs, tokenizer_dir, capsys, flags, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text('{"answer": "x"}')
    names = {
        "TOKENIZER": str(tokenizer_dir),
        "EMPTY": str(tmp_path / "empty"),
        "NO_QUESTIONS": str(tmp_path / "none.jsonl"),
    }
    out = tmp_path / "out"
    command = ["--input", pairs, "--out", str(out), *(names.get(flag, flag) for flag in flags)]
    assert commands.run(lambda: prepare.main(command)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_a_store_without_its_package_says_which_to_install(pairs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert commands.run(lambda: prepare.main(["--input", pairs, "--out", "gs://b/x"])) == 2
    assert "pip install gcsfs" in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for setting in dataclasses.fields(prepare.Recipe):
        assert f"--{setting.name.replace('_', '-')}" in text


# ---------------------------------------------------------------------------------- the real data


@pytest.mark.slow
def test_the_real_training_files_against_every_benchmark(reference, tmp_path):
    files = ["pandalm/testset-v1.json", "llmbar/Natural/dataset.json"]
    benchmarks = [
        *sorted((reference / "judgebench" / "data").glob("*.jsonl")),
        *sorted((reference / "rmbench").glob("*.json")),
        reference / "rewardbench" / "partial_llmbar_hep.jsonl",
        *(reference / name for name in files),
    ]
    sources = [
        str(reference / "train" / f"{name}.jsonl.gz")
        for name in ("vicuna80_reviews", "permissive_mix")
    ]
    out = tmp_path / "out"
    flags = ("--against", *map(str, benchmarks), "--swap", "--validation", "0.05")
    statistics = made(out, *sources, flags=flags)
    lines, train = dropped(out), statistics["splits"]["train"]["rows"]
    heldout = statistics["splits"]["validation"]["rows"]
    assert statistics["rows_read"] == 1354 + 7930 == train // 2 + heldout + len(lines)
    assert len({(line["where"]) for line in lines}) == len(lines)
    left = [row for name in ("train", "validation") for row in read(f"{out}#{name}").rows]
    assert len(left) == train + heldout
    assert not any(row.source.startswith("humanevalpack") for row in left)
    hep = {str(row.where) for row in read(sources[1]).rows if "pack" in row.source}
    found = {line["where"]: line["reason"] for line in lines}
    assert len(hep) == 984
    assert {found[where] for where in hep} <= {"contaminated_exact", "duplicate"}
    assert sum(found[where] == "contaminated_exact" for where in hep) > 900
