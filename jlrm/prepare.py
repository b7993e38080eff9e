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
command makes the same bytes, whichever engine runs these steps: this process, whose memory holds
keys of the rows, or Apache Beam on many machines (preparation/). Train from it with
`data.train=DIR#train data.eval=DIR#validation`. A line of `dropped.jsonl`, in the order of the
inputs, says where a row stood, its id and the reason; every row that was read is there, or in a
split.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jlrm
from jlrm.config import UsageError
from jlrm.data.comparisons import REASONS
from jlrm.data.dataset import NAME, building, write_info
from jlrm.judgement import labels
from jlrm.preparation import local
from jlrm.preparation.curation import statistics
from jlrm.preparation.recipe import Checks, Recipe, fingerprints
from jlrm.runtime import commands
from jlrm.runtime.storage import LAST_FILES, Place, open_place

OWN_FILES = {"dropped.jsonl", "statistics.json", "preparation.json"}  # beside the dataset's
# Messages of the parts used here name settings of a training config.
FLAGS = {
    "data.columns": "--columns",
    "data.values": "--values",
    "data.prompt": "--prompt",
    "model.tokenizer": "--tokenizer",
}


def prepare(
    recipe: Recipe, out: str, beam_flags: Sequence[str] | None = None
) -> tuple[dict[str, Any], bool]:
    """Write the dataset of a recipe into a directory, or to a url that fsspec knows.

    Args:
      beam_flags: of Apache Beam, which then does the work; None: this process does it.

    Returns:
      the statistics, and whether this very dataset was there already.

    Raises:
      UsageError: anything the user can mend.
      OSError, RunError: the file system, the store or Beam's runner refuses.
    """
    job = None if beam_flags is None else _beam()
    place = open_place(out)
    checks = Checks.of(recipe)
    if files := place.files():
        # Inputs that are no local files are read for their fingerprints, and once more if need be.
        preparation = _describe(recipe, checks, fingerprints(recipe))
        if before := statistics_of(preparation, place):
            return before, True
        place.remove(files)
    with building(place) as directory:
        if job is None:
            outcome = local.run(recipe, checks, directory)
        else:
            target = place.name if place.is_remote else str(directory)
            outcome = job.run(recipe, directory, target, beam_flags or ())
        write_info(directory, outcome.shards)
        described = {
            "statistics": statistics(outcome, is_measured=bool(recipe.tokenizer)),
            "preparation": _describe(recipe, checks, outcome.fingerprints),
        }
        for name, content in described.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (directory / f"{name}.json").write_text(text, encoding="utf-8")
    return described["statistics"], False


def _beam() -> Any:
    try:
        from jlrm.preparation import job
    except ImportError as error:
        if not str(error.name).startswith("apache_beam"):
            raise
        raise UsageError(
            "--engine beam needs Apache Beam, which is not installed. Do: pip install 'jlrm[beam]'"
        ) from None
    return job


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


def _describe(recipe: Recipe, checks: Checks, fingerprints: Mapping[str, int]) -> dict[str, Any]:
    """Return what decides the dataset: the settings, the contents of all it reads, the version."""
    digests = {}
    for source in recipe.input:
        digests[source] = _digest(source, [f"{fingerprints.get(source, 0):x}"])
    for source in recipe.against:
        read_of_it = (text for text, owner in checks.questions.items() if owner == source)
        digests[source] = _digest(source, read_of_it)
    if checks.tokenizer_dir is not None:
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = [checks.tokenizer_dir / name for name in names]
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


# ---------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, prepare, and print what came of it."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, beam_flags = (words[:cut], words[cut + 1 :]) if (cut := _cut(words)) else (words, [])
    args = _parser().parse_args(own)
    if beam_flags and args.engine != "beam":
        raise UsageError(f"{beam_flags[0]} after -- is a flag of Beam's: add --engine beam.")
    if args.tokenizer is None and (args.prompt or args.max_prompt_tokens):
        flag = "--prompt" if args.prompt else "--max-prompt-tokens"
        raise UsageError(f"{flag} needs --tokenizer, with which prompts are measured.")
    given = {name: value for name, value in vars(args).items() if value is not None}
    out, as_json, engine = given.pop("out"), given.pop("json"), given.pop("engine")
    given |= commands.read_pair_flags(args)
    start = time.perf_counter()
    try:
        given["values"] = labels.meanings(given["values"])
        statistics, was_there = prepare(
            Recipe(**given), out, beam_flags if engine == "beam" else None
        )
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


def _cut(words: Sequence[str]) -> int:
    """Return where the flags of Beam begin, 0 where there are none."""
    return words.index("--") if "--" in words else 0


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
    commands.add_pair_flags(parser)
    add("--scores", choices=["score", "score_w_reference"], help="gold of JudgeLM rows")
    add("--validation", type=float, metavar="SHARE", help="of the questions to hold out (0.02)")
    add("--swap", action="store_true", help="add each training row in the other order")
    add("--tokenizer", metavar="DIR", help="or hub id; too long prompts are left out")
    add("--prompt", metavar="NAME", help="template of these prompts (judgelrm_train)")
    add("--max-prompt-tokens", type=int, metavar="N", help="of the longest prompt (1024)")
    add("--against", nargs="+", metavar="SRC", help="benchmarks, whose questions are left out")
    add("--ngram", type=int, metavar="N", help="words of an n-gram, to find known questions (13)")
    add("--overlap", type=float, metavar="SHARE", help="of n-grams that marks one (0.5)")
    engines = "this process (local), or Apache Beam with its own flags after --, e.g. -- --runner"
    add("--engine", choices=["local", "beam"], default="local", help=f"{engines} DataflowRunner")
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
