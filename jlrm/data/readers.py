"""Comparisons from whatever holds them: files, prepared directories, remote urls, dataset hubs.

Reading is two independent halves. A source yields `(place, row)` pairs, each row a dictionary; a
form translates a row's own keys into ours. So every form can be read from every source, and the
checks stand in one place, `_comparison`. A row that can't be used is a `Dropped` one; a row or a
source that can't be understood stops the reading with its file and line. Nothing is guessed.

Left out: writing (comparisons.py, dataset.py), prompts and token limits (batches.py), and any use
of TensorFlow, PyTorch or JAX.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from jlrm.config import UsageError, nearest
from jlrm.data.comparisons import Comparison, Comparisons, Dropped, describe_dropped
from jlrm.judge.prompts import PAIR_TEMPLATES, split_judgelm_text

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # the place, e.g. "line 12", and what stands there
Messages = list[tuple[str, str]]  # (role, text)

# Our names, and JudgeLM-100K's.
TEXTS = {"question": "question_body", "answer_1": "answer1_body", "answer_2": "answer2_body"}
RENAMABLE = (*TEXTS, "score_1", "score_2", "preference", "id", "source", "score", "text")
NUMBERS = ("score_1", "score_2", "score", "score_w_reference", "preference")  # in CSV: not text
PREFERENCES = {
    **{0: 0, 1: 1, 2: 2, "0": 0, "1": 1, "2": 2, "a": 1, "b": 2},
    **{"model_a": 1, "model_b": 2, "answer_1": 1, "answer_2": 2},
}
MANY_ROWS = 20_000  # more than these are worth a progress bar
FORMATS = ".jsonl, .json, .csv, .tsv (each plain or .gz) or .parquet"
# What tells two versions of a remote file apart; file systems differ in which of them they have.
STAMPS = ("size", "etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "created")


class _Unusable(Exception):
    """This row is to be left out; the text is the reason."""


def read(
    source: str, *, columns: Mapping[str, str] | None = None, scores: str = "score"
) -> Comparisons:
    """Read comparisons from a file, a directory, a url, `hf:ORG/NAME` or `tfds:NAME`.

    `#SPLIT` may follow a dataset's name (default: train). `columns` maps our field names to the
    source's own; `scores` says which scores of a JudgeLM row are gold, "score" or
    "score_w_reference". Rows may be in four forms, told apart by their keys: ours, JudgeLM-100K's,
    verl's (a filled-in judge prompt with its ground truth) and TRL's (prompt, chosen, rejected).

    Reasons for a dropped row: failed_review (JudgeLM marks reviews it could not read by -1),
    no_label, no_scores, missing_text, conflicting_label, same_answers, ambiguous_prompt,
    unknown_prompt, unwritable (text that UTF-8 can't hold).

    Raises:
      UsageError: no such source or split, no rows, no usable row, or, with its line, a row that
        lacks a field or holds another type than it should.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in RENAMABLE:
            raise UsageError(f"data.columns: unknown field '{name}'. {nearest(name, RENAMABLE)}")
    rows: list[Comparison] = []
    dropped: list[Dropped] = []
    lacking, raw = set(columns.values()), {}
    for place, raw in _with_progress(_checked_rows(source, columns), source):
        where = f"{source}, {place}"
        if not isinstance(raw, dict):
            raise UsageError(f"{where} must be a JSON object, got {type(raw).__name__}.")
        lacking -= raw.keys()
        row = _renamed(raw, columns, where)
        ids = (row[key] for key in ("id", "review_id", "question_id") if row.get(key) is not None)
        identity = str(next(ids, place.split()[-1]))
        try:
            rows.append(_comparison(_in_our_form(row, scores, where), identity, where))
        except _Unusable as reason:
            dropped.append(Dropped(where, identity, str(reason)))
    if not rows and not dropped:
        wanted = "one JSON object a line" if ".json" in source else "one comparison a row"
        raise UsageError(f"{source} is empty: wanted {wanted}.")
    if lacking:
        raise UsageError(f"{source} has no column {_listed(lacking)}. {_there_are(raw)}")
    if not rows:
        reasons = describe_dropped(dropped)
        raise UsageError(f"{source} holds no usable row: all were left out ({reasons}).")
    return Comparisons(rows, dropped)


# ---------------------------------------------------------------------------- rows to comparisons


def _comparison(row: Row, identity: str, where: str) -> Comparison:
    """Check a row in our form: a wrong type stops the reading, an unusable value drops the row."""
    texts = {name: _text(row, name, where) for name in TEXTS}
    pair = _scores(row, where)
    source = row.get("source")
    comparison = Comparison(
        id=identity,
        question=texts["question"],
        answer_1=texts["answer_1"],
        answer_2=texts["answer_2"],
        score_1=pair[0] if pair else None,
        score_2=pair[1] if pair else None,
        preference=_preference(row.get("preference"), where),
        source="" if source is None else str(source),
        meta=_meta(row),
    )
    if pair is None and comparison.preference is None:
        raise _Unusable("no_label")
    if pair is not None and -1 in pair:
        raise _Unusable("failed_review")
    if pair and comparison.label != dataclasses.replace(comparison, preference=None).label:
        raise _Unusable("conflicting_label")
    try:
        json.dumps(vars(comparison), ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # half a surrogate pair, or nested too deep
        raise _Unusable("unwritable") from None
    return comparison


def _text(row: Row, name: str, where: str) -> str:
    if name not in row:
        other = f" (or '{TEXTS[name]}')" if name in TEXTS else ""
        raise UsageError(
            f"{where} has no field '{name}'{other}. {_there_are(row)}"
            " If one of these is meant, name it in data.columns."
        )
    if row[name] is None:
        raise _Unusable("missing_text")
    if not isinstance(row[name], str):
        raise UsageError(f"{where}: '{name}' must be text, got {row[name]!r}.")
    return row[name]


def _scores(row: Row, where: str) -> tuple[float, float] | None:
    pair: Any = row.get("score")
    if pair is None:
        pair = [row.get("score_1"), row.get("score_2")]
    if pair == [None, None]:
        return None
    is_pair = isinstance(pair, list) and len(pair) == 2
    if not is_pair or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in pair):
        raise UsageError(f"{where}: the scores must be two numbers, got {pair!r}.")
    try:
        first, second = float(pair[0]), float(pair[1])
    except OverflowError:
        first = second = math.inf
    if not all(0 <= score < math.inf or score == -1 for score in (first, second)):
        raise UsageError(f"{where}: scores must be finite and not negative, got {pair!r}.")
    return first, second


def _preference(value: Any, where: str) -> int | None:
    if value is None:
        return None
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str) and word.startswith("tie"):
        return 0
    if isinstance(word, (int, float, str)) and not isinstance(word, bool) and word in PREFERENCES:
        return PREFERENCES[word]
    raise UsageError(
        f"{where}: the preference must be 1, 2 or 0 (a tie), or A, B, model_a, model_b, answer_1,"
        f" answer_2 or tie, got {value!r}."
    )


def _meta(row: Row) -> Row:
    """Return what else a row tells; flat formats hold it as the text of a JSON object."""
    meta = row.get("meta")
    if isinstance(meta, str) and meta.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # text after all
            meta = json.loads(meta)
    meta = {} if meta is None else meta if isinstance(meta, dict) else {"meta": meta}
    if isinstance(row.get("text"), str):
        meta = {**meta, "reasoning": split_judgelm_text(row["text"])}
    return meta


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if ours in TEXTS and theirs not in row:
            raise UsageError(f"{where} has no column '{theirs}' ({ours}). {_there_are(row)}")
    gone = {*columns, *columns.values()}
    kept = {key: value for key, value in row.items() if key not in gone}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _there_are(row: Row) -> str:
    return f"There are: {_listed(row)}." if row else "There are none."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# ----------------------------------------------------------------------------------- forms of rows


def _in_our_form(row: Row, scores: str, where: str) -> Row:
    if "reward_model" in row:
        return _from_verl(row, where)
    if "chosen" in row and "rejected" in row:
        return _from_trl(row, where)
    if any(name in row for name in TEXTS.values()):
        return _from_judgelm(row, scores)
    return row


def _from_judgelm(row: Row, scores: str) -> Row:
    text = "text" if scores == "score" else "text_w_reference"
    lacks = row.get(scores) is None and row.get("preference") is None
    if scores != "score" and lacks:
        raise _Unusable("no_scores")
    ours = {name: row[theirs] for name, theirs in TEXTS.items() if theirs in row}
    return ours | row | {"score": row.get(scores), "text": row.get(text)}


def _from_verl(row: Row, where: str) -> Row:
    reward, extra = row["reward_model"], row.get("extra_info")
    if not isinstance(reward, dict) or "ground_truth" not in reward:
        raise UsageError(f"{where}: 'reward_model' must hold 'ground_truth', got {reward!r}.")
    holders = (d for d in (extra, row) if isinstance(d, dict) and d.keys() >= TEXTS.keys())
    texts = next(holders, None) or _texts_of_prompt(row, where)
    truth = reward["ground_truth"]
    label = truth if isinstance(truth, dict) else {"score": truth}
    known = ("score", "score_1", "score_2", "preference")
    kept = {"ground_truth": truth, "extra_info": extra}
    return {
        **{name: texts[name] for name in TEXTS},
        **{name: label[name] for name in known if name in label},
        **({"score": label["solution_text_format"]} if "solution_text_format" in label else {}),
        "text": label.get("statements"),  # the authors' name for JudgeLM's `text`
        "source": row.get("data_source"),
        "meta": _meta({"meta": row.get("meta")}) | {k: v for k, v in kept.items() if v is not None},
    }


def _texts_of_prompt(row: Row, where: str) -> Row:
    """Take a filled-in prompt apart, where that is possible in one way only."""
    prompt = _flattened(_messages(row, "prompt", "user", where))
    for name in ("judgelrm_train", "judgelrm_eval"):
        first, last = (pattern.fullmatch(prompt) for pattern in _patterns(name))
        if first and last:
            if first.groupdict() != last.groupdict():
                raise _Unusable("ambiguous_prompt")
            return first.groupdict()
    raise _Unusable("unknown_prompt")


@functools.cache
def _patterns(template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Match with every text as short, and as long, as it can be: equal if there is one way only."""
    pieces = re.split(r"\{(\w+)\}", PAIR_TEMPLATES[template])

    def pattern(some: str) -> re.Pattern[str]:
        texts = (f"(?P<{name}>{some})" for name in pieces[1::2])
        literals = map(re.escape, pieces[::2])
        zipped = itertools.zip_longest(literals, texts, fillvalue="")
        return re.compile("".join(itertools.chain.from_iterable(zipped)), re.DOTALL)

    return pattern(".*?"), pattern(".*")


def _from_trl(row: Row, where: str) -> Row:
    """Put the two answers into an order that their texts alone decide, not which one is better.

    The better one first would teach a lean to the first answer.
    """
    chosen, rejected = (_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    turns = itertools.takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
    shared = [turn for turn, _ in turns]
    while shared and shared[-1][0] != "user":
        shared.pop()
    question = _flattened(_context(row, shared, where))
    texts = [_flattened(answer[len(shared) :]) for answer in (chosen, rejected)]
    if not all(len(answer) > len(shared) for answer in (chosen, rejected)):
        raise _Unusable("missing_text")
    if texts[0] == texts[1]:
        raise _Unusable("same_answers")
    first, second = sorted((0, 1), key=texts.__getitem__)
    digest = hashlib.sha256(json.dumps([question, texts[first], texts[second]]).encode()).digest()
    if digest[0] % 2:
        first, second = second, first
    given = (row.get("score_chosen"), row.get("score_rejected"))
    return {
        **{"question": question, "answer_1": texts[first], "answer_2": texts[second]},
        **{"score_1": given[first], "score_2": given[second], "preference": 1 + first},
        **{"source": row.get("source"), "meta": row.get("meta")},
    }


def _context(row: Row, shared: Messages, where: str) -> Messages:
    """Return the turns before the answers: `prompt`, and those with which both answers begin."""
    key = "prompt" if row.get("prompt") is not None or "question" not in row else "question"
    if row.get(key) is None and shared:
        return shared
    prompt = _messages(row, key, "user", where)
    is_repeated = prompt in (shared[: len(prompt)], shared[-len(prompt) :])
    return shared if is_repeated else prompt + shared


def _messages(row: Row, name: str, role: str, where: str) -> Messages:
    """Read text, or a list of {role, content}, as messages."""
    if not isinstance(row.get(name), list):
        return [(role, _text(row, name, where))]
    messages = []
    for message in row[name]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"{where}: '{name}' must be text or a list of {{role, content}}, got {message!r}."
            )
        messages.append((message["role"], _text(message, "content", f"{where}: '{name}'")))
    if not messages:
        raise UsageError(f"{where}: '{name}' is an empty list, wanted text or messages.")
    return messages


def _flattened(messages: Messages) -> str:
    """Write messages as one text: a single one as it is, several under the names of their roles."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in messages)


# ----------------------------------------------------------------------------------------- sources


def _open(source: str, columns: Mapping[str, str]) -> Rows:
    name, split = _without_split(source)
    if "://" in name:
        path = _local_copy(name)
    elif name.startswith("hf:"):
        return _numbered(_hub_rows(name.removeprefix("hf:"), split))
    elif name.startswith("tfds:"):
        return _numbered(_tfds_rows(name.removeprefix("tfds:"), split))
    else:
        path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _numbered(_directory_rows(path, split))
    os.stat(path)  # no such file: said before anything else
    if split:
        raise UsageError(f"{name} is a plain file, which has no splits: leave out '#{split}'.")
    return _file_rows(path, name, columns)


def _without_split(source: str) -> tuple[str, str]:
    name, _, split = source.rpartition("#")
    is_path = os.path.exists(os.path.expanduser(source))
    return (source, "") if is_path or not name else (name, split)


def _checked_rows(source: str, columns: Mapping[str, str]) -> Rows:
    """Say in one sentence whatever the file system or a library raises while it reads."""
    try:
        yield from _open(source, columns)
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text: {error}.") from None
    except Exception as error:  # dataset libraries and file systems raise anything
        name = _without_split(source)[0]
        is_directory = os.path.isdir(os.path.expanduser(name))
        is_file = not is_directory and not name.startswith(("hf:", "tfds:"))
        what, advice = "the data file" if is_file else "the dataset", ""
        if name.startswith("hf:"):
            advice = " Check name, split and connection; a gated one needs `hf auth login`."
        elif isinstance(error, FileNotFoundError) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            advice = f" For a dataset on the Hugging Face hub write hf:{name}."
        raise UsageError(f"Cannot read {what} {source}: {_reason(error)}.{advice}") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip()
    if isinstance(error, FileNotFoundError) and " " not in text:  # fsspec: the path alone
        return "No such file or directory"
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _with_progress(rows: Rows, source: str) -> Rows:
    yield from itertools.islice(rows, MANY_ROWS)
    for row in rows:  # there are more
        from tqdm import tqdm

        rest = itertools.chain([row], rows)
        yield from tqdm(rest, desc=source, unit=" rows", initial=MANY_ROWS, mininterval=1)


def _numbered(rows: Iterable[Row]) -> Rows:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _file_rows(path: pathlib.Path, name: str, columns: Mapping[str, str]) -> Rows:
    kind = pathlib.Path(path.name.lower().removesuffix(".gz")).suffix
    if kind in (".jsonl", ".json"):
        return _json_rows(path, name, may_be_list=kind == ".json")
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, name, "," if kind == ".csv" else "\t", columns)
    if path.name.lower().endswith(".parquet"):
        return _numbered(_parquet_rows(path))
    raise UsageError(f"{name} is in no format that is understood. Wanted {FORMATS}.")


def _open_text(path: pathlib.Path) -> TextIO:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")  # spreadsheets write the mark


def _json_rows(path: pathlib.Path, name: str, may_be_list: bool) -> Rows:
    with _open_text(path) as file:
        if may_be_list and file.read(4096).lstrip().startswith("["):
            file.seek(0)
            yield from _numbered(_from_json(file.read(), name))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _from_json(line, f"{name}, line {number}")


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON: {error}.") from None


def _csv_rows(path: pathlib.Path, name: str, delimiter: str, columns: Mapping[str, str]) -> Rows:
    numbers = {columns.get(name, name) for name in NUMBERS} | {"score_chosen", "score_rejected"}
    csv.field_size_limit(2**31 - 1)  # answers may be longer than the module's 128 KiB
    with _open_text(path) as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(lines, [])
        for number, cells in enumerate(lines, 1):
            if cells and len(cells) != len(header):
                wanted = f"{len(cells)} cells, the header has {len(header)}"
                raise UsageError(f"{name}, row {number} has {wanted}.")
            row = zip(header, cells, strict=False)
            if cells:
                yield f"row {number}", {k: _cell(v) if k in numbers else v or None for k, v in row}


def _cell(text: str) -> Any:
    """Read a number or a list of numbers; what is neither stays text, for the checks to refuse."""
    try:
        return None if not text else json.loads(text) if text.startswith("[") else float(text)
    except (ValueError, RecursionError):
        return text


def _parquet_rows(path: pathlib.Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from map(_plain_row, batch.to_pylist())


def _directory_rows(path: pathlib.Path, split: str) -> Iterator[Row]:
    if (path / "features.json").exists() and (path / "dataset_info.json").exists():
        return _tfds_rows(path, split)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved_rows(path, split)
    return _hub_rows(path, split)


def _tfds_rows(name: str | pathlib.Path, split: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    if isinstance(name, str):
        return map(_tfds_row, tfds.data_source(name, split=split or "train"))
    builder: Any = tfds.builder_from_directory(name)
    return map(_tfds_row, builder.as_data_source(split or "train"))


def _saved_rows(path: pathlib.Path, split: str) -> Iterator[Row]:
    import datasets

    saved: Any = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):  # which may know the name of its split
        saved = {str(saved.split or "train"): saved}
        split = split or next(iter(saved))
    lengths = {str(name): len(rows) for name, rows in saved.items()}
    for part in datasets.ReadInstruction.from_spec(split or "train").to_absolute(lengths):
        rows = saved[part.splitname].select(range(part.from_, part.to))
        yield from map(_plain_row, rows)


def _hub_rows(name: str | pathlib.Path, split: str) -> Iterator[Row]:
    import datasets

    path, revision, config = str(name), None, None
    if isinstance(name, str):
        found = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", name)
        if not found:
            raise UsageError(f"hf:{name} names no dataset: wanted hf:ORG/NAME@REVISION:CONFIG.")
        path, revision, config = found.groups()
    rows: Any = datasets.load_dataset(path, config, revision=revision, split=split or "train")
    return map(_plain_row, rows)


def _plain_row(row: Row) -> Row:
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it. A null in an Arrow struct means that the row lacks the key."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(_shortest(value.item()) if value.dtype == np.float32 else value.item())
    if isinstance(value, bytes):
        return value.decode(
            errors="surrogateescape"
        )  # seen, and dropped, if it is one of our texts
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _tfds_row(row: Row) -> Row:
    """Read a TFDS row, in which a missing score is NaN and a missing preference -1."""
    plain = _plain_row(row)
    for name, value in plain.items():
        if isinstance(value, float):
            plain[name] = None if math.isnan(value) else _shortest(value)
        elif name == "preference" and value == -1:
            plain[name] = None
    return plain


def _shortest(value: float) -> float:
    """Return the number that was stored as float32: 8.1, not 8.100000381469727."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _local_copy(url: str) -> pathlib.Path:
    """Copy a file or prepared directory into the cache, unless it is there in the same version."""
    system, root = _file_system(url)
    files = _remote_files(system, root, url)
    parent, _, base = root.rpartition("/")
    version = hashlib.sha256(json.dumps([url, files]).encode()).hexdigest()[:32]
    cache = pathlib.Path(os.environ.get("JLRM_CACHE") or "~/.cache/jlrm").expanduser()
    cached = cache / version / base
    if cached.exists():
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole, so that an interrupted copy is never read.
    with tempfile.TemporaryDirectory(dir=cache, prefix="incomplete-") as holder:
        whole = pathlib.Path(holder) / "whole"
        local = [whole / name[len(parent) :].lstrip("/") for name in files]
        for path in local:
            path.parent.mkdir(parents=True, exist_ok=True)
        system.get(list(files), [str(path) for path in local])
        try:
            whole.rename(cache / version)
        except OSError:
            if not cached.exists():  # else another process has just made the same copy
                raise
    return cached


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(url.split("://")[0])
        advice = f" Do: pip install {package}" if package else ""
        raise UsageError(f"Cannot read {url}: {_reason(error)}.{advice}") from None
    system.invalidate_cache()
    return system, root.rstrip("/")


def _remote_files(system: Any, root: str, url: str) -> dict[str, list[str]]:
    """Return the names of the files, each with what changes when the file does."""
    is_directory = system.isdir(root)
    infos = system.find(root, detail=True) if is_directory else {root: system.info(root)}
    infos = {name: info for name, info in sorted(infos.items()) if info.get("type") == "file"}
    if is_directory and f"{root}/features.json" not in infos:
        raise UsageError(f"{url} is no prepared TFDS directory (no features.json), nor a file.")
    if any(".." in name.split("/") for name in infos):
        raise UsageError(f"{url} holds a file named '..', which would leave the cache.")
    return {name: [str(info.get(stamp)) for stamp in STAMPS] for name, info in infos.items()}
