"""Comparisons as a TFDS dataset of ArrayRecord files: random access by row, no TensorFlow needed.

A directory appears as a whole or not at all. (In a store, it is no dataset until it is complete.)
Rows keep their order, and the same rows give the same bytes. The last point needs care: TFDS
serialises the fields of a record in the order of a hash table, which differs between processes. So
every record is rewritten with its fields sorted.

Left out: reading, which is `readers.read("DIR#SPLIT")` or plain TFDS,
`tfds.builder_from_directory(DIR).as_data_source("train")`. In TFDS a missing score is NaN, a
missing preference is -1, and `meta` is a JSON object as text.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jlrm.data.comparisons import Comparison
from jlrm.runtime.storage import Place

SHARD_CHARACTERS = 100_000_000
TEXTS = ("id", "question", "answer_1", "answer_2", "source", "meta")
NAME = "comparisons"  # of the dataset; its record files begin with it


def write_to(
    place: Place,
    splits: Mapping[str, Sequence[Comparison]],
    add_files: Callable[[pathlib.Path], None],
) -> None:
    """Write a dataset to a place, as `write_dataset` does; into a store it is copied when whole."""
    if not place.is_remote:
        write_dataset(splits, pathlib.Path(place.root), add_files)
        return
    with tempfile.TemporaryDirectory(prefix="jlrm-") as holder:
        directory = pathlib.Path(holder) / "dataset"
        write_dataset(splits, directory, add_files)
        place.upload(directory)


def write_dataset(
    splits: Mapping[str, Sequence[Comparison]],
    directory: pathlib.Path,
    add_files: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write splits of comparisons, none of them empty, into a directory that TFDS opens.

    It is built as `DIRECTORY.partial` and renamed when it is whole; what an interrupted call left
    there is removed first. Scores are stored as float32.

    Args:
      splits: rows by the name of their split.
      directory: does not exist yet, or is empty.
      add_files: writes further files into the directory it is given, before the renaming.

    Raises:
      OSError: the file system refuses, e.g. a full disk; nothing is at `directory` then.
    """
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _build(splits, partial)
    if add_files is not None:
        add_files(partial)
    os.replace(partial, directory)


def _build(splits: Mapping[str, Sequence[Comparison]], directory: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # ours is in `_numbered_examples`
    building = directory / "building"
    builder = _builder_class()(splits, data_dir=building, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    for file in pathlib.Path(builder.data_dir).iterdir():
        os.replace(file, directory / file.name)
    shutil.rmtree(building)


@functools.cache
def _builder_class() -> Any:
    """Define the builder on first use: importing TFDS costs a third of a second."""
    import tensorflow_datasets as tfds

    # GeneratorBasedBuilder keeps a whole split in memory and needs TensorFlow from 1 GB on.
    from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder

    class _SortedWriter(tfds.core.ExampleWriter):
        def write(self, path: Any, examples: Any) -> Any:
            in_order = ((key, _sorted_fields(serialized)) for key, serialized in examples)
            try:
                return super().write(path, in_order)
            except RuntimeError as error:  # what array_record makes of a full disk
                raise OSError(f"Cannot write {path}: {str(error).split(';')[0]}.") from error

    class _Comparisons(ShardBasedBuilder, skip_registration=True):
        """Questions with two answers each, and which is better."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, splits: Mapping[str, Sequence[Comparison]], **settings: Any) -> None:
            self._rows = splits
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

        def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, Any]:
            return {name: _shards(name, rows) for name, rows in self._rows.items()}

        def _example_writer(self) -> Any:
            return _SortedWriter(file_format=tfds.core.FileFormat.ARRAY_RECORD)

    return _Comparisons


def _shards(split: str, rows: Sequence[Comparison]) -> list[Callable[[], Iterator[Any]]]:
    """Return for each shard, as TFDS asks for it, what makes its rows; together they are one pass.

    A split is one shard up to SHARD_CHARACTERS.
    """
    characters = sum(len(row.question + row.answer_1 + row.answer_2) for row in rows)
    num_shards = min(len(rows), 1 + characters // SHARD_CHARACTERS)
    ends = [round(len(rows) * shard / num_shards) for shard in range(num_shards)]
    counts: list[int | None] = [end - start for start, end in itertools.pairwise(ends)]
    examples = _numbered_examples(split, rows)
    # The last takes all that is left, which ends the progress bar too.
    return [functools.partial(itertools.islice, examples, count) for count in (*counts, None)]


def _numbered_examples(
    split: str, rows: Sequence[Comparison]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(tqdm(rows, desc=f"write {split}", delay=1)):
        yield number, _example(row)


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


def _sorted_fields(serialized: bytes) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2  # made at run time
    return messages.Example.FromString(serialized).SerializeToString(deterministic=True)
