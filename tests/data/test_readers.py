"""Any form from any source: written rows read back equal, and what can't be read is said."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import importlib
import json
import math
import os
import pathlib
import random
import sys

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlrm.config import UsageError
from jlrm.data import forms, readers
from jlrm.data.comparisons import Comparison, count_reasons, write_comparisons
from jlrm.data.dataset import write_dataset
from jlrm.data.files import READ_ROWS
from jlrm.data.readers import read, read_part
from jlrm.judgement.prompts import PAIR_TEMPLATES, fill

OURS = {"question": "Why?", "answer_1": "Because.", "answer_2": "No.", "preference": 1}
JUDGELM = {
    "question_id": 3,
    "question_body": "Why?",
    "answer1_body": "Because.",
    "answer2_body": "No idea.",
    "score": [8.0, 2.5],
    "text": "8 2.5\nThe first one tries.",
    "score_w_reference": [3, 4],
    "text_w_reference": "3 4\nThe second one is right.",
}
TRL = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
# Scores that float32 holds in its shortest form, which is what a prepared TFDS directory keeps.
ROWS = [
    Comparison(
        "a", "Why?\r\n{x} 猫", 'Be"cause,\n', "No.", 8.5, 2.0, None, "s", {"reasoning": "r"}
    ),
    Comparison("b", "Why?", "", "No\tidea.", None, None, 0, "", {"n": [1, {"a": True}], "b": "é"}),
    Comparison("b", " Why ", "x", "y", 7.3, 0.0, 1, "t", {}),
    Comparison("7", "{question}", "x", "y", None, None, 2, "", {}),
]
FLAT = [dataclasses.replace(row, answer_1=row.answer_1 or "x", meta={}) for row in ROWS]


def lines(path: pathlib.Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def verl(question: str = "Why?", template: str = "judgelrm_train", truth: object = None, **keys):
    texts = {"question": question, "answer_1": "Because.", "answer_2": "No idea."} | keys
    content = fill(PAIR_TEMPLATES[template], **texts)
    truth = truth or {"solution_text_format": [8, 2.5], "statements": "8 2.5\nGood."}
    return {
        "data_source": "judgelrm",
        "prompt": [{"role": "user", "content": content}],
        "ability": "logic",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 0},
    }


def said(source: object, **settings: object) -> str:
    with pytest.raises(UsageError) as error:
        read(str(source), **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def prepare_tfds(root: pathlib.Path, rows: list[Comparison]) -> pathlib.Path:
    """Write rows as `jlrm/data/dataset.py` does, under a registered name."""
    import tensorflow_datasets as tfds

    class ReadersTestPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text, score = tfds.features.Text(), tfds.features.Scalar(np.float32)
            features = dict.fromkeys(("id", "question", "answer_1", "answer_2", "source"), text)
            features |= {"score_1": score, "score_2": score, "meta": text}
            features["preference"] = tfds.features.Scalar(np.int32)
            return tfds.core.DatasetInfo(
                builder=self,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(rows), "test": self._generate_examples(rows)}

        def _generate_examples(self, rows):
            for place, row in enumerate(rows):
                example = row.record() | {"meta": json.dumps(row.meta)}
                for name in ("score_1", "score_2"):
                    example[name] = math.nan if example[name] is None else example[name]
                example["preference"] = -1 if row.preference is None else row.preference
                yield place, example

    ReadersTestPairs(data_dir=root, file_format="array_record").download_and_prepare()
    (directory,) = root.glob("*/1.0.0")
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    return prepare_tfds(tmp_path_factory.mktemp("tfds"), ROWS)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------- forms


def test_judgelm_form(tmp_path):
    failed = {**JUDGELM, "score": [-1, -1]}
    unscored = {key: value for key, value in JUDGELM.items() if key != "score"}
    comparisons = read(lines(tmp_path / "x.jsonl", JUDGELM, failed, unscored))
    (row,) = comparisons.rows
    assert row.scores == (8.0, 2.5) and row.answer_2 == "No idea." and row.id == "3"
    assert row.meta == {"reasoning": "The first one tries."}
    assert count_reasons(comparisons.dropped) == {"failed_review": 1, "no_label": 1}
    assert str(comparisons.dropped[0].where).endswith("x.jsonl, line 2")
    assert comparisons.dropped[0].id == "3"


def test_scores_with_reference_are_asked_for(tmp_path):
    without = {key: value for key, value in JUDGELM.items() if "reference" not in key}
    source = lines(tmp_path / "x.jsonl", JUDGELM, without, {**without, "preference": 2})
    comparisons = read(source, scores="score_w_reference")
    assert [row.scores for row in comparisons.rows] == [(3.0, 4.0), None]
    assert comparisons.rows[0].meta["reasoning"] == "The second one is right."
    assert "reasoning" not in comparisons.rows[1].meta
    assert count_reasons(comparisons.dropped) == {"no_scores": 1}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((1, 1), (2, 2), (0, 0), (1.0, 1), ("1", 1), ("2", 2), ("0", 0), ("A", 1), ("b", 2)),
        *(("model_a", 1), ("model_b", 2), ("answer_1", 1), ("answer_2", 2)),
        *(("tie", 0), ("tie (bothbad)", 0), ("Tie", 0)),
    ],
)
def test_preferences(tmp_path, value, wanted):
    (row,) = read(lines(tmp_path / "x.jsonl", OURS | {"preference": value})).rows
    assert row.preference == wanted and row.scores is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"preference": None}, "no_label"),
        ({"question": None}, "missing_text"),
        ({"answer_2": None}, "missing_text"),
        ({"score_1": 1, "score_2": 2}, "conflicting_label"),
        ({"score": [2, 2]}, "conflicting_label"),
        ({"score_1": -1, "score_2": 5}, "failed_review"),
        ({"question": "\ud83d"}, "unwritable"),
        ({"meta": {"reasoning": "\ud83d"}}, "unwritable"),
    ],
)
def test_unusable_rows_are_dropped_for_a_reason(tmp_path, change, reason):
    comparisons = read(lines(tmp_path / "x.jsonl", OURS, OURS | change))
    assert [row.id for row in comparisons.rows] == ["1"]
    (dropped,) = comparisons.dropped
    assert (dropped.reason, dropped.id) == (reason, "2")


def test_columns_are_renamed_all_at_once(tmp_path):
    row = {"q": "Why?", "answer_1": "No.", "answer_2": "Because.", "gold": [1, 2], "key": 5}
    names = {"question": "q", "answer_1": "answer_2", "answer_2": "answer_1", "score": "gold"}
    source = lines(tmp_path / "x.jsonl", row, {**row, "key": None})
    first, second = read(source, columns={**names, "id": "key"}).rows
    assert (first.answer_1, first.answer_2, first.scores) == ("Because.", "No.", (1.0, 2.0))
    assert (first.id, second.id) == ("5", "2")


def test_a_renamed_column_may_be_absent_from_some_rows_only(tmp_path):
    source = lines(tmp_path / "x.jsonl", OURS, OURS | {"origin": "here"})
    assert [row.source for row in read(source, columns={"source": "origin"}).rows] == ["", "here"]
    assert "has no column 'orgin'. There are: 'question'" in said(
        source, columns={"source": "orgin"}
    )


# Pieces of the template itself, so that texts often look like its headers.
PIECES = (
    "[Question]\n",
    "\n\n[Assistant 1’s Answer]",
    "\n[Assistant 2's Answer]\n",
    "\n<|im_end|>",
)
TEXT = st.lists(st.sampled_from(PIECES) | st.text("a{}’\n[", max_size=4), max_size=4).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["judgelrm_train", "judgelrm_eval"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(question=TEXT, answer_1=TEXT, answer_2=TEXT)
def test_a_prompt_comes_apart_as_it_was_put_together_or_not_at_all(
    tmp_path, template, question, answer_1, answer_2
):
    texts = {"question": question, "answer_1": answer_1, "answer_2": answer_2}
    comparisons = read(lines(tmp_path / "x.jsonl", verl(), verl(template=template, **texts)))
    if comparisons.dropped:
        assert comparisons.dropped[0].reason == "ambiguous_prompt"
        assert "[Assistant " in "".join(texts.values())
    else:
        row = comparisons.rows[1]
        assert (row.question, row.answer_1, row.answer_2) == (question, answer_1, answer_2)


def test_verl_form(tmp_path):
    header = "\n\n[Assistant 1’s Answer]\n"
    rows = [
        *(verl(), verl(answer_2="x" + header), verl(answer_1="x" + header), verl(question=header)),
        {**verl(question=header), "extra_info": {k: OURS[k] for k in forms.TEXTS}},
        {**verl(), "prompt": "Why?"},
        *(verl(truth=[2, 3]), verl(truth={"score_1": 1, "score_2": 4})),
        *(verl(truth={"preference": "B"}), verl(truth={"x": 1})),
    ]
    comparisons = read(lines(tmp_path / "x.jsonl", *rows))
    first = comparisons.rows[0]
    assert (first.source, first.scores) == ("judgelrm", (8.0, 2.5))
    assert first.meta["reasoning"] == "Good."
    assert first.meta["extra_info"] == {"split": "train", "index": 0}
    assert first.meta["ground_truth"] == rows[0]["reward_model"]["ground_truth"]
    assert [row.id for row in comparisons.rows] == ["1", "2", "5", "7", "8", "9"]
    assert [row.label for row in comparisons.rows] == [1, 1, 1, 2, 2, 2]
    reasons = [(row.id, row.reason) for row in comparisons.dropped]
    ambiguous = [("3", "ambiguous_prompt"), ("4", "ambiguous_prompt")]
    assert reasons == [*ambiguous, ("6", "unknown_prompt"), ("10", "no_label")]


def test_the_order_of_a_preference_pair_is_a_function_of_its_texts(tmp_path):
    draw = random.Random(0)
    pairs = [(f"Why {i}?", f"{draw.random()}", f"{draw.random()}") for i in range(600)]
    rows = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in pairs]
    other = [{"prompt": q, "chosen": b, "rejected": a} for q, a, b in reversed(pairs)]
    given_rows = read(lines(tmp_path / "x.jsonl", *rows)).rows
    other_rows = read(lines(tmp_path / "y.jsonl", *other)).rows[::-1]
    for row, swapped, (_, chosen, _) in zip(given_rows, other_rows, pairs, strict=True):
        assert (row.answer_1, row.answer_2) == (swapped.answer_1, swapped.answer_2)
        assert {row.preference, swapped.preference} == {1, 2}
        assert (row.answer_1, row.answer_2)[row.label - 1] == chosen
    share = np.mean([row.preference == 1 for row in given_rows])
    is_sorted = np.mean([row.answer_1 < row.answer_2 for row in given_rows])
    assert abs(share - 0.5) < 0.07 and abs(is_sorted - 0.5) < 0.07  # 3.4 standard deviations


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
GOOD, BAD = assistant("Because."), assistant("No idea.")


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (TRL, "Why?"),
        ({"prompt": [user("Why?")], "chosen": [GOOD], "rejected": [BAD]}, "Why?"),
        ({"chosen": [user("Why?"), GOOD], "rejected": [user("Why?"), BAD]}, "Why?"),
        (  # the prompt once more at the head of both conversations
            {
                "prompt": "Why?",
                "chosen": [user("Why?"), GOOD],
                "rejected": [user("Why?"), BAD],
            },
            "Why?",
        ),
        (
            {"prompt": [SYSTEM, user("Why?")], "chosen": [GOOD], "rejected": [BAD]},
            "System: Be brief.\n\nUser: Why?",
        ),
        (  # the first answer is shared, and belongs to the question
            {
                "prompt": [user("Hi")],
                "chosen": [assistant("Hello"), user("Why?"), GOOD],
                "rejected": [assistant("Hello"), user("Why?"), BAD],
            },
            "User: Hi\n\nAssistant: Hello\n\nUser: Why?",
        ),
    ],
)
def test_trl_form(tmp_path, row, question):
    source = lines(tmp_path / "x.jsonl", row | {"score_chosen": 9.0, "score_rejected": 2})
    (comparison,) = read(source).rows
    answers = (comparison.answer_1, comparison.answer_2)
    better = comparison.label - 1
    assert comparison.question == question
    assert (answers[better], answers[1 - better]) == ("Because.", "No idea.")
    assert comparison.scores and comparison.scores[better] == 9.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "Because."}, "same_answers"),
        ({"rejected": None}, "missing_text"),
        ({"prompt": None}, "missing_text"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "missing_text"),
        ({"score_chosen": 1, "score_rejected": 1}, "conflicting_label"),
        ({"chosen": [user("Why?")], "rejected": [user("Why?"), BAD]}, "missing_text"),
    ],
)
def test_unusable_preference_pairs(tmp_path, change, reason):
    comparisons = read(lines(tmp_path / "x.jsonl", TRL, TRL | change))
    assert count_reasons(comparisons.dropped) == {reason: 1}


# ----------------------------------------------------------------------------------------- sources


def write_csv(path: pathlib.Path, rows: list[Comparison], delimiter: str = ",") -> str:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        names = [name for name in Comparison("", "", "", "").record() if name != "meta"]
        writer = csv.DictWriter(file, names, delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row.record() for row in rows)
    return str(path)


def arrow(rows: list[Comparison]) -> list[dict]:
    """Return rows for a format of fixed columns, in which `meta` is text."""
    return [row.record() | {"meta": json.dumps(row.meta)} for row in rows]


@pytest.mark.slow
def test_parts_of_a_source_are_the_whole(tmp_path):
    """Rows are dealt to three readers in turn; each says where its rows stood, and what it left."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [dataclasses.replace(row, id=f"{i}-{row.id}") for i in range(700) for row in FLAT]
    rows[5] = dataclasses.replace(rows[5], score_1=-1.0, score_2=-1.0, preference=None)
    write_comparisons(rows, tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text(json.dumps([row.record() for row in rows]))
    table = pa.Table.from_pylist(arrow(rows))
    pq.write_table(table, tmp_path / "x.parquet")
    halves = [datasets.Dataset(table.slice(0, 9)), datasets.Dataset(table.slice(9))]
    datasets.DatasetDict(a=halves[0], b=halves[1]).save_to_disk(tmp_path / "saved")
    write_comparisons(rows, tmp_path / "clone" / "train.jsonl")
    write_dataset({"train": rows}, tmp_path / "prepared")
    csv_file = write_csv(tmp_path / "x.csv", rows)
    others = [f"{tmp_path}/{n}" for n in ("x.jsonl", "x.json", "x.parquet", "clone", "prepared")]
    for source in (csv_file, *others, f"{tmp_path}/saved#a+b"):
        whole = read(source)
        assert [row.id for row in whole.dropped] == [rows[5].id] and len(rows) > 2 * READ_ROWS
        parts = [read_part(source, every=slice(first, None, 3))[0] for first in range(3)]
        for name in ("rows", "dropped"):
            found = [row for part in parts for row in getattr(part, name)]
            assert sorted(found, key=lambda row: row.where.number) == getattr(whole, name), source
        for first, part in enumerate(parts):
            assert {(row.where.number - 1) % 3 for row in part.rows} == {first}, source


def test_pieces_of_a_source_are_its_files_and_together_the_whole(tmp_path):
    for name in ("b", "a", "c"):
        lines = [OURS | {"id": f"{name}{i}"} for i in range(3)] + [OURS | {"preference": None}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source, number in ((str(tmp_path), 3), (str(tmp_path / "a.jsonl"), 1)):
        whole, parts, rows = read(source), readers.pieces(source), []
        assert len(parts) == number
        for piece in parts:
            seen = readers.nothing_seen({}, {})
            rows += readers.each_row(source, seen, piece=piece)
            assert seen.num_rows == 3 and seen.reasons == {"no_label": 1}
        assert [row for row in rows if isinstance(row, Comparison)] == whole.rows
        places = [row.where for row in (*whole.rows, *whole.dropped)]
        assert sorted(row.where.order for row in rows) == sorted(each.order for each in places)
        assert {row.where for row in rows} == set(places)


def test_written_rows_read_back_equal(tmp_path):
    write_comparisons(ROWS, tmp_path / "x.jsonl")
    assert read(str(tmp_path / "x.jsonl")).rows == ROWS
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert read(str(tmp_path / "x.jsonl.gz")).rows == ROWS
    (tmp_path / "x.json").write_bytes((tmp_path / "x.jsonl").read_bytes())
    assert read(str(tmp_path / "x.json")).rows == ROWS
    (tmp_path / "y.json").write_text(" \n" + json.dumps([row.record() for row in ROWS], indent=1))
    assert read(str(tmp_path / "y.json")).rows == ROWS


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1),
    score=st.none() | st.floats(0, allow_infinity=False),
    meta=st.dictionaries(st.text("abé"), st.none() | st.integers() | st.text("\n\x85\u2028")),
)
def test_any_written_row_reads_back_equal(tmp_path, text, score, meta):
    row = Comparison(text, text, text + "1", text, score, score, 0, text, meta)
    write_comparisons([row], tmp_path / "x.jsonl")
    assert read(str(tmp_path / "x.jsonl")).rows == [row]
    flat = dataclasses.replace(row, meta={})
    assert read(write_csv(tmp_path / "x.csv", [flat])).rows == [flat]


def test_the_reason_of_a_dataset_library_is_one_line():
    found = readers._reason(RuntimeError(f"{readers.SAYS_NOTHING}\n\nThere are 1 new columns."))
    assert found == "There are 1 new columns"


def test_flat_rows_read_back_equal_from_csv(tmp_path):
    source = write_csv(tmp_path / "x.csv", FLAT)
    assert read(source).rows == FLAT
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress((tmp_path / "x.csv").read_bytes()))
    assert read(str(tmp_path / "x.csv.gz")).rows == FLAT
    assert read(write_csv(tmp_path / "x.tsv", FLAT, "\t")).rows == FLAT


def test_csv_cells_hold_lists_of_scores_and_long_texts(tmp_path):
    text = "q,a,b,s\n" + f'why,{"x" * 200_000},y,"[8, 2.5]"\n\nwhy,x,,"[8, 2.5]"\n'
    (tmp_path / "x.csv").write_text(text)
    names = {"question": "q", "answer_1": "a", "answer_2": "b", "score": "s"}
    comparisons = read(str(tmp_path / "x.csv"), columns=names)
    assert comparisons.rows[0].scores == (8.0, 2.5) and len(comparisons.rows[0].answer_1) == 200_000
    assert count_reasons(comparisons.dropped) == {"missing_text": 1}  # an empty cell


def test_rows_read_back_equal_from_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(arrow(ROWS)), tmp_path / "x.parquet")
    assert read(str(tmp_path / "x.parquet")).rows == ROWS
    rows = [verl(), verl(truth={"preference": 2, "score_1": 1, "score_2": 3})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "y.parquet")
    assert read(str(tmp_path / "y.parquet")).rows == read(lines(tmp_path / "y.jsonl", *rows)).rows


def test_rows_read_back_equal_from_saved_datasets(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(arrow(ROWS))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1, 2])}).save_to_disk(
        tmp_path / "two"
    )
    assert read(str(tmp_path / "one")).rows == ROWS
    assert read(f"{tmp_path}/two").rows == ROWS
    assert read(f"{tmp_path}/two#test").rows == ROWS[1:3]
    assert read(f"{tmp_path}/two#train[:50%]").rows == ROWS[:2]
    assert "Should be one of ['train', 'test']" in said(f"{tmp_path}/two#tset")


def test_rows_read_back_equal_from_a_clone_of_a_hub_dataset(tmp_path, cache):
    clone = tmp_path / "clone"
    write_comparisons(ROWS, clone / "train.jsonl")
    write_comparisons(ROWS[1:3], clone / "test.jsonl")
    assert read(str(clone)).rows == ROWS
    assert read(f"{clone}#test").rows == ROWS[1:3]
    assert read(f"{clone}#train[1:2]").rows == ROWS[1:2]  # as `datasets` cuts splits
    assert "has no split 'tset'. There are: 'test', 'train'." in said(f"{clone}#tset")


def test_rows_read_back_equal_from_tfds(prepared, monkeypatch):
    assert read(str(prepared)).rows == ROWS
    assert read(f"{prepared}#test[:2]").rows == ROWS[:2]
    assert "Should be one of ['train', 'test']" in said(f"{prepared}#tset")
    constants = importlib.import_module("tensorflow_datasets.core.constants")
    monkeypatch.setattr(constants, "DATA_DIR", str(prepared.parent.parent))
    assert read("tfds:readers_test_pairs#train[1:]").rows == ROWS[1:]
    assert "Dataset reeders_test_pairs not found" in said("tfds:reeders_test_pairs")


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)  # type: ignore[union-attr]


def test_a_remote_file_is_copied_again_only_if_it_changed(tmp_path, cache):
    write_comparisons(ROWS, tmp_path / "x.jsonl")
    url = "memory://readers/x.jsonl"
    put(url, (tmp_path / "x.jsonl").read_bytes())
    assert read(url).rows == ROWS
    (copy,) = cache.glob("*/x.jsonl")
    copied = copy.stat().st_mtime_ns
    assert read(url).rows == ROWS and copy.stat().st_mtime_ns == copied
    put(url, b"\n".join((tmp_path / "x.jsonl").read_bytes().splitlines()[:2]))
    assert read(url).rows == ROWS[:2]
    assert read(url).rows == ROWS[:2] and len(list(cache.glob("*/x.jsonl"))) == 2
    put(url, b"\n".join((tmp_path / "x.jsonl").read_bytes().splitlines()[1::-1]))
    assert read(url).rows == ROWS[1::-1]  # of the same size as before


def test_an_interrupted_copy_is_never_read(tmp_path, cache, monkeypatch):
    write_comparisons(ROWS, tmp_path / "x.jsonl")
    url = "memory://readers/interrupted.jsonl"
    put(url, (tmp_path / "x.jsonl").read_bytes())
    system = type(fsspec.filesystem("memory"))

    def torn(self, remote, local, **_):
        pathlib.Path(local[0]).write_bytes(b'{"question"')
        raise ConnectionError("the line went dead")

    with monkeypatch.context() as patch:
        patch.setattr(system, "get", torn)
        assert "the line went dead" in said(url)
    assert not list(cache.iterdir())
    assert read(url).rows == ROWS


def test_a_remote_prepared_directory(prepared, cache):
    for path in prepared.iterdir():
        put(f"memory://readers/pairs/1.0.0/{path.name}", path.read_bytes())
    assert read("memory://readers/pairs/1.0.0").rows == ROWS
    assert read("memory://readers/pairs/1.0.0/#test[:1]").rows == ROWS[:1]
    assert "no prepared TFDS directory" in said("memory://readers/pairs")


def test_long_sources_show_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "MANY_ROWS", 3)
    assert len(read(lines(tmp_path / "x.jsonl", *[OURS] * 3)).rows) == 3
    assert capsys.readouterr().err == ""
    assert len(read(lines(tmp_path / "x.jsonl", *[OURS] * 5)).rows) == 5
    assert "5 rows" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- bad inputs


def encoded(row: dict, **changes: object) -> bytes:
    return json.dumps({**row, **changes}).encode()


HEADERS = "Question{0}Answer 1{0}answer-2{0}Score 1{0}SCORE_2\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", HEADERS.format(",") + "Why?,a,b,7.5,2"),
        ("x.csv", HEADERS.format(";") + 'Why?;a;b;"7,5";2'),
        ("x.csv", HEADERS.format("\t") + "Why?\ta\tb\t7.5\t2"),
        ("x.tsv", HEADERS.format("\t") + "Why?\ta\tb\t7.5\t2"),
        ("x.csv", "question;answer1;answer2;score1;score2\nWhy?;a;b;7.5;2"),
        ("x.csv", HEADERS.format("|") + "Why?|a|b|7.5|2"),
        ("x.csv", "sep=;\n" + HEADERS.format(";") + 'Why?;a;b;"7,5";2'),
        (
            "x.jsonl",
            json.dumps({"Question": "Why?", "ANSWER 1": "a", "answer2": "b", "Score": [7.5, 2]}),
        ),
    ],
)
def test_spreadsheets_are_read_as_they_are_written(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read(str(tmp_path / name)).rows == [Comparison("1", "Why?", "a", "b", 7.5, 2.0)]


def test_a_header_is_respelled_only_if_one_alone_can_be_meant(tmp_path):
    texts = {"question": "Why?", "answer_1": "a", "answer_2": "b", "preference": 1}
    (row,) = read(lines(tmp_path / "x.jsonl", {**texts, "Answer 1": "other"})).rows
    assert row.answer_1 == "a"
    del texts["answer_1"]
    twice = {**texts, "Answer 1": "a", "answer1": "other"}
    assert "has no field 'answer_1'" in said(lines(tmp_path / "y.jsonl", twice))


@pytest.mark.parametrize(("winner", "wanted"), [("model_a", 1), ("B", 2), ("tie (bothbad)", 0)])
def test_a_winner_is_a_preference(tmp_path, winner, wanted):
    texts = {"question": "Why?", "answer_1": "a", "answer_2": "b", "winner": winner}
    assert [row.label for row in read(lines(tmp_path / "x.jsonl", texts)).rows] == [wanted]
    scored = {**texts, "score_1": 1, "score_2": 1, "winner": "gpt"}  # a label is there already
    assert [row.label for row in read(lines(tmp_path / "y.jsonl", scored)).rows] == [0]
    assert "or tie, got 'gpt'" in said(lines(tmp_path / "z.jsonl", {**texts, "winner": "gpt"}))


def test_a_saved_dataset_without_train_needs_a_split_if_it_has_several(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([OURS])
    datasets.DatasetDict({"test": part}).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"dev": part, "test": part}).save_to_disk(str(tmp_path / "two"))
    assert len(read(str(tmp_path / "one")).rows) == len(read(f"{tmp_path}/two#dev").rows) == 1
    message = said(tmp_path / "two")
    assert "has no split 'train'. There are: 'dev', 'test'." in message and "two#dev" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "is empty: wanted one JSON object a line"),
        ("x.csv", "question\n\u00fc".encode("cp1252"), "iconv -f cp1252 -t utf-8"),
        ("x.csv", "question\n".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("x.csv", b"question,answer_1\na,b,c", "must stand in quotes"),
        ("x.jsonl", encoded({**OURS, "preference": None}, best=1), "'best'. If one of these is"),
        ("x.jsonl", b'{"Q": "1"}', "There are: 'Q'. If one of these is meant, name it, e.g. data."),
        ("x.jsonl", b"\n \n", "is empty"),
        ("x.json", b"[]", "is empty"),
        ("x.csv", b"", "is empty: wanted one comparison a row"),
        ("x.csv", b"question,answer_1,answer_2\n", "is empty"),
        ("x.jsonl", b'{"question": "1"}', "line 1 has no field 'answer_1' (or 'answer1_body')"),
        ("x.jsonl", b'{"chosen": "1", "rejected": "2"}', "line 1 has no field 'prompt'"),
        ("x.jsonl", encoded(JUDGELM, question_body=7), "'question' must be text, got 7"),
        ("x.jsonl", encoded(OURS, answer_1=True), "'answer_1' must be text, got True"),
        ("x.jsonl", encoded(OURS, answer_2=["a"]), "'answer_2' must be text or a list of {role"),
        ("x.jsonl", encoded(JUDGELM, score=[1]), "scores must be two numbers, got [1]"),
        ("x.jsonl", encoded(JUDGELM, score=["8/10", 4]), "scores must be two numbers"),
        ("x.jsonl", encoded(JUDGELM, score=[True, 4]), "scores must be two numbers"),
        (
            "x.jsonl",
            encoded(JUDGELM, score=[None, 4]),
            "out: 1 with a score for one answer only",
        ),
        (
            "x.jsonl",
            encoded(JUDGELM, score=[math.nan, 4]),
            "out: 1 with a score for one answer only",
        ),
        ("x.jsonl", encoded(JUDGELM, score=[math.inf, 4]), "scores must be finite"),
        ("x.jsonl", encoded(JUDGELM, score=[10**400, 4]), "scores must be finite"),
        ("x.jsonl", encoded(JUDGELM, score=["-inf", 4]), "scores must be two numbers"),
        ("x.jsonl", encoded(OURS, preference=3), "the preference must be 1, 2 or 0"),
        ("x.jsonl", encoded(OURS, preference=True), "the preference must be"),
        ("x.jsonl", encoded(OURS, preference=[1]), "the preference must be"),
        ("x.jsonl", encoded(TRL, chosen=[1]), "'chosen' must be text or a list of {role, content}"),
        ("x.jsonl", encoded(TRL, chosen=[]), "'chosen' is an empty list"),
        ("x.jsonl", encoded(verl(), reward_model=1), "'reward_model' must hold 'ground_truth'"),
        ("x.jsonl", encoded(verl(truth="8")), "scores must be two numbers, got '8'"),
        ("x.jsonl", encoded(OURS) + b'\n{"a": NaN', "line 2 is not valid JSON"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl is not valid JSON"),
        ("x.jsonl", b"9" * 5000, "line 1 is not valid JSON"),
        ("x.jsonl", encoded(OURS) + b"\n[1]", "line 2 must be a JSON object, got list"),
        ("x.json", b'[{"a": 1},', "x.json is not valid JSON"),
        ("x.json", b"[1]", "row 1 must be a JSON object, got int"),
        ("x.jsonl", b"\xff\xfe{}", "is not UTF-8"),
        ("x.csv", b"question\n\xff", "is not UTF-8"),
        ("x.csv", b'question,answer_1\n"a', "row 1 is not valid CSV: unexpected end of data"),
        ("x.csv", b'question,answer_1\n"\\"a\\"",b', 'within quotes is written twice ("")'),
        ("x.csv", b"question,answer_1,answer_1\na,b,c", "two columns are called 'answer_1'"),
        ("x.csv", "question,answer_1\n".encode("utf-16-le"), "iconv -f utf-16le"),
        ("x.csv", b"PK\x03\x04\x14\0", "is a spreadsheet or an archive: save the sheet as CSV"),
        ("x.xlsx", b"PK\x03\x04\x14\0", "Save the sheet as CSV (CSV UTF-8)."),
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "is gzipped: let its name end with .gz"),
        ("x.csv", b"question,answer_1\na", "row 1 has 1 cells, the header has 2"),
        ("x.csv", b"question,answer_1,answer_2,score_1,score_2\na,b,c,x,1", "two numbers"),
        (
            "x.jsonl",
            encoded(JUDGELM, score=[-1, -1]),
            "no usable row: all were left out: 1 with a failed review",
        ),
        (
            "x.jsonl.gz",
            gzip.compress(encoded(JUDGELM) * 9, mtime=0)[:60],
            "Cannot read the data file",
        ),
        ("x.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 20, "Cannot read the data file"),
        ("x.jsonl.gz", encoded(JUDGELM), "Not a gzipped file"),
        ("x.parquet", b"PAR1torn", "Cannot read the data file"),
        ("x.txt", b"{}", "Wanted .jsonl, .json, .csv, .tsv (each plain or .gz) or .parquet"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in said(tmp_path / name)


def test_torn_directories_are_said(tmp_path, prepared, cache):
    import datasets

    datasets.Dataset.from_list(arrow(ROWS)).save_to_disk(tmp_path / "saved")
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in prepared.iterdir():
        (torn / path.name).write_bytes(path.read_bytes())
    for path in (*torn.glob("*.array_record*"), *(tmp_path / "saved").glob("*.arrow")):
        path.write_bytes(path.read_bytes()[:90])
    assert "Cannot read the dataset" in said(torn)
    assert "Cannot read the dataset" in said(tmp_path / "saved")
    (tmp_path / "x.jsonl").mkdir()  # a directory that is called as a file is
    assert "Cannot read the dataset" in said(tmp_path / "x.jsonl")


def test_sources_that_are_not_there_are_said(tmp_path, cache, monkeypatch):
    missing = f"Cannot read the data file {tmp_path}/x.jsonl: No such file or directory."
    assert said(tmp_path / "x.jsonl") == missing
    assert "For a dataset on the Hugging Face hub write hf:ORG/NAME." in said("ORG/NAME")
    assert "hub" not in said("x.jsonl")
    assert "No such file" in said("memory://readers/nothing.jsonl")
    assert "Protocol not known: nope" in said("nope://x/y.jsonl")
    assert "names no dataset: wanted hf:ORG/NAME" in said("hf:a@b@c")
    assert "Cannot read the dataset hf:no-such/name: Couldn't reach" in said("hf:no-such/name")
    assert "Check name, split and connection" in said("hf:no-such/name@main:default#test")
    assert "embedded null" in said("\0")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not installed
    assert said("gs://bucket/x.jsonl").endswith("Do: pip install gcsfs")


def test_a_split_of_a_plain_file_and_wrong_columns_are_said(tmp_path):
    source = lines(tmp_path / "x.jsonl", OURS)
    assert "has no splits: leave out '#test'" in said(f"{source}#test")
    assert read(lines(tmp_path / "x#1.jsonl", OURS)).rows  # part of a name
    assert "unknown field 'answer1'. Did you mean 'answer_1'?" in said(
        source, columns={"answer1": "a"}
    )
    assert "line 1 has no column 'prompt' (question). There are: 'question', 'answer_1'" in said(
        source, columns={"question": "prompt"}
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied_is_said(tmp_path):
    pathlib.Path(lines(tmp_path / "x.jsonl", OURS)).chmod(0)
    assert "Permission denied" in said(tmp_path / "x.jsonl")


NAMES = st.sampled_from(
    [
        *(*OURS, *JUDGELM, *TRL, *verl(), "meta", "id", "role", "content", "ground_truth"),
        *("source", "conversation_a", "conversation_b", "instruction", "input", "turn", "winner"),
        *("from", "value", "chosen_score", "rejected_score", "reasoning", "judged", "difficulty"),
    ]
)
PAIR = {"conversation_a": [user("a"), GOOD], "conversation_b": [user("a"), BAD], "winner": "a"}
WRITTEN = st.sampled_from(
    [
        "\n\nHuman: a\n\nAssistant: b",
        '[{"role": "user", "content": "a"}]',
        "8/10",
        "7,5",
        "1.5",
        "A>B",
    ]
)
TALKS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "human"]), "content": st.text(max_size=2)}
    ),
    max_size=4,
)
VALUES = st.recursive(
    WRITTEN
    | TALKS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def is_read_or_said(path: pathlib.Path) -> None:
    try:
        comparisons = read(str(path))
    except UsageError:
        return
    write_comparisons(comparisons.rows, path.with_name("again.jsonl"))
    again = read(str(path.with_name("again.jsonl"))).rows if comparisons.rows else []
    assert repr(again) == repr(comparisons.rows)  # NaN may stand in meta


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary() | st.text().map(str.encode), name=st.sampled_from(["x.jsonl", "x.csv"]))
def test_arbitrary_bytes_are_read_or_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    is_read_or_said(tmp_path / name)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    form=st.sampled_from([OURS, JUDGELM, TRL, verl(), PAIR, {}]),
    changes=st.dictionaries(NAMES, VALUES, max_size=4),
)
def test_arbitrary_values_are_read_or_refused(tmp_path, form, changes):
    (tmp_path / "x.jsonl").write_text(json.dumps({**form, **changes}))
    is_read_or_said(tmp_path / "x.jsonl")


# --------------------------------------------------------------------------------------- real data


def test_the_real_score_pairs_are_read_whole(reference):
    comparisons = read(str(reference / "train" / "vicuna80_reviews.jsonl.gz"))
    assert len(comparisons.rows) == 1354 and not comparisons.dropped
    labels = [row.label for row in comparisons.rows]
    assert [labels.count(label) for label in (1, 2, 0)] == [266, 930, 158]
    assert all(row.scores and row.meta["reasoning"] for row in comparisons.rows[:100])


@pytest.mark.slow
def test_the_real_preferences_are_read_whole(reference):
    comparisons = read(str(reference / "train" / "permissive_mix.jsonl.gz"))
    assert len(comparisons.rows) == 7930 and not comparisons.dropped
    preferences = [row.preference for row in comparisons.rows]
    assert [preferences.count(label) for label in (1, 2, 0)] == [3237, 3724, 969]
    assert sum(row.scores is not None for row in comparisons.rows) == 1350
