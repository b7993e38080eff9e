"""Open a run in four calls: its directory, its policy, its data, and the checks between them.

A run directory has one writer, and once it holds a checkpoint it belongs to one config: started
again there, a run resumes, and a config that would make another run of it is refused. `model/` in
it holds everything of a Hugging Face directory but the weights, so that a run can be exported
without the checkpoint it began from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jlrm.config import Config, RunError, UsageError, nearest, stage_titles, stages_of
from jlrm.data.batches import Examples
from jlrm.data.comparisons import Dropped, write_dropped
from jlrm.data.splits import encode_splits, read_splits
from jlrm.data.worlds import toy
from jlrm.judgement import plugins, prompts, rewards
from jlrm.judgement.plugins import Plugin
from jlrm.model import lora, qwen
from jlrm.model.qwen import Params
from jlrm.reports import alarms
from jlrm.runtime import devices, hosts, storage
from jlrm.runtime.lock import sole_writer, sole_writer_of_store
from jlrm.runtime.mesh import create_mesh, open_mesh
from jlrm.runtime.settings import save
from jlrm.runtime.storage import Mirror, write_atomically
from jlrm.sampling.policy import TextPolicy, check_positions, open_policy
from jlrm.training import same_run
from jlrm.weights import adapters, hf, hf_config, reading, steps
from jlrm.weights.presets import preset
from jlrm.weights.source import (
    as_computed,
    model_files,
    num_labels,
    read_base,
    read_description,
    read_params,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunDir:
    """Where a run writes. Checkpoints of a run in a store go to the store itself, not to `path`."""

    path: pathlib.Path
    mirror: Mirror
    is_trained: bool  # it held a checkpoint when it was opened
    is_there: Callable[[], bool]  # False: its disk has vanished, or something else has its name

    @property
    def model(self) -> pathlib.Path:
        """The model's files but its weights."""
        return self.path / "model"

    def check(self) -> None:
        """Wait for a minute, if need be, until the directory is there to be written to.

        Raises:
          RunError: it is not.
        """
        for pause in storage.PAUSES:
            if self.is_there():
                return
            log.warning("%s has vanished. Waiting for it %.0f s.", self.path, pause)
            time.sleep(pause)
        if not self.is_there():
            raise RunError(
                f"{self.path} has vanished, so this step is not written. What was saved lies where "
                "the directory is now: bring it back and repeat the command."
            )


@dataclass(frozen=True, eq=False)
class RunData:
    """What a run learns from and is measured on, encoded (`splits.encode_splits` has the order)."""

    train: Examples
    heldout: Examples
    plugins: list[Plugin]
    dropped: list[Dropped]  # of both


@dataclass(frozen=True, eq=False)
class Run:
    """An opened run, as the recipes of its stages take it; their helpers take the parts."""

    config: Config
    directory: RunDir
    policy: TextPolicy
    data: RunData
    made_from: Mapping[str, str] = field(default_factory=dict)  # digests: same_run.py


def check_term_weights(config: Config, loaded: Sequence[Plugin]) -> None:
    """Refuse a weight of a term that no reward has.

    Raises:
      UsageError: naming it.
    """
    known = [*rewards.TERMS, "swap_consistency", *(plugin.name for plugin in loaded)]
    for name in config.grpo.advantage.term_weights:
        if name not in known:
            raise UsageError(
                f"grpo.advantage.term_weights: no term is named {name!r}. {nearest(name, known)}"
            )


@contextlib.contextmanager
def open_run(config: Config, chosen: Sequence[Any] | None = None) -> Iterator[Run]:
    """Open a run on all devices or the chosen ones, and hold its directory meanwhile.

    Raises:
      UsageError: anything the user can mend.
    """
    with open_directory(config) as directory:
        trained = directory.is_trained
        config = same_run.as_begun(config, directory.path) if trained else same_run.pinned(config)
        # If one of these fails, it fails at once, so they come before anything is downloaded.
        alarms.check_names(config.run.stop_on)
        loaded = plugins.load(config.reward.plugins)
        check_term_weights(config, loaded)
        if chosen is None:
            mesh = open_mesh(config.mesh, directory.mirror.url)
        else:
            mesh = create_mesh(config.mesh, chosen)
        policy = open_policy_of(config, directory, mesh)
        devices.tell(mesh)
        data = open_data(config, policy, loaded)
        check_together(config, policy, data)
        saved = same_run.newest_meta(config) if trained else {}
        rows = {"train": data.train.rows, "heldout": data.heldout.rows}
        before = saved.get("made_from", {})
        made_from = same_run.made_from(config, directory.model, rows, before)
        accepted = same_run.check_made_from(config, before, made_from)
        if hosts.is_main():
            if trained:
                same_run.note_changes(config, directory.path, saved, accepted)
            write_dropped(data.dropped, directory.path / "dropped.jsonl")
            save(config, directory.path / "config.yaml")
            directory.mirror.push()
        yield Run(config, directory, policy, data, made_from)


@contextlib.contextmanager
def open_directory(config: Config) -> Iterator[RunDir]:
    """Open a run's directory as its one writer.

    Raises:
      UsageError: another process writes there, or it holds checkpoints of a run that this config
        would not continue.
    """
    mirror = storage.mirror(config.run.dir)
    directory = mirror.local
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"run.dir={directory} is a file. Name a directory.")
    held = contextlib.nullcontext(lambda: True)
    if hosts.is_main():  # the other processes of a run leave writing to the first
        held = sole_writer_of_store(mirror.url) if mirror.url else sole_writer(directory)
    with held as is_there:
        mirror.pull()
        saved = steps.saved_steps(epath.Path(config.run.dir).expanduser())
        is_trained = not saved.keys().isdisjoint(stage_titles())
        if is_trained:  # a start that failed before its first checkpoint binds nothing
            same_run.check_settings(config, directory)
        yield RunDir(directory, mirror, is_trained, is_there)


def open_policy_of(config: Config, directory: RunDir, mesh: Mesh) -> TextPolicy:
    """Return the policy of a run from `model/`, which is filled at the run's first start."""
    if config.model.path and not directory.is_trained and num_labels(config.model.path):
        raise UsageError(
            f"model.path={config.model.path} is a reward model, which writes no text. Name the "
            "model that it was trained from."
        )
    if config.model.path and not (directory.is_trained or steps.is_run(config.model.path)):
        read_description(config)  # refuses what can't be trained before weights are downloaded
    if hosts.is_main():
        _fill_model(config, directory)
        directory.mirror.push()
    hosts.gather("the model's side files", None)
    if not hosts.is_main():
        directory.mirror.pull()
    if not directory.model.is_dir():
        raise UsageError(
            f"Process {hosts.index()} can't see in run.dir={directory.path} what process 0 has "
            "just written there. Put it where all hosts see it: a shared disk, or gs://."
        )
    model = as_computed(
        config, hf_config.read_config(directory.model), hf_config.stored_dtype(directory.model)
    )
    return open_policy(model, mesh, directory.model)


def open_data(config: Config, policy: TextPolicy, loaded: list[Plugin]) -> RunData:
    """Read and encode the training and the held-out rows."""
    # The released code's reward can't use rows that have a preference alone.
    needs_scores, scale = config.reward.mode == "judgelrm", config.reward.scale
    splits = read_splits(config.data, scale, needs_scores)
    train, heldout = encode_splits(splits, policy.tokenizer, config.data, scale)
    dropped = [*splits.dropped, *train.dropped, *heldout.dropped]
    return RunData(train, heldout, loaded, dropped)


def check_together(config: Config, policy: TextPolicy, data: RunData) -> None:
    """Refuse settings that the model or the data can't serve.

    Raises:
      UsageError: if either can't.
    """
    if config.reward.mode == "judgelrm" and prompts.opens_rubric(config.data.prompt):
        raise UsageError(
            f"reward.mode=judgelrm reads no rubric, and data.prompt={config.data.prompt} asks for "
            "one. Set reward.mode=judgelrm_symmetric."
        )
    check_stop(config, data)
    limited = [config.sft, config.dpo, config.reward_model]
    longest = max(
        config.sampling.max_new_tokens,
        *(stage.max_target_tokens if stage.steps else 0 for stage in limited),
    )
    check_positions(
        policy.model,
        config.data.max_prompt_tokens + longest,
        "data.max_prompt_tokens or sampling.max_new_tokens",
    )
    if config.grpo.steps and len(data.train) < config.grpo.prompts:
        raise UsageError(
            f"grpo.prompts={config.grpo.prompts} is more than there are usable rows: "
            f"{len(data.train)}."
        )


def check_stop(config: Config, data: RunData) -> None:
    """Refuse to end judgements of lists before their last score.

    Raises:
      UsageError: naming the setting.
    """
    count = config.sampling.stop_strings.get("</answer>")
    if config.data.judging != "lists" or count is None:
        return
    both = data.train.rows, data.heldout.rows
    sizes = [rows.table("answers", np.array([len(r.answers) for r in rows.mine])) for rows in both]
    longest = int(np.concatenate(sizes).max())
    if count < longest:
        raise UsageError(
            f"sampling.stop_strings ends a judgement after {count} `</answer>`, and there are "
            f"lists of {longest} answers. Set sampling.stop_strings={{</answer>: {longest}}}."
        )


def frozen_params(run: Run) -> Params:
    """Return the weights that stay as they are beneath adapters; empty: all are trained."""
    model, layout = run.policy.model, run.policy.training
    if model.lora is None:
        return {}
    return read_base(run.config, model, layout)


def initial_params(run: Run, stage: str, base: Params) -> Params:
    """Return what a stage trains, as it begins.

    That is what it was at the end of the stage before; for the first, read from `model.path`, or
    random by the run's seed. Adapters begin at random, and change nothing of their base yet.
    """
    config, policy = run.config, run.policy
    names = stages_of(config)
    if place := names.index(stage):
        before = names[place - 1]
        series = steps.absolute(config.run.dir) / "checkpoints" / before
        saved = steps.find_step(series, getattr(config, before).steps)
        abstract = qwen.abstract_params(policy.model, policy.training)
        return reading.restore_params(saved, lora.split(policy.model.lora, abstract)[0])
    if config.model.adapter:
        return adapters.read_start(config, policy.model, policy.training)
    if policy.model.lora:
        program = qwen.adapters_program(policy.model, policy.training)
        return program(jax.random.key(config.run.seed), base)
    if not config.model.path:
        return qwen.init(policy.model, policy.training, config.run.seed)
    return read_params(config.model.path, policy.model, policy.training)


def refuse_to_begin_before(config: Config, stage: str) -> None:
    """Refuse to train a stage again whose end a later one has gone on from.

    Raises:
      UsageError: a later stage has checkpoints. Its record would be dropped.
    """
    run = steps.absolute(config.run.dir)
    saved = steps.saved_steps(run)
    names = stages_of(config)
    for later in names[names.index(stage) + 1 :]:
        if later in saved:
            raise UsageError(
                f"{run} has checkpoints of {later}, and of {stage} before it none at its last "
                f"step. Bring checkpoints/{stage} back. Or go on in another run: model.path={run}"
                f"@{later}/{saved[later][-1]} run.dir=NEW {stage}.steps=0, where the KL reference "
                "is another."
            )


def _fill_model(config: Config, directory: RunDir) -> None:
    """Fill `model/` from the source, unless a run that has begun to train has it already."""
    source, target = config.model, directory.model
    if directory.is_trained and target.is_dir():
        return
    origin = model_files(source.path) if source.path else None
    is_own = origin is not None and origin.resolve() == target.resolve()
    # Renamed when it is complete: a start that is killed leaves no half of it.
    whole, target = target, target.with_name("model.partial")
    shutil.rmtree(target, ignore_errors=True)
    if whole.is_dir() and (is_own or not (directory.path / "config.yaml").is_file()):
        shutil.copytree(whole, target)  # else left by a start that failed, of any model
    if origin is not None:
        hf_config.read_config(origin)
        hf.copy_side_files(origin, target)
    else:
        target.mkdir(parents=True, exist_ok=True)
        fields = hf_config.config_to_hf(preset(source.preset), "float32")
        write_atomically(target / "config.json", json.dumps(fields, indent=2).encode())
    if source.tokenizer == "toy":
        toy.save_tokenizer(target)
    elif source.tokenizer:
        hf.copy_tokenizer(hf.resolve(source.tokenizer, hf.TOKENIZER_FILES), target)
    shutil.rmtree(whole, ignore_errors=True)
    target.rename(whole)
