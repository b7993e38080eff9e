"""Data files, and directories of them: every file is read by itself, and named in errors."""

from __future__ import annotations

import gzip
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jlrm.config import UsageError
from jlrm.data.comparisons import FILE_ROWS, Where
from jlrm.data.files import data_files
from jlrm.data.readers import read, read_part

OURS = {"question": "Why?", "answer_1": "x", "answer_2": "y", "preference": 1}


def write(path: pathlib.Path, *rows: object) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


# --------------------------------------------------------------------------------------- parquet

VIEW = pa.string_view()
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "x"}]
OTHER = [TALK[0], {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    "text",
    [VIEW, pa.large_string(), pa.string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_texts_of_any_arrow_type(tmp_path, text):
    columns = {name: pa.array([OURS[name]] * 5).cast(text) for name in list(OURS)[:3]}
    columns["preference"] = pa.array([1, 2, 0, 1, 2], pa.int8())
    columns["difficulty"] = pa.array(["easy", None, "hard", "easy", "easy"]).cast(text)
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    rows = read(str(tmp_path / "x.parquet")).rows
    assert [row.label for row in rows] == [1, 2, 0, 1, 2]
    assert rows[0].question == "Why?" and rows[4].id == "5"
    assert [row.meta["difficulty"] for row in rows] == ["easy", None, "hard", "easy", "easy"]
    parts = [read_part(str(tmp_path / "x.parquet"), every=slice(i, None, 2))[0] for i in range(2)]
    assert [[row.label for row in part.rows] for part in parts] == [[1, 0, 2], [2, 1]]


def test_conversations_and_numbers_of_any_arrow_type(tmp_path):
    message = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    view = pa.struct([("name", VIEW)])
    columns = {
        "conversation_a": pa.array([TALK], pa.large_list(message)),
        "conversation_b": pa.array([OTHER], pa.list_(message)),
        "score_1": pa.array([8], pa.decimal128(5, 2)),
        "score_2": pa.array([2.5], pa.float16()),
        "preference": pa.array([1.0], pa.float32()),
        "asked": pa.array([0], pa.timestamp("us")),
        "judge": pa.array([{"name": "a"}], view),
        "tags": pa.array([["a", "b"]], pa.list_(VIEW)),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    (row,) = read(str(tmp_path / "x.parquet")).rows
    assert (row.question, row.answer_1, row.answer_2, row.scores) == ("Why?", "x", "y", (8.0, 2.5))
    assert row.meta["judge"] == {"name": "a"} and row.meta["tags"] == ["a", "b"]
    assert row.meta["asked"].startswith("1970-01-01")


# ------------------------------------------------------------------------------------ directories


def test_files_of_a_directory_may_differ_in_types_and_columns(tmp_path):
    base = {key: OURS[key] for key in ("question", "answer_1", "answer_2")}
    write(tmp_path / "d" / "a.jsonl", {**base, "score_1": 5, "score_2": 3, "source": None})
    write(tmp_path / "d" / "b.jsonl", {**base, "score_1": 5.5, "score_2": "3", "source": "b"})
    write(tmp_path / "d" / "c" / "e.jsonl", OURS | {"results": [1]}, OURS | {"preference": "A"})
    with gzip.open(tmp_path / "d" / "c" / "f.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.write(json.dumps(OURS | {"results": "none"}))
    (tmp_path / "d" / "empty.jsonl").write_text("")
    (tmp_path / "d" / "README.md").write_text("# Rows")
    write(tmp_path / "d" / ".cache" / "x.jsonl", {"a": 1})
    rows = read(str(tmp_path / "d")).rows
    assert [row.id for row in rows] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "e.jsonl:1",
        "e.jsonl:2",
        "f.jsonl.gz:1",
    ]
    assert [row.label for row in rows] == [1] * 5 and rows[1].source == "b"
    assert rows[2].meta == {"results": [1]} and rows[4].meta == {"results": "none"}
    assert str(rows[3].where) == f"{tmp_path}/d/c/e.jsonl, line 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": 1', "b.jsonl, line 1 is not valid JSON"),
        (json.dumps(OURS) + "\n[1]", "b.jsonl, line 2 must be a JSON object"),
        (json.dumps(OURS | {"preference": 9}), "b.jsonl, line 1: the preference must be"),
        (json.dumps({"question": "x"}), "b.jsonl, line 1 has no field 'answer_1'"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, message):
    write(tmp_path / "a.jsonl", OURS)
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(UsageError, match=rf"^{tmp_path}/b\.jsonl") as error:
        read(str(tmp_path))
    assert message in str(error.value)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match=rf"^{tmp_path}/b\.jsonl is not UTF-8"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "split", "read_of"),
    [
        (["a", "b"], "", ["a", "b"]),
        (["train", "test"], "", ["train"]),
        (["train-00000-of-00002", "train-00001-of-00002"], "train", ["train-00000", "train-00001"]),
        (["pairs_train", "pairs_dev"], "validation", ["pairs_dev"]),
        (["test/a", "train/a", "train/b"], "test", ["test/a"]),
        (["test"], "", ["test"]),
        (["a", "b_test"], "", ["a"]),
        (["contest", "latest"], "", ["contest", "latest"]),
    ],
)
def test_names_of_files_tell_their_split(tmp_path, names, split, read_of):
    for name in names:
        write(tmp_path / "d" / f"{name}.jsonl", OURS | {"id": name})
    rows = read(f"{tmp_path}/d" + (f"#{split}" if split else "")).rows
    assert len(rows) == len(read_of)
    assert all(row.id.startswith(name) for row, name in zip(rows, read_of, strict=True))


def test_a_split_must_be_there_and_files_without_one_are_said_to_be_left_out(tmp_path, caplog):
    for name in ("train", "test", "notes"):
        write(tmp_path / f"{name}.jsonl", OURS)
    assert len(read(str(tmp_path)).rows) == 1
    assert "its name tells no split: notes.jsonl" in caplog.text
    with pytest.raises(UsageError, match=r"has no split 'dev'\. There are: 'test', 'train'"):
        read(f"{tmp_path}#dev")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "notes.jsonl").unlink()
    write(tmp_path / "dev.jsonl", OURS)
    with pytest.raises(UsageError, match=r"has no split 'train'.*e.g. .*#validation"):
        read(str(tmp_path))


def test_directories_of_tables_are_read_file_by_file_too(tmp_path):
    pa_rows = [{**OURS, "x": 1}], [{**OURS, "x": "one", "preference": "tie"}]
    for name, rows in zip("ab", pa_rows, strict=True):
        (tmp_path / "p").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / f"{name}.parquet")
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{name}.csv").write_text("question,answer_1,answer_2,winner\nq,x,y,b")
    assert [(row.label, row.meta["x"]) for row in read(f"{tmp_path}/p").rows] == [
        (1, 1),
        (0, "one"),
    ]
    assert [row.label for row in read(f"{tmp_path}/c").rows] == [2, 2]


def test_parts_of_a_directory_are_the_whole_in_an_order_that_all_know(tmp_path):
    for name, count in (("a", 4), ("b", 1), ("c", 5)):
        write(tmp_path / f"{name}.jsonl", *[OURS | {"id": f"{name}{i}"} for i in range(count)])
    whole = read(str(tmp_path)).rows
    parts = [read_part(str(tmp_path), every=slice(i, None, 3))[0].rows for i in range(3)]
    rows = sorted((row for part in parts for row in part), key=lambda row: row.where.order)
    assert [row.id for row in rows] == [row.id for row in whole] and len(whole) == 10
    for number, part in enumerate(parts):
        assert {(row.where.order - 1) % 3 for row in part} == {number}
    assert Where(2, file="x", file_number=1).order == FILE_ROWS + 2


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OURS, indent=1),
        json.dumps([OURS], indent=1),
        json.dumps({"data": [OURS]}),
        json.dumps({"data": [OURS]}, indent=1),
        json.dumps({name: [value] for name, value in OURS.items()}),
        json.dumps({name: {"0": value} for name, value in OURS.items()}, indent=1),
    ],
)
def test_a_table_in_one_json_value(tmp_path, content):
    for name in ("x.json", "x.jsonl", "x.ndjson"):
        (tmp_path / name).write_text(content)
        (row,) = read(str(tmp_path / name)).rows
        assert (row.question, row.label) == (OURS["question"], OURS["preference"])


def test_one_row_of_messages_is_no_table(tmp_path):
    talk = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {side: {"role": role, "content": side} for side, role in talk.items()}
    for content in (row, {side: [message] for side, message in row.items()}):
        (tmp_path / "x.json").write_text(json.dumps(content))
        (read_row,) = read(str(tmp_path / "x.json")).rows
        assert {read_row.answer_1, read_row.answer_2} == {"chosen", "rejected"}


def test_numbers_of_classes_are_read_by_their_names(tmp_path):
    import datasets

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question", "answer_1", "answer_2")}
        | {"winner": datasets.ClassLabel(names=["model_a", "model_b", "tie"])}
    )
    columns = {"question": ["q"] * 3, "answer_1": ["x"] * 3, "answer_2": ["y"] * 3}
    saved = datasets.Dataset.from_dict({**columns, "winner": [0, 1, 2]}, features=features)
    saved.save_to_disk(str(tmp_path / "d"))
    saved.to_parquet(str(tmp_path / "x.parquet"))
    for source in ("d", "x.parquet"):
        assert [row.label for row in read(str(tmp_path / source)).rows] == [1, 2, 0]


def test_files_that_are_left_out_are_said(tmp_path, caplog):
    write(tmp_path / "a.jsonl", OURS)
    (tmp_path / "b.xlsx").write_bytes(b"PK")
    (tmp_path / "~$b.xlsx").write_bytes(b"PK")
    assert len(read(str(tmp_path)).rows) == 1
    assert "not read: b.xlsx. Save the sheet as CSV" in caplog.text
    (tmp_path / "c.csv").write_text("question,answer_1,answer_2,winner\nq,x,y,b")
    data_files(tmp_path)
    assert "files of several kinds (csv, json), of which one is read" in caplog.text
