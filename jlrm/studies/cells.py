"""The commands of a study, in order, and which of them are done.

A cell is one training or one evaluation. It is done when its command, to the letter, has ended
well on the same groups; `study.json` of the study's directory lists these. A cell that begins with
another's weights, or judges them, is done again if that one is.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from jlrm.config import RewardConfig, UsageError
from jlrm.evaluation import groups
from jlrm.evaluation.statistics.results import checksum
from jlrm.runtime import settings
from jlrm.runtime.storage import write_atomically
from jlrm.studies.spec import Study

RECORD = "study.json"
VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One command. `needs` are the keys of the cells that it rests on."""

    key: str  # "train/grpo/0", "evaluate/grpo/0/pandalm"
    command: tuple[str, ...]  # words after the interpreter
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()  # checksums of what it is done again for


def run_dir(study: Study, run: str, seed: int) -> pathlib.Path:
    """Return where a training writes."""
    return pathlib.Path(study.dir) / "runs" / run / f"seed{seed}"


def evaluation_dir(study: Study, run: str, seed: int, evaluation: str) -> pathlib.Path:
    """Return where an evaluation writes."""
    return pathlib.Path(study.dir) / "evaluations" / run / f"seed{seed}" / evaluation


def plan_file(study: Study, run: str, topology: str) -> pathlib.Path:
    """Return what the plan of a training for a slice is written to."""
    return pathlib.Path(study.dir) / "plans" / topology.replace(":", "-") / run / "plan.json"


def cells(study: Study) -> list[Cell]:
    """Return all commands: seed by seed, so that whole tables come early."""
    found = []
    for seed in study.seeds:
        for run in study.runs:
            if seed in study.seeds_of(run):
                found += _cells_of(study, run, seed)
    return found


def _cells_of(study: Study, name: str, seed: int) -> list[Cell]:
    run, found, trained = study.runs[name], [], ()
    if not run.model:
        words = [f"run.dir={run_dir(study, name, seed)}", f"run.seed={seed}"]
        needs = ()
        if run.after:
            words += ["model.preset=", f"model.path={run_dir(study, run.after, seed)}"]
            needs = (f"train/{run.after}/{seed}",)
        config = run.config or study.config
        command = ("jlrm.train", "--config", config, *study.settings, *run.settings, *words)
        trained = (f"train/{name}/{seed}",)
        found.append(Cell(trained[0], command, needs))
    for evaluation, about in study.evaluations.items():
        if about.runs and name not in about.runs:
            continue
        judge = run.model or str(run_dir(study, name, seed))
        words = ["--model", judge, "--benchmark", about.benchmark, "--name", study.label(name)]
        words += ["--data", about.data] if about.data else []
        words += ["--out", str(evaluation_dir(study, name, seed, evaluation))]
        needs = trained
        other = study.evaluations[evaluation].runs
        if run.against and (not other or run.against in other):
            shared = seed if seed in study.seeds_of(run.against) else study.seeds[0]
            words += ["--compare", str(evaluation_dir(study, run.against, shared, evaluation))]
            needs = (*needs, f"evaluate/{run.against}/{shared}/{evaluation}")
        judging, reads = run.arguments or about.judging, ()
        if about.groups:
            words += ["--groups", about.groups]
            reads = (checksum(groups.read(about.groups)),)
        key = f"evaluate/{name}/{seed}/{evaluation}"
        command = ("jlrm.evaluate", *words, *about.arguments, *judging)
        found.append(Cell(key, command, needs, reads))
    return found


def plans(study: Study, topology: str) -> dict[str, Cell]:
    """Return the command that plans each training for a slice; seeds need no plan of their own.

    Trainings whose programs are the same, since they differ in their reward alone, share the plan
    of the first. A run that begins with another's weights is planned with those of its config,
    whose shapes they have.
    """
    found: dict[str, Cell] = {}
    firsts: dict[str, Cell] = {}  # by what programs are made from
    for name, run in study.runs.items():
        if run.model:
            continue
        words = [run.config or study.config, *study.settings, *run.settings]
        out = plan_file(study, name, topology).parent
        command = ("jlrm.plan", "--config", *words, "--topology", topology, "--out", str(out))
        found[name] = firsts.setdefault(_made_from(words), Cell(f"plan/{name}", command))
    return found


def _made_from(words: Sequence[str]) -> str:
    """Return what the programs of a config are made from; of one that can't be read, its words."""
    try:
        config = settings.load(words[0], words[1:])
    except UsageError:  # `plan` says what is wrong
        return json.dumps(words)
    run = dataclasses.replace(config.run, dir="-", seed=0)
    config = dataclasses.replace(config, run=run, reward=RewardConfig())
    return json.dumps(settings.to_dict(config), sort_keys=True)


class Record:
    """The cells that are done, by their keys, with their commands; kept in `study.json`."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.path = directory / RECORD
        self.done: dict[str, list[str]] = {}
        if self.path.exists():
            content = settings.read_json(self.path)
            if content.get("version") != VERSION or not isinstance(content.get("done"), dict):
                raise UsageError(f"{self.path} is no record of a study. Name another dir.")
            self.done = content["done"]

    def missing(self, all_cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that are still to do, in order."""
        open_keys: set[str] = set()
        for cell in all_cells:
            is_done = self.done.get(cell.key) == [*cell.command, *cell.reads]
            if not is_done or open_keys & set(cell.needs):
                open_keys.add(cell.key)
        return [cell for cell in all_cells if cell.key in open_keys]

    def add(self, cell: Cell) -> None:
        """Note that a cell is done."""
        self.done[cell.key] = [*cell.command, *cell.reads]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, "done": self.done}, indent=1) + "\n"
        write_atomically(self.path, text.encode())
