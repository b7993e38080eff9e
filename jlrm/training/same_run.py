"""Whether a run that is started again is the same run: its settings, and what it is made from.

A directory that holds a checkpoint belongs to one run. Settings that say when to look, where to run
or how fast and how long to learn may change between starts; each change is a line in
`config_history.jsonl`. Others would make another run of it, and are refused. So is a base model, a
row or a reward that is no longer what it was, by the digests that every checkpoint carries:
`run.accept=[NAME]` goes on all the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml
from jaxtyping import UInt64

from jlrm.config import Config, DataConfig, UsageError, stage_titles, stages_of
from jlrm.data.comparisons import AnswerList, Comparison
from jlrm.data.sharded import ShardedRows
from jlrm.runtime import hosts
from jlrm.runtime.settings import flatten, from_dict, parse_yaml, to_dict
from jlrm.weights import adapters, source, steps

log = logging.getLogger(__name__)

HISTORY = "config_history.jsonl"
# A run that goes on may change these: they say when to look, where to run and in how much memory,
# and how far and how fast to learn. What is learned stays, but for the order of sums.
FREE_FIELDS = ("run.", "mesh.", "model.remat", "sampling.eval_batch_size")
FREE_OF_A_STAGE = (
    "steps",
    "pack_tokens",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
)
PARTS = {  # what a run is made from, by the names that `run.accept` takes
    "base": "base (the weights of model.path)",
    "model": "model (tokenizer or config.json in the run's model/)",
    "train": "train (the rows that it learns from)",
    "heldout": "heldout (the rows that it is measured on)",
    "plugins": "plugins (the source of reward.plugins)",
}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers")


# ----------------------------------------------------------------------------------- settings


def check_settings(config: Config, directory: pathlib.Path) -> None:
    """Refuse a config that would make another run of a trained run's directory.

    Raises:
      UsageError: it would; or config.yaml is there, and is empty.
    """
    if not (text := config_before(config, directory)):
        return
    refused = [
        f"{key} {before!r} -> {now!r}"
        for key, (before, now) in _changes(text, config, directory).items()
        if not _is_free(key, before, now)
    ]
    if refused:
        raise UsageError(
            f"{directory} holds a run with another config ({', '.join(refused)}). "
            "Set run.dir to a new directory, or go back to the old values to resume."
        )


def as_begun(config: Config, directory: pathlib.Path) -> Config:
    """Keep what a trained run began with, where the config leaves it open.

    That is which rows are held out, and at which step an earlier run was that it began from. Older
    runs held out 200 rows however few there were, and wrote that number down. Runs without
    `data.folding` in their config took questions for one only where punctuation was equal too. With
    another number or folding they would go on with other rows: some they had held out.
    """
    text = config_before(config, directory)
    if not text:
        return pinned(config)
    tree = parse_yaml(text, f"{directory}/config.yaml")
    before, data, model = from_dict(tree), config.data, config.model
    if not data.eval_rows:
        data = dataclasses.replace(data, eval_rows=before.data.eval_rows)
    if data.folding == DataConfig.folding:
        is_older = "folding" not in tree["data"]
        data = dataclasses.replace(data, folding="text" if is_older else before.data.folding)
    if _is_step_of(before.model.path, model.path):
        model = dataclasses.replace(model, path=before.model.path)
    return dataclasses.replace(config, data=data, model=model)


def pinned(config: Config) -> Config:
    """Name the step of an earlier run that a run begins from: its newest may soon be another."""
    model = config.model
    return dataclasses.replace(
        config, model=dataclasses.replace(model, path=steps.pinned(model.path))
    )


def config_before(config: Config, directory: pathlib.Path) -> str:
    """Return the YAML of the config that a trained run was made with; empty: nothing holds it.

    It stands in every checkpoint too, for a run that has lost its config.yaml.

    Raises:
      UsageError: config.yaml is there, and is empty.
    """
    file = directory / "config.yaml"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        if not text.strip():
            raise UsageError(
                f"{file} is empty: something has cut it short since it was written. Remove it, and "
                "the settings are taken from the run's newest checkpoint."
            )
        return text
    made_with = newest_meta(config).get("config")
    return yaml.safe_dump(made_with) if made_with else ""


def newest_meta(config: Config) -> dict[str, Any]:
    """Return what the newest whole checkpoint of a run says of it; empty: there is none."""
    run = steps.absolute(config.run.dir)
    for stage, saved in steps.saved_steps(run).items():
        for step in reversed(saved):
            if meta := steps.meta_of(run / "checkpoints" / stage / str(step)):
                return meta
    return {}


def _changes(text: str, config: Config, directory: pathlib.Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, as they were and as they are."""
    before, now = _settings_before(text, directory), flatten(to_dict(config))
    keys = sorted(before.keys() | now.keys())
    both = {key: (before.get(key), now.get(key)) for key in keys}
    return {key: (old, new) for key, (old, new) in both.items() if old != new}


def _settings_before(text: str, directory: pathlib.Path) -> dict[str, Any]:
    """Return the settings that a run was made with, as dotted names."""
    before = flatten(to_dict(from_dict(parse_yaml(text, f"{directory}/config.yaml"))))
    # Before there was a choice, importance weights weighed every term of the loss.
    if before["grpo.loss.importance_cap"] and "importance_terms:" not in text:
        before["grpo.importance_terms"] = "all"
    return before


def _is_free(key: str, before: Any, now: Any) -> bool:
    if key == "data.eval_rows":
        return not now
    if key == "data.folding":
        return now == DataConfig.folding
    if key == "model.path":
        return _is_step_of(before, now)
    stage, _, setting = key.partition(".")
    if stage in stage_titles() and setting in FREE_OF_A_STAGE:
        return True
    return key.startswith(FREE_FIELDS) and key not in ("run.seed", "run.best_metric")


def _is_step_of(before: str, now: str) -> bool:
    """Return whether a path that `pinned` has made may come of another: RUN, RUN@best, RUN@STEP."""
    (run, step), (same, wanted) = steps.split(before), steps.split(now)
    return run == same and "/" in step and wanted in ("", "best", step, step.rpartition("/")[2])


# --------------------------------------------------------------------------- what it is made of


def made_from(
    config: Config,
    model: pathlib.Path,
    rows: Mapping[str, ShardedRows],
    before: Mapping[str, str],
) -> dict[str, str]:
    """Return a digest of everything that a run is made from, by the names of `PARTS`.

    Args:
      model: the directory of the model's files but its weights.
      rows: the training and the held-out rows, by those names.
      before: of an earlier start. The base model is not looked for where nothing reads it again.
    """
    base = before.get("base", "")
    if config.model.path and (not base or _reads_base(config)):
        base = source.fingerprint(config.model.path)
        if config.model.adapter:
            base += f"+{adapters.digest(pathlib.Path(config.model.adapter).expanduser())}"
    mine = {
        "base": base,
        "model": _digest(file.name.encode() + file.read_bytes() for file in _files(model)),
        **{name: _of_rows(name, each) for name, each in rows.items()},
        "plugins": _digest(_sources(config.reward.plugins)),
    }
    assert mine.keys() == set(PARTS)
    return hosts.gather("what the run is made from", mine)[0]


def check_made_from(config: Config, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the parts that changed and are accepted.

    Raises:
      UsageError: one changed that `run.accept` does not name.
    """
    changed = [name for name in now if name in before and before[name] != now[name]]
    refused = [name for name in changed if name not in config.run.accept]
    if refused:
        listed = "; ".join(PARTS[name] for name in refused)
        raise UsageError(
            f"{config.run.dir} holds a run that was made from something else. Changed since its "
            f"newest checkpoint: {listed}. Bring it back; or set run.dir to a new directory; or go "
            f"on with what there is now: run.accept=[{', '.join(changed)}]."
        )
    return changed


def libraries() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def note_changes(
    config: Config, directory: pathlib.Path, meta: Mapping[str, Any], accepted: Iterable[str]
) -> None:
    """Add a line to `config_history.jsonl` if anything is not as at the start before."""
    text = config_before(config, directory)
    changed = _changes(text, config, directory) if text else {}
    was, now = meta.get("libraries", {}), libraries()
    newer = {name: (old, now[name]) for name, old in was.items() if now.get(name, old) != old}
    accepted = list(accepted)
    for name, (old, new) in newer.items():
        log.warning("%s was %s when the run was saved, and is %s: bits may differ", name, old, new)
    if not (changed or newer or accepted):
        return
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "after": f"{meta.get('stage', '')}/{meta.get('step', 0)}",
        "changed": changed,
        "accepted": accepted,
        "libraries": newer,
    }
    with (directory / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _reads_base(config: Config) -> bool:
    """Return whether a run that goes on may read its base again: a reference, or frozen."""
    has_reference = {"grpo": config.grpo.has_reference, "dpo": config.dpo.reference == "start"}
    return has_reference.get(stages_of(config)[0], False) or config.lora.rank > 0


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in directory.iterdir() if file.is_file())


def _of_rows(name: str, rows: ShardedRows) -> str:
    mine = np.fromiter(map(_of_row, rows.mine), np.uint64, len(rows.mine))
    digests: UInt64[np.ndarray, " N"] = rows.table(f"digests of {name}", mine)
    return _digest([digests.astype("<u8").tobytes()])


def _of_row(row: Comparison) -> int:
    """Return a number that stands for what a row says, wherever it was read from."""
    gold = (row.score_1, row.score_2, row.preference)
    if isinstance(row, AnswerList):
        gold = (*row.rest, row.golds, row.is_ranked)
    told = json.dumps([row.question, row.answer_1, row.answer_2, gold, row.meta], default=str)
    return int.from_bytes(hashlib.sha256(told.encode(errors="surrogatepass")).digest()[:8])


def _sources(plugins: Iterable[str]) -> Iterable[bytes]:
    """Yield the source of the modules that rewards come from."""
    for name in sorted(plugins):
        module = sys.modules.get(name.partition(":")[0])
        file = getattr(module, "__file__", None)
        yield name.encode() + (pathlib.Path(file).read_bytes() if file else b"")


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
