"""Both engines make the same files, byte for byte; and what keys, counts and records are."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import fsspec
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from jlrm import preparation, prepare
from jlrm.config import RunError, UsageError
from jlrm.data import dataset
from jlrm.data.comparisons import Comparison, write_comparisons
from jlrm.data.readers import read
from jlrm.data.worlds import toy
from jlrm.preparation import curation, local
from jlrm.preparation.recipe import Checks, Recipe
from jlrm.runtime import commands
from jlrm.runtime.storage import open_place

ROOT = pathlib.Path(__file__).parents[2]
HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="needs pip install 'jlrm[beam]'")

ROW = Comparison("1", "Why  so?", "Because.", "No idea.", 7.5, 2.0, source="s", meta={"é": [1]})


# -------------------------------------------------------------------------------- keys and counts


def test_keys_are_equal_for_what_says_the_same():
    same = [
        dataclasses.replace(ROW, id="2", question=" Why so? ", score_1=9.0),
        ROW.swapped(),
        dataclasses.replace(ROW, score_1=None, score_2=None, preference=1),
    ]
    assert {curation.keys(row) for row in same} == {curation.keys(ROW)}
    other = curation.keys(dataclasses.replace(ROW, score_1=1.0))
    assert other.said != curation.keys(ROW).said and other.pair == curation.keys(ROW).pair
    folded = curation.keys(dataclasses.replace(ROW, question="why so"))
    assert folded.said != curation.keys(ROW).said and folded[1:] == curation.keys(ROW)[1:]
    apart = Comparison("", "a", "b\0c", "d", preference=1), Comparison("", "a\0b", "c", "d", None)
    assert (
        curation.keys(apart[0]).pair
        != curation.keys(dataclasses.replace(apart[1], preference=1)).pair
    )


@hypothesis.given(strategies.lists(strategies.integers(0, 9), min_size=1))
def test_percentiles_are_those_of_the_sorted_numbers(numbers):
    found = curation.percentiles({n: numbers.count(n) for n in set(numbers)})
    ordered = sorted(numbers)
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == ordered[-(-percent * len(numbers) // 100) - 1]
    assert found["max"] == ordered[-1]


@pytest.mark.parametrize("row", [ROW, dataclasses.replace(ROW, score_1=None, preference=0)])
def test_records_are_what_tfds_encodes(row, tmp_path):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    from tensorflow_datasets.proto import tf_example_pb2

    dataset.write_dataset({"train": [row]}, tmp_path / "x")
    features = tfds.builder_from_directory(tmp_path / "x").info.features
    serializer = ExampleSerializer(features.get_serialized_info())
    theirs = serializer.serialize_example(features.encode_example(dataset._example(row)))
    parsed = tf_example_pb2.Example.FromString
    assert parsed(theirs) == parsed(dataset.record(row))


@hypothesis.given(strategies.integers(1, 500), strategies.integers(0, 10**10))
def test_shards_are_of_about_one_size(num_rows, characters):
    ends = dataset.shard_ends(num_rows, characters)
    sizes = np.diff([0, *ends])
    assert ends[-1] == num_rows and sizes.min() >= 1 and np.ptp(sizes) <= 1
    assert len(ends) == num_rows or characters < len(ends) * dataset.SHARD_CHARACTERS


def test_memory_does_not_grow_by_the_texts(tmp_path):
    """Of 2,000 rows more, with 8 MB of text, the local engine holds the keys alone."""
    peaks = {}
    for num_rows in (500, 501, 2501):  # what is imported on the way counts in the first
        source = tmp_path / f"{num_rows}.jsonl"
        with open(source, "w") as lines:
            for i in range(num_rows):
                row = {"question": f"q {i}", "answer_1": "x" * 4000, "answer_2": "y"}
                lines.write(json.dumps(row | {"preference": i % 2}) + "\n")
        recipe = Recipe([str(source)])
        (out := tmp_path / f"out {num_rows}").mkdir()
        checks = Checks.of(recipe)
        tracemalloc.start()
        local.run(recipe, checks, out)
        peaks[num_rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[2501] - peaks[501] < 2000 * 300


# ------------------------------------------------------------------------------------- the same set


def random_rows(rng: random.Random, num_rows: int) -> list[Comparison]:
    """Return rows of so few texts that many of them repeat or contradict others."""
    rows = []
    for i in range(num_rows):
        question = f"{rng.choice(('Why', 'why ', 'How', LONG))} {rng.randrange(num_rows // 12)}?"
        first, second = rng.choice(("", "a b", "a  b", "é", "z" * 90)), rng.choice(("c", "d "))
        label = rng.choice((None, None, 0, 1, 2))
        scores = (None, None) if label is not None else (rng.randint(1, 9), rng.choice((2.5, 7)))
        row = Comparison(f"{i}", question, first, second, *scores, label, rng.choice(("", "s")))
        rows.append(row.swapped() if rng.random() < 0.3 else row)
    return rows


LONG = "Which of the seventeen sheep ran away while the farmer slept, and which of them stayed"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """A directory of files, a table, a prepared set, and one of them once more."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(5)
    (folder / "many").mkdir()
    for file in range(3):
        write_comparisons(random_rows(rng, 150), folder / "many" / f"{file}.jsonl")
    bad = {"question": "q", "answer_1": "x", "answer_2": "y"}
    lines = [bad, bad | {"score_1": 1e39, "score_2": 1}, bad | {"preference": 1}]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "table.csv").write_text("question,answer_1,answer_2,preference\nWhy 1?,a b,c,2\n")
    dataset.write_dataset({"train": random_rows(rng, 100)}, folder / "set")
    names = ("table.csv", "many", "more.jsonl.gz", "set#train", "many")
    return [str(folder / name) for name in names]


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[str, ...]:
    """Flags that check against a benchmark and by a tokenizer."""
    folder = tmp_path_factory.mktemp("checks")
    toy.save_tokenizer(folder)
    (folder / "benchmark.jsonl").write_text(json.dumps({"question": f"{LONG} 3?"}) + "\n")
    given = ("--against", str(folder / "benchmark.jsonl"), "--overlap", "1", "--prompt", "toy")
    return (*given, "--tokenizer", str(folder), "--max-prompt-tokens", "150")


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def made(out: pathlib.Path, sources: list[str], *flags: str) -> dict[str, bytes]:
    prepare.main(["--input", *sources, "--out", str(out), *flags])
    return files(out)


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--swap",), ("--validation=0",), ("--validation=0.6",)])
def test_beam_makes_the_same_files(tmp_path, sources, checked, flags, monkeypatch):
    from jlrm.preparation import pipeline

    monkeypatch.setattr(dataset, "SHARD_CHARACTERS", 4000)
    monkeypatch.setattr(pipeline, "STRETCH", 7)
    monkeypatch.setattr(pipeline, "ENCODE_ROWS", 16)
    whole = made(tmp_path / "local", sources, *checked, *flags)
    beamed = made(tmp_path / "beam", sources, *checked, *flags, "--engine", "beam")
    assert beamed == whole
    assert len([name for name in whole if "train.array_record" in name]) > 1
    statistics = json.loads(whole["statistics.json"])
    wanted = {"duplicate", "contaminated_exact", "overlong", "no_label", "unstorable_scores"}
    assert wanted <= statistics["dropped"].keys()
    assert statistics["pairs_with_differing_labels"] > statistics["pairs_with_opposite_labels"] > 3
    assert {path.name for path in tmp_path.iterdir()} == {"local", "beam"}


@needs_beam
@pytest.mark.slow
def test_of_duplicates_the_first_in_the_order_of_inputs_stays(tmp_path):
    for name in ("b", "a"):
        write_comparisons([dataclasses.replace(ROW, id=name)] * 2, tmp_path / f"{name}.jsonl")
    for order in (["a", "b"], ["b", "a"]):
        out = tmp_path / "-".join(order)
        names = [str(tmp_path / f"{name}.jsonl") for name in order]
        made(out, names, "--engine", "beam", "--validation=0")
        assert [row.id for row in read(str(out)).rows] == order[:1]
        dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
        places = [(names[0], 2), (names[1], 1), (names[1], 2)]
        assert [row["where"] for row in dropped] == [f"{n}, line {i}" for n, i in places]


@needs_beam
@pytest.mark.slow
def test_a_store_gets_the_same_files_and_one_engine_knows_the_set_of_the_other(tmp_path, capsys):
    """`languages` is no local file: its rows are told by their fingerprints."""
    url = f"memory://{tmp_path.name}/set"
    inputs = ["--input", "languages#heldout", "--out"]
    prepare.main([*inputs, str(tmp_path / "out")])
    prepare.main([*inputs, url, "--engine", "beam"])
    place = open_place(url)
    stored = {name: place.system.cat_file(f"{place.root}/{name}") for name in place.files()}
    assert stored == files(tmp_path / "out")
    for engine in ("local", "beam"):
        prepare.main([*inputs, url, "--engine", engine])
        assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UsageError, match="another --swap"):
        prepare.main([*inputs, url, "--engine", "beam", "--swap"])
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


# ------------------------------------------------------------------------------------- what is said

OURS = '{"question": "q", "answer_1": "a", "answer_2": "b", "preference": 1}'
WRONG = {
    "a torn line": ([OURS, OURS[:20]], [OURS[:9]], ()),
    "no label": ([OURS.replace("preference", "liked")], [OURS], ()),
    "empty": ([OURS], [], ()),
    "a lacking column": ([OURS], [OURS], ("--columns", "preference=winner")),
    "all held out": ([OURS], [OURS], ("--validation=0.9",)),
}


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "flags"), WRONG.values(), ids=WRONG)
def test_beam_says_what_the_local_engine_says(tmp_path, capsys, first, second, flags):
    names = []
    for name, lines in (("1.jsonl", first), ("2.jsonl", second)):
        (tmp_path / name).write_text("\n".join(lines))
        names.append(str(tmp_path / name))
    out, said = tmp_path / "out", []
    for engine in ("local", "beam"):
        words = ["--input", *names, "--out", str(out), "--engine", engine, *flags]
        assert commands.run(lambda words=words: prepare.main(words)) == 2
        said.append(capsys.readouterr().err)
        assert {path.name for path in tmp_path.iterdir()} == {"1.jsonl", "2.jsonl"}
    assert said[0].startswith("error: ") and said[0].count("\n") == 1
    assert said[1].endswith(said[0])  # the first import of Beam may say something before


FLAGS = {
    "--runnr Flink": "Beam has no flag --runnr. Did you mean 'runner'?",
    "--direct_num_workers x": "argument --direct_num_workers: invalid int value: 'x'.",
    "--runner Nowhere": "Beam's runner Nowhere: Unexpected pipeline runner",
    "--runner no.such.Runner": "Beam's runner no.such.Runner: No module named 'no'",
}


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize(("flags", "message"), FLAGS.items())
def test_wrong_flags_of_beam_are_one_sentence(tmp_path, flags, message):
    write_comparisons([ROW], tmp_path / "x.jsonl")
    words = ["--input", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError) as error:
        prepare.main([*words, "--engine", "beam", "--", *flags.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_flags_of_beam_need_its_engine_and_its_engine_needs_beam(tmp_path, monkeypatch):
    words = ["--input", "x", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="--runner after -- is a flag of Beam's: add --engine"):
        prepare.main([*words, "--", "--runner", "FlinkRunner"])
    for name in ("job", "pipeline"):
        monkeypatch.delitem(sys.modules, f"jlrm.preparation.{name}", raising=False)
        monkeypatch.delattr(preparation, name, raising=False)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UsageError, match=r"not installed. Do: pip install 'jlrm\[beam\]'"):
        prepare.main([*words, "--engine", "beam"])


@needs_beam
@pytest.mark.slow
def test_a_worker_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    from jlrm.preparation import pipeline

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "_write", full)
    write_comparisons([ROW, dataclasses.replace(ROW, question="Other?")], tmp_path / "x.jsonl")
    words = ["--input", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(RunError, match=r"FnApiRunner failed: .*No space left on device") as error:
        prepare.main([*words, "--engine", "beam"])
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("beam", marks=needs_beam)])
def test_ctrl_c_ends_it_at_once_and_leaves_nothing(tmp_path, engine):
    rows = toy.comparisons(seed=3, num_rows=20_000)
    write_comparisons(
        [dataclasses.replace(row, question=f"{i}?") for i, row in enumerate(rows)],
        tmp_path / "x.jsonl",
    )
    words = ("--input", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out"))
    process = subprocess.Popen(
        [sys.executable, "-m", "jlrm.prepare", *words, "--engine", engine],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out.partial").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.endswith("Stopped at once. What was saved before is whole.\n")
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl"}
