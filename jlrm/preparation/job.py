"""The engine that hands the work to Apache Beam, on this machine or on many: pipeline.py's steps.

This process reads no row. It says what is wrong as the local engine does: what workers found wrong
in an input comes back to it, and of several such sentences the one of the earliest row is said.
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import pathlib
import pickle
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]

from jlrm.config import RunError, UsageError, nearest
from jlrm.data import readers
from jlrm.data.contamination import warn_of_benchmark
from jlrm.data.dataset import Shard
from jlrm.preparation.curation import Differing, Prepared, check_any, check_heldout
from jlrm.preparation.pipeline import RESULT, Result, Said, build, file_name
from jlrm.preparation.recipe import Recipe, is_local
from jlrm.runtime.storage import Place, first_line, open_place

# Beam's default, DirectRunner, begins by downloading another one.
IN_PROCESS = "FnApiRunner"


def run(recipe: Recipe, directory: pathlib.Path, target: str, flags: Sequence[str]) -> Prepared:
    """Write the splits of a recipe into `target`, and the rows that it drops into a directory.

    Args:
      directory: of this machine.
      target: the same directory, or an empty place of a store.
      flags: of Beam: the runner and what it needs.

    Raises:
      UsageError: a flag, or an input that can't be used, or one that leaves nothing.
      RunError: the runner failed.
    """
    options = _options(flags)
    for source in recipe.input:
        warn_of_benchmark(source)
    units = [
        (number, piece, not is_local(source))
        for number, source in enumerate(recipe.input)
        for piece in readers.pieces(source)
    ]
    _execute(recipe, units, target, options)
    place = open_place(target)
    result: Result = pickle.loads(_taken(place, RESULT))
    fingerprints = _check_inputs(recipe, result.said)
    check_any(result.counts)
    check_heldout(result.num_questions, recipe.validation)
    shards = _shards(place, result.shards)
    with open(directory / "dropped.jsonl", "wb") as lines:
        for number in range(len(shards.pop("dropped", []))):
            lines.write(_taken(place, file_name("dropped", number, 0)))
    found = dict(result.rows)
    examples = [[found[at] for at in sorted(each.values())] for each in result.examples]
    num_pairs, num_opposite = (result.counts["pairs", kind, ""] for kind in ("all", "opposite"))
    differing = Differing(num_pairs, num_opposite, examples)
    by_split = {split: shards[split] for split in recipe.splits()}
    return Prepared(result.counts, by_split, differing, fingerprints)


def _check_inputs(recipe: Recipe, said: list[Said]) -> dict[str, int]:
    """Raise what reading one input after the other would have raised; return the fingerprints."""
    fingerprints: dict[str, int] = {}
    for number, source in enumerate(recipe.input):
        mine = sorted((each for each in said if each.source == number), key=lambda s: s.piece)
        if error := next((each.error for each in mine if each.error), ""):
            raise UsageError(error)
        readers.check_whole(source, [each.seen for each in mine])
        if not is_local(source):
            total = sum(each.fingerprint for each in mine)
            fingerprints[source] = fingerprints.get(source, 0) + total
    return fingerprints


def _shards(
    place: Place, written: Iterable[tuple[str, int, Shard]]
) -> collections.defaultdict[str, list[Shard]]:
    """Return shards by split, in order.

    Raises:
      RunError: one of them is not there.
    """
    shards: collections.defaultdict[str, list[Shard]] = collections.defaultdict(list)
    for split, _, shard in sorted(written):
        shards[split].append(shard)
    there = place.files()
    for split, part in shards.items():
        for number in range(len(part)):
            if (name := file_name(split, number, len(part))) not in there:
                raise RunError(
                    f"The workers wrote {name}, and {place.name} does not have it: --out must be a "
                    "place that all machines share, such as gs://BUCKET/DIR."
                )
    return shards


def _taken(place: Place, name: str) -> bytes:
    """Return a file that the workers have left for this process, and remove it."""
    try:
        content = place.system.cat_file(f"{place.root}/{name}")
    except FileNotFoundError:
        raise RunError(
            f"Beam's job has ended, and {place.name} does not hold what it found: --out must be a "
            "place that all machines share, such as gs://BUCKET/DIR."
        ) from None
    place.remove([name])
    return content


# ------------------------------------------------------------------------------------------ running


def _options(flags: Sequence[str]) -> Any:
    """Read Beam's flags.

    Raises:
      UsageError: a value that Beam refuses, or a flag that is no flag of it.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = pipeline_options.PipelineOptions(list(flags))
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit as stop:  # of argparse, after "usage: ... error: ..."
        if not stop.code:  # --help
            raise
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise UsageError(f"Beam's flags {' '.join(flags)}: {reason}.") from None
    standard = options.view_as(pipeline_options.StandardOptions)
    standard.runner = standard.runner or IN_PROCESS
    known = pipeline_options.PipelineOptions([]).get_all_options()
    unknown = [flag for flag in given if flag not in known]
    # Flink's and Spark's job servers have more flags than Beam knows here.
    if unknown and standard.runner in (IN_PROCESS, "DirectRunner"):
        raise UsageError(f"Beam has no flag --{unknown[0]}. {nearest(unknown[0], known)}")
    return options


def _execute(recipe: Recipe, units: list[Any], target: str, options: Any) -> None:
    runner = options.view_as(pipeline_options.StandardOptions).runner
    # A remote job's progress is in its log; what the in-process runner warns of helps nobody.
    logging.getLogger("apache_beam").setLevel(
        logging.ERROR if runner == IN_PROCESS else logging.INFO
    )
    print(f"Beam's runner {runner} has {len(units)} pieces to read.", file=sys.stderr)
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline, recipe, units, target)
        job = pipeline.run()
        try:
            state = job.wait_until_finish()
        except KeyboardInterrupt:
            with contextlib.suppress(Exception):  # the in-process runner can't, and has ended
                job.cancel()
            raise
    except (ImportError, ValueError) as error:  # no such runner, or one that lacks a flag
        raise UsageError(f"Beam's runner {runner}: {first_line(error)}.") from None
    except Exception as error:  # runners raise anything; the last line is what a worker raised
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise RunError(f"Beam's runner {runner} failed: {reason}") from None
    if state is not None and state != "DONE":
        raise RunError(f"Beam's runner {runner} ended in the state {state}. See its logs.")
