"""Run a study: trainings and evaluations from one file, then tables of what comes out.

    python -m jlrm.study STUDY.yaml [section.key=value ...] [--dry-run] [--seeds N,N] [--jobs N]
    python -m jlrm.study STUDY.yaml --topology v5e:4x4    does each training fit this slice?

    1  read     the study: runs, evaluations, tables (studies/spec.py; configs/study/)
    2  list     its commands, seed by seed, without those that are done
    3  check    every config, before the first command runs
    4  run      each command in a process of its own; a training goes on from its newest checkpoint
    5  draw     tables.json, tables.md and report.html, after every evaluation

A study that was stopped goes on with the same command. A command that failed stops the study, or,
with --keep-going, only what rests on it. On several hosts all of them run the study.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

from jlrm.config import RunError, UsageError
from jlrm.reports import contracts
from jlrm.runtime import cluster, commands, hosts, lock, settings
from jlrm.studies import cells, jobs, page, spec
from jlrm.studies.cells import Cell, Record
from jlrm.studies.spec import Study

OWN = {"run.dir": "--dir", "run.seed": "--seeds"}
TIMEOUT = 1800.0  # seconds that a host may be later than another at the end


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the study."""
    args = _parser().parse_intermixed_args(argv)
    study = spec.load(args.study)
    if args.seeds:
        study = dataclasses.replace(study, seeds=_seeds(args.seeds))
    if args.dir:
        study = dataclasses.replace(study, dir=args.dir)
    _check_overrides(study, args.overrides)
    study = dataclasses.replace(study, settings=[*study.settings, *args.overrides])
    record, flags = Record(pathlib.Path(study.dir)), _flags(args)
    wanted = cells.cells(study)
    _check_configs(wanted)
    missing = record.missing(wanted)
    if args.dry_run:
        print("\n".join(shlex.join(["python", "-m", *cell.command]) for cell in missing))
        return

    directory, is_alone = pathlib.Path(study.dir), cluster.settings(args) is None
    if args.jobs != 1 and not (is_alone and args.jobs > 1):
        raise UsageError(
            f"--jobs {args.jobs}: on one machine, a number of commands that run at once; several "
            "hosts run each command together."
        )
    logs = directory / jobs.LOGS if args.jobs > 1 else None
    if args.topology:
        _plan(study, args.topology, args.jobs, logs)
        return

    def finished(cell: Cell) -> None:
        record.add(cell)  # on every host: all write the same
        if is_alone and cell.key.startswith("evaluate/"):
            page.write(directory, page.outcome(study))

    alone = lock.sole_writer(directory) if is_alone else contextlib.nullcontext()
    with alone:
        failed = jobs.run_all(missing, flags, finished, args.keep_going, args.jobs, logs)
    with hosts.joined(args, settings.to_dict(study), TIMEOUT):
        if hosts.is_main():
            found = page.outcome(study)
            page.write(directory, found)
            print(json.dumps(contracts.encode(found)) if args.json else page.as_text(found))
            print(f"Study: {directory / page.PAGE}", file=sys.stderr)
    if failed:
        raise RunError(f"{len(failed)} of {len(missing)} commands failed or were left out.")


def _check_overrides(study: Study, overrides: Sequence[str]) -> None:
    """Read settings of the command line with every config, also those that a run's own replace.

    Raises:
      UsageError: one is wrong, or the study's own to set.
    """
    for override in overrides:
        for key, flag in OWN.items():
            if override.startswith(f"{key}="):
                raise UsageError(f"{override}: each training of a study has its own. Use {flag}.")
    for config in {run.config or study.config for run in study.runs.values() if not run.model}:
        settings.load(config, [*study.settings, *overrides])


def _check_configs(wanted: Sequence[Cell]) -> None:
    """Read every config as its training will, so that a typo in the last one costs no run.

    Raises:
      UsageError: the first mistake.
    """
    for cell in wanted:
        module, *words = cell.command
        if module == "jlrm.train":
            try:
                settings.load(words[1], words[2:])
            except UsageError as error:
                raise UsageError(f"{cell.key}: {error}") from None


def _plan(study: Study, topology: str, num_jobs: int, logs: pathlib.Path | None) -> None:
    """Plan every training for a slice, and print what each of them needs there.

    Raises:
      RunError: some do not fit, or could not be planned.
    """
    from jlrm.planning.figures import read_plan  # here, since these import JAX
    from jlrm.planning.page import verdict

    wanted = cells.plans(study, topology)
    for name in study.runs:
        cells.plan_file(study, name, topology).unlink(missing_ok=True)  # of another day
    once = list(dict.fromkeys(wanted.values()))
    failed = jobs.run_all(once, [], lambda _: None, keeps_going=True, jobs=num_jobs, logs=logs)
    for name, cell in wanted.items():
        planned = cell.key.removeprefix("plan/")
        file = cells.plan_file(study, planned, topology)
        told = verdict(read_plan(file)) if file.exists() else "Could not be planned."
        if planned != name:
            told = f"the same programs as {study.label(planned)}."
        print(f"{study.label(name)}: {told}")
    if failed:
        num_bad = sum(cell.key in {each.key for each in failed} for cell in wanted.values())
        raise RunError(
            f"{num_bad} of {len(wanted)} trainings do not fit {topology}, or have no plan."
        )


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text} is not numbers with commas between them.") from None


def _flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a run of several processes, as every command takes them."""
    names = ("distributed", "coordinator", "num_processes", "process_id")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [word for pair in pairs for word in pair]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.study",
        description="Run trainings and evaluations of one file, and draw tables of them. The same "
        "command again goes on where it was.",
    )
    add = parser.add_argument
    add("study", type=pathlib.Path, metavar="STUDY.yaml", help="configs/study/ holds ready ones")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="change a setting of all trainings, as a slice's mesh; what a run sets itself stays",
    )
    add("--dir", help="where it writes, in place of the file's dir")
    add("--seeds", metavar="N,N", help="in place of the file's seeds")
    add("--dry-run", action="store_true", help="print the commands that are to do, and run none")
    add("--keep-going", action="store_true", help="after a failure do what does not rest on it")
    add("--jobs", type=int, default=1, metavar="N", help="commands at once, on CPUs; each a log")
    add("--topology", metavar="SLICE", help="e.g. v5e:4x4: plan each training for it; run nothing")
    add("--json", action="store_true", help="print tables.json on stdout")
    cluster.add_arguments(parser)
    return parser


if __name__ == "__main__":
    commands.finish(main)
