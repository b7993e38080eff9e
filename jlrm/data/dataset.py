"""Comparisons as a TFDS dataset of ArrayRecord files: random access by row, no TensorFlow needed.

A directory appears as a whole or not at all. (In a store, it is no dataset until it is complete.)
Rows keep their order, and the same rows give the same bytes. The last point needs care: TFDS
serialises the fields of a record in the order of a hash table, which differs between processes. So
every record is rewritten with its fields sorted. Shards are written here and not by TFDS, whose
writers keep a whole shard in memory, or need TensorFlow from 1 GB on.

Left out: reading, which is `readers.read("DIR#SPLIT")` or plain TFDS,
`tfds.builder_from_directory(DIR).as_data_source("train")`. In TFDS a missing score is NaN, a
missing preference is -1, and `meta` is a JSON object as text.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jlrm.data.comparisons import Comparison
from jlrm.runtime.storage import Place, open_place

SHARD_CHARACTERS = 100_000_000
TEXTS = ("id", "question", "answer_1", "answer_2", "source", "meta")
NAME = "comparisons"  # of the dataset; its record files begin with it


class Shard(NamedTuple):
    """What TFDS has to know of a file of records."""

    num_rows: int
    num_bytes: int


@contextlib.contextmanager
def building(place: Place) -> Iterator[pathlib.Path]:
    """Yield a directory in which a dataset is built; it is at its place when the block has ended.

    That is `DIRECTORY.partial`, renamed when it is whole, and removed if the block raises. What a
    killed process left there is removed first. For a store it is a temporary one, then copied.

    Args:
      place: does not exist yet, or is empty.

    Raises:
      OSError: the file system refuses, e.g. a full disk; nothing is at the place then.
    """
    if place.is_remote:
        with tempfile.TemporaryDirectory(prefix="jlrm-") as holder:
            yield pathlib.Path(holder)
            place.upload(pathlib.Path(holder))
        return
    directory = pathlib.Path(place.root)
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_dataset(splits: Mapping[str, Collection[Comparison]], directory: pathlib.Path) -> None:
    """Write splits of comparisons, none of them empty, into a directory that TFDS opens.

    Scores are stored as float32. Raises as `building`.
    """
    with building(open_place(str(directory))) as partial:
        shards = {
            name: write_split(partial, name, rows, len(rows), sum(map(num_characters, rows)))
            for name, rows in splits.items()
        }
        write_info(partial, shards)


def write_split(
    directory: pathlib.Path,
    split: str,
    rows: Iterable[Comparison],
    num_rows: int,
    characters: int,
) -> list[Shard]:
    """Write the rows of a split, which are read once, in their order."""
    ends = shard_ends(num_rows, characters)
    _messages()  # imports TFDS, before the bar begins
    # The whole is consumed: rows beyond the last end would be a fault of the counts.
    records = map(record, tqdm(rows, total=num_rows, desc=f"write {split}", delay=1))
    counts = [end - start for start, end in itertools.pairwise([0, *ends])]
    shards = []
    for number, count in enumerate(counts):
        path = directory / shard_name(split, number, len(ends))
        is_last = number == len(ends) - 1
        shards.append(write_shard(path, records if is_last else itertools.islice(records, count)))
    assert [shard.num_rows for shard in shards] == counts, f"{num_rows} rows were promised"
    return shards


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> Shard:
    """Write records into a file."""
    writers: Any = importlib.import_module("array_record.python.array_record_module")  # native

    num_rows = 0
    try:
        writer = writers.ArrayRecordWriter(str(path), "group_size:1")
        for each in records:
            writer.write(each)
            num_rows += 1
        writer.close()
    except RuntimeError as error:  # what array_record makes of a full disk
        raise OSError(f"Cannot write {path}: {str(error).split(';')[0]}.") from error
    return Shard(num_rows, path.stat().st_size)


def shard_ends(num_rows: int, characters: int) -> list[int]:
    """Return after how many rows of a split each of its shards ends.

    A split is one shard up to SHARD_CHARACTERS.
    """
    num_shards = min(num_rows, 1 + characters // SHARD_CHARACTERS)
    return [round(num_rows * shard / num_shards) for shard in range(1, num_shards + 1)]


def shard_name(split: str, number: int, num_shards: int) -> str:
    """Return the name of a file as TFDS looks for it."""
    return f"{NAME}-{split}.array_record-{number:05}-of-{num_shards:05}"


def num_characters(row: Comparison) -> int:
    """Return the length of a row's texts."""
    return len(row.question) + len(row.answer_1) + len(row.answer_2)


def write_info(directory: pathlib.Path, splits: Mapping[str, list[Shard]]) -> None:
    """Write what makes a directory of shards, here or elsewhere, a TFDS dataset."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    about = directory / "about"
    builder = _builder_class()(splits, data_dir=about, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    for file in pathlib.Path(builder.data_dir).iterdir():
        os.replace(file, directory / file.name)
    shutil.rmtree(about)


@functools.cache
def _builder_class() -> Any:
    """Define the builder on first use: importing TFDS costs a third of a second."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
    from tensorflow_datasets.core.splits import SplitDict

    class _Comparisons(FileReaderBuilder, skip_registration=True):
        """Questions with two answers each, and which is better."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, splits: Mapping[str, list[Shard]], **settings: Any) -> None:
            self._shards = splits
            super().__init__(**settings)

        def _info(self) -> Any:
            features: dict[str, Any] = {name: tfds.features.Text() for name in TEXTS}
            features |= {n: tfds.features.Scalar(np.float32) for n in ("score_1", "score_2")}
            features["preference"] = tfds.features.Scalar(np.int32)
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
            self.info.set_splits(
                SplitDict(
                    tfds.core.SplitInfo(
                        name=name,
                        shard_lengths=[shard.num_rows for shard in shards],
                        num_bytes=sum(shard.num_bytes for shard in shards),
                        filename_template=self._get_filename_template(split_name=name),
                    )
                    for name, shards in self._shards.items()
                )
            )

    return _Comparisons


@functools.cache
def _messages() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2


def record(row: Comparison) -> bytes:
    """Return a row as it stands in the dataset's files.

    As TFDS would encode these features, a third as quickly as is done here.
    """
    example = _messages().Example()
    feature = example.features.feature
    for name, value in _example(row).items():
        if isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode())
        elif name == "preference":
            feature[name].int64_list.value.append(value)
        else:
            feature[name].float_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def _example(row: Comparison) -> dict[str, Any]:
    return {
        "id": row.id,
        "question": row.question,
        "answer_1": row.answer_1,
        "answer_2": row.answer_2,
        "score_1": math.nan if row.score_1 is None else row.score_1,
        "score_2": math.nan if row.score_2 is None else row.score_2,
        "preference": -1 if row.preference is None else row.preference,
        "source": row.source,
        "meta": json.dumps(row.meta, ensure_ascii=False),
    }
