"""Make one checked dataset to train from out of comparisons from anywhere.

    python -m jlrm.prepare --input SRC [SRC ...] --out DIR [--against BENCHMARK [...]] [--swap]

    1  read           every input; rows its reader can't use are kept in the list of dropped ones
    2  deduplicate    the same two answers to the same question, with the same label
    3  decontaminate  questions that hold a benchmark's, or most of whose word n-grams it has
    4  measure        prompts that are too long for training; with --swap, in either order
    5  split          whole questions into `validation`, by their hash
    6  swap           each training row is followed by itself in the other order
    7  count          rows, sources, labels, scores, lengths, and pairs with opposite labels
    8  write          a TFDS ArrayRecord dataset, the dropped rows, and the counts

DIR appears whole or not at all. It holds no times, and no paths but those of the inputs: the same
command makes the same bytes. Train from it with `data.train=DIR#train data.eval=DIR#validation`.
A line of `dropped.jsonl` says where a row stood, its id and the reason; every row that was read is
there, or in a split.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import jlrm
from jlrm.config import UsageError
from jlrm.data import readers
from jlrm.data.comparisons import (
    REASONS,
    Comparison,
    Dropped,
    count_reasons,
    describe_dropped,
    write_dropped,
)
from jlrm.data.contamination import Benchmarks, read_benchmarks, warn_of_benchmark
from jlrm.data.curation import (
    counted,
    describe,
    differing_labels,
    duplicates,
    percentiles,
    prompt_tokens,
    sift,
    split,
    with_swapped,
)
from jlrm.data.dataset import NAME, write_to
from jlrm.data.tokenizer import load_tokenizer
from jlrm.judgement import labels
from jlrm.runtime import commands, settings
from jlrm.runtime.storage import LAST_FILES, Place, open_place

OWN_FILES = {"dropped.jsonl", "statistics.json", "preparation.json"}  # beside the dataset's
# Messages of the parts used here name settings of a training config.
FLAGS = {
    "data.columns": "--columns",
    "data.values": "--values",
    "data.prompt": "--prompt",
    "model.tokenizer": "--tokenizer",
}


@dataclass(frozen=True)
class Recipe:
    """What is prepared from what, and how; the fields are the command's flags."""

    input: Sequence[str]
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, int] = dataclasses.field(default_factory=dict)
    scores: str = "score"
    validation: float = 0.02  # share of questions; 0: no validation split
    swap: bool = False
    tokenizer: str = ""  # empty: prompts are not measured
    prompt: str = "judgelrm_train"
    max_prompt_tokens: int = 1024
    against: Sequence[str] = ()
    ngram: int = 13  # words
    overlap: float = 0.5  # share of a question's n-grams

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation < 1.0:
            raise UsageError(
                f"--validation={self.validation} is outside [0, 1): name a share of the questions."
            )
        if not 0.0 < self.overlap <= 1.0:
            raise UsageError(
                f"--overlap={self.overlap} is outside (0, 1]: name a share of a question's n-grams."
            )
        for flag, value in (("ngram", self.ngram), ("max-prompt-tokens", self.max_prompt_tokens)):
            if value < 1:
                raise UsageError(f"--{flag}={value} is too small: at least 1.")


def prepare(recipe: Recipe, out: str) -> tuple[dict[str, Any], bool]:
    """Write the dataset of a recipe into a directory, or to a url that fsspec knows.

    Returns:
      the statistics, and whether this very dataset was there already.

    Raises:
      UsageError: anything the user can mend.
      OSError, RunError: the file system or the store refuses.
    """
    place = open_place(out)
    tokenizer_dir = _find_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    rows, dropped = read(recipe)
    benchmarks = read_benchmarks(recipe.against, recipe.ngram)
    preparation = _describe(recipe, rows, benchmarks, tokenizer_dir)
    if before := statistics_of(preparation, place):
        return before, True

    statistics: dict[str, Any] = {"rows_read": len(rows) + len(dropped)}
    rows = sift(rows, duplicates(rows), dropped)
    contaminated = benchmarks.find([row.question for row in rows], recipe.overlap)
    rows = sift(rows, [reason for reason, _ in contaminated], dropped)
    if tokenizer:
        rows, statistics["prompt_tokens"] = _without_overlong(rows, recipe, tokenizer, dropped)
    if not rows:
        raise UsageError(
            f"No row is left of {statistics['rows_read']}: {describe_dropped(dropped)}. "
            "Name other inputs, or relax the settings that leave them out."
        )
    splits = split(rows, recipe.validation)
    if recipe.swap:
        splits["train"] = with_swapped(splits["train"])
    statistics |= {
        **differing_labels(rows),
        "rows_kept": len(rows),
        "dropped": count_reasons(dropped),
        "contaminated_by": counted(source for _, source in contaminated if source),
        "splits": {name: describe(part) for name, part in splits.items()},
    }
    write(place, splits, dropped, statistics, preparation)
    return statistics, False


def _without_overlong(
    rows: list[Comparison], recipe: Recipe, tokenizer: Any, dropped: list[Dropped]
) -> tuple[list[Comparison], dict[str, Any]]:
    """Return the rows whose prompts fit, and percentiles of their lengths in tokens."""
    counts = prompt_tokens(rows, tokenizer, recipe.prompt, both_orders=recipe.swap)
    is_overlong = [count > recipe.max_prompt_tokens for count in counts]
    kept = sift(rows, ["overlong" if over else "" for over in is_overlong], dropped)
    lengths = (count for count, over in zip(counts, is_overlong, strict=True) if not over)
    return kept, percentiles(lengths)


# ---------------------------------------------------------------------------------- 1 read


def read(recipe: Recipe) -> tuple[list[Comparison], list[Dropped]]:
    """Read every input. Scores are rounded to float32, as they are stored.

    Dropped on top of what the readers drop: "unstorable_scores", too large for float32, or two that
    differ by less than it can tell.
    """
    rows: list[Comparison] = []
    dropped: list[Dropped] = []
    for source in recipe.input:
        warn_of_benchmark(source)
        given = readers.read(
            source, columns=recipe.columns, values=recipe.values, scores=recipe.scores
        )
        dropped += given.dropped
        stored = [_as_stored(row) for row in given.rows]
        reasons = [
            "" if _order(after) == _order(before) else "unstorable_scores"
            for after, before in zip(stored, given.rows, strict=True)
        ]
        rows += sift(stored, reasons, dropped)
    return rows, dropped


def _as_stored(row: Comparison) -> Comparison:
    if row.scores is None:
        return row
    with np.errstate(over="ignore"):  # `_order` sees the infinity
        first, second = (float(str(np.float32(score))) for score in row.scores)
    return dataclasses.replace(row, score_1=first, score_2=second)


def _order(row: Comparison) -> tuple[bool, ...] | None:
    """Return what of the scores must survive rounding: they are finite, and one is higher."""
    if row.scores is None:
        return None
    first, second = row.scores
    return max(row.scores) < math.inf, first > second, first < second


# ---------------------------------------------------------------------------------- 8 write


def statistics_of(preparation: dict[str, Any], place: Place) -> dict[str, Any] | None:
    """Return the statistics of this preparation if its dataset is there, None if nothing is.

    Raises:
      UsageError: something else is there.
    """
    files = place.files()
    if not files or _is_torn(place, files):
        return None
    if not place.holds_dataset(files) or not files >= {"preparation.json", "statistics.json"}:
        some = ", ".join(sorted(files)[:3])
        raise UsageError(
            f"{place.name} is not empty, and is no prepared dataset (it holds {some}). "
            "Name another --out, or delete it."
        )
    before = place.read_json("preparation.json")
    keys = [key for key in preparation if before.get(key) != preparation[key]]
    if keys:
        words = {"sha256": "content of what it reads", "jlrm": "version of jlrm"}
        changed = ", ".join(words.get(key, "--" + key.replace("_", "-")) for key in keys)
        raise UsageError(
            f"{place.name} holds a dataset prepared with another {changed}. "
            "Name another --out, or delete it."
        )
    return place.read_json("statistics.json")


def _is_torn(place: Place, files: set[str]) -> bool:
    """Return whether these are files of an interrupted upload and no others."""
    rest = files - OWN_FILES - {*LAST_FILES}
    is_ours = all(name.startswith(f"{NAME}-") for name in rest)
    return place.is_remote and is_ours and not place.holds_dataset(files)


def write(
    place: Place,
    splits: dict[str, list[Comparison]],
    dropped: list[Dropped],
    statistics: dict[str, Any],
    preparation: dict[str, Any],
) -> None:
    """Write the dataset with what belongs to it; `statistics` gets its "bytes"."""

    def add_files(directory: pathlib.Path) -> None:
        records = directory.glob(f"{NAME}-*")
        statistics["bytes"] = sum(file.stat().st_size for file in records)
        write_dropped(dropped, directory / "dropped.jsonl")
        for name, content in (("statistics", statistics), ("preparation", preparation)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (directory / f"{name}.json").write_text(text, encoding="utf-8")

    write_to(place, splits, add_files)


def _describe(
    recipe: Recipe,
    rows: Sequence[Comparison],
    benchmarks: Benchmarks,
    tokenizer_dir: pathlib.Path | None,
) -> dict[str, Any]:
    """Return what decides the dataset: the settings, the contents of all it reads, the version."""
    digests = {}
    for source in recipe.input:
        read_of_it = (repr(row) for row in rows if row.where.source == source)
        digests[source] = _digest(source, read_of_it)
    for source in recipe.against:
        read_of_it = (text for text, owner in benchmarks.questions.items() if owner == source)
        digests[source] = _digest(source, read_of_it)
    if tokenizer_dir is not None:
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = [tokenizer_dir / name for name in names]
        digests[recipe.tokenizer] = _digest_files([file for file in files if file.exists()])
    described = {"jlrm": jlrm.__version__, **dataclasses.asdict(recipe), "sha256": digests}
    return json.loads(json.dumps(described))  # as it is read back


def _digest(source: str, read_of_it: Iterable[str]) -> str:
    """Hash a file or all files of a directory, or what was read of a source that isn't local."""
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        path = pathlib.Path(source.rpartition("#")[0] or source).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        return _digest_files(sorted(file for file in path.rglob("*") if file.is_file()))
    digest = hashlib.sha256()
    for text in read_of_it:
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _digest_files(files: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_digest(str(file), ())}\n".encode())
    return digest.hexdigest()


def _find_tokenizer(source: str) -> pathlib.Path:
    from jlrm.weights import hf  # brings JAX, which nothing else here needs

    return hf.resolve(source, hf.TOKENIZER_FILES)


# ---------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, prepare, and print what came of it."""
    args = _parser().parse_args(argv)
    if args.tokenizer is None and (args.prompt or args.max_prompt_tokens):
        flag = "--prompt" if args.prompt else "--max-prompt-tokens"
        raise UsageError(f"{flag} needs --tokenizer, with which prompts are measured.")
    given = {name: value for name, value in vars(args).items() if value is not None}
    out, as_json = given.pop("out"), given.pop("json")
    given |= settings.pair_flags(args)
    start = time.perf_counter()
    try:
        given["values"] = labels.meanings(given["values"])
        statistics, was_there = prepare(Recipe(**given), out)
    except UsageError as error:
        raise UsageError(_in_flags(str(error))) from None
    seconds = time.perf_counter() - start
    rate = f"{statistics['rows_read'] / seconds:.0f} rows/s, {seconds:.1f} s"
    done = f"{out} is already prepared." if was_there else f"Written: {out} ({rate})"
    if as_json:
        print(done, file=sys.stderr)
        print(json.dumps(statistics, ensure_ascii=False))
    else:
        print("\n".join([*_table(statistics), done]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.prepare",
        description="Make one checked dataset to train from out of comparisons from anywhere.",
        epilog="Train from it with data.train=DIR#train data.eval=DIR#validation.",
    )
    add = parser.add_argument
    source = "a file, directory, url, hf:ORG/NAME or tfds:NAME, #SPLIT after it"
    add("--input", required=True, nargs="+", metavar="SRC", help=source)
    add("--out", required=True, metavar="DIR", help="directory to be made, or a url such as gs://")
    settings.add_pair_flags(parser)
    add("--scores", choices=["score", "score_w_reference"], help="gold of JudgeLM rows")
    add("--validation", type=float, metavar="SHARE", help="of the questions to hold out (0.02)")
    add("--swap", action="store_true", help="add each training row in the other order")
    add("--tokenizer", metavar="DIR", help="or hub id; too long prompts are left out")
    add("--prompt", metavar="NAME", help="template of these prompts (judgelrm_train)")
    add("--max-prompt-tokens", type=int, metavar="N", help="of the longest prompt (1024)")
    add("--against", nargs="+", metavar="SRC", help="benchmarks, whose questions are left out")
    add("--ngram", type=int, metavar="N", help="words of an n-gram, to find known questions (13)")
    add("--overlap", type=float, metavar="SHARE", help="of n-grams that marks one (0.5)")
    add("--json", action="store_true", help="statistics as one JSON object on stdout")
    return parser


def _in_flags(message: str) -> str:
    for setting, flag in FLAGS.items():
        message = message.replace(setting, flag)
    return message


def _table(statistics: dict[str, Any]) -> Iterator[str]:
    """Return lines that add up: rows read, less each reason, are the rows kept."""
    yield f"{'read':26}{statistics['rows_read']:>10}"
    for reason, count in statistics["dropped"].items():
        # The word stands in dropped.jsonl; what it means stands beside it.
        yield f"  {reason:24}{-count:>10}   rows {REASONS.get(reason, reason)}"
    yield f"{'kept':26}{statistics['rows_kept']:>10}"
    for name, part in statistics["splits"].items():
        labels = ", ".join(f"{label}: {count}" for label, count in part["labels"].items())
        yield f"  {name:24}{part['rows']:>10}   {labels}"
    if differing := statistics["pairs_with_differing_labels"]:
        opposite = statistics["pairs_with_opposite_labels"]
        what = f"same answers to the same question; {opposite} of them once 1 and once 2"
        yield f"{'pairs of differing labels':26}{differing:>10}   {what}"
        for pair in statistics["examples_of_differing_labels"]:
            said = ", ".join(f"{row['label'] or 'tie'} ({row['where']})" for row in pair["rows"])
            yield f"  {pair['question']!r}: {pair['answer_1']!r} or {pair['answer_2']!r}: {said}"
    yield f"{'bytes':26}{statistics['bytes']:>10}"


if __name__ == "__main__":
    commands.finish(main)
