"""What a run is made of: its directory, mesh, model, tokenizer and data, opened from one config.

A run directory belongs to one config. Started again there, a run resumes; with a config that would
make another run of it, it is refused. `model/` in it holds everything of a Hugging Face directory
but the weights, so that a run can be exported without the checkpoint it began from.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt64

from jlrm.config import Config, UsageError
from jlrm.data import sharded, toy
from jlrm.data.batches import Examples, encode_prompts
from jlrm.data.comparisons import Dropped, describe_dropped, write_dropped
from jlrm.data.curation import SWAPPED
from jlrm.data.sharded import ShardedRows
from jlrm.data.tokenizer import Tokenizer, check_vocabulary, end_ids, load_tokenizer
from jlrm.judgement import plugins
from jlrm.judgement.plugins import Plugin
from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.distribution import Distribution
from jlrm.runtime import hosts, storage
from jlrm.runtime.mesh import Layout, create_mesh, rollout_layout, training_layout
from jlrm.runtime.settings import flatten, load, save, to_dict
from jlrm.runtime.storage import Mirror
from jlrm.weights import checkpoint, hf, hf_config
from jlrm.weights.presets import preset
from jlrm.weights.source import check_mesh, model_files, read_params

log = logging.getLogger(__name__)

# A resumed run may change these: they say when to look and where to run, not what is learned.
FREE_FIELDS = ("run.", "mesh.", "sampling.eval_batch_size")


@dataclass(frozen=True, eq=False)
class Run:
    """An opened run. `heldout` holds each pair in both orders: all as given, then all swapped."""

    config: Config
    dir: pathlib.Path  # of a run in a store: its local side, without the checkpoints
    mirror: Mirror
    mesh: Mesh
    training: Layout
    rollout: Layout
    model: QwenConfig
    model_dir: pathlib.Path
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    plugins: list[Plugin]
    train: Examples  # with `data.orders: both` row 2i+1 is row 2i in the other order
    heldout: Examples

    @property
    def distribution(self) -> Distribution:
        """The distribution that rollouts are drawn from and log-probabilities are taken under."""
        sampling = self.config.sampling
        return Distribution(
            sampling.temperature, sampling.top_k, sampling.top_p, num_ids=len(self.tokenizer)
        )


def open_run(config: Config, devices: Sequence[Any] | None = None) -> Run:
    """Open a run: check it against what is in its directory, then read model, tokenizer and data.

    Raises:
      UsageError: anything the user can mend.
    """
    mirror = storage.mirror(config.run.dir)
    directory = mirror.local
    mirror.pull()
    _check_same_run(config, directory)
    mesh = create_mesh(config.mesh, devices)
    loaded = plugins.load(config.reward.plugins)
    if hosts.is_main():
        _fill_model(config, directory)
        mirror.push()
    hosts.gather("the model's side files", None)
    if not hosts.is_main():
        mirror.pull()
    model, model_dir = _open_model(config, directory)
    train_rows, heldout_rows, dropped = _read_rows(config)
    tokenizer = load_tokenizer(model_dir)
    check_vocabulary(tokenizer, model.vocab_size)
    train, heldout = _encode(config, train_rows, heldout_rows, tokenizer)
    longest = config.data.max_prompt_tokens + max(
        config.sampling.max_new_tokens, config.sft.max_target_tokens if config.sft.steps else 0
    )
    if longest > model.max_position_embeddings:
        raise UsageError(
            f"Prompt and completion together can have {longest} tokens, the model has positions "
            f"for {model.max_position_embeddings}. Lower data.max_prompt_tokens or "
            "sampling.max_new_tokens."
        )
    check_mesh(mesh, model)
    if config.grpo.steps and len(train) < config.grpo.prompts:
        raise UsageError(
            f"grpo.prompts={config.grpo.prompts} is more than there are usable rows: {len(train)}."
        )
    if hosts.is_main():
        write_dropped([*dropped, *train.dropped, *heldout.dropped], directory / "dropped.jsonl")
        save(config, directory / "config.yaml")
        mirror.push()
    return Run(
        config=config,
        dir=directory,
        mirror=mirror,
        mesh=mesh,
        training=training_layout(mesh),
        rollout=rollout_layout(mesh),
        model=model,
        model_dir=model_dir,
        tokenizer=tokenizer,
        end_ids=end_ids(tokenizer, model_dir),
        plugins=loaded,
        train=train,
        heldout=heldout,
    )


def grpo_params(run: Run) -> Params:
    """Return the weights GRPO begins from: those at the end of SFT, else the initial ones."""
    if not run.config.sft.steps:
        return initial_params(run)
    saved = checkpoint.find(f"{run.config.run.dir}@sft/{run.config.sft.steps}")
    return checkpoint.restore_params(saved, qwen.abstract_params(run.model, run.training))


def initial_params(run: Run) -> Params:
    """Return the weights training begins from: read, or random by the run's seed."""
    source = run.config.model
    if not source.path:
        return qwen.init(run.model, run.training, run.config.run.seed)
    return read_params(source.path, run.model, run.training)


def _check_same_run(config: Config, directory: pathlib.Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"run.dir={directory} is a file. Name a directory.")
    if not (directory / "config.yaml").is_file():
        return
    before, now = flatten(to_dict(load(directory / "config.yaml"))), flatten(to_dict(config))
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_free(key, config)
    ]
    if changed:
        raise UsageError(
            f"{directory} holds a run with another config ({', '.join(changed)}). "
            "Set run.dir to a new directory, or go back to the old values to resume."
        )


def _is_free(key: str, config: Config) -> bool:
    if key == "grpo.steps":  # a longer run is the same run, unless its schedule looks at its end
        return config.grpo.optimizer.schedule == "constant"
    return key.startswith(FREE_FIELDS) and key not in ("run.seed", "run.best_metric")


def _read_rows(config: Config) -> tuple[ShardedRows, ShardedRows, list[Dropped]]:
    """Return training rows, held-out rows, and what was left out of both."""
    data = config.data
    if data.train == "toy":
        train = sharded.deal(toy.comparisons(1, toy.NUM_TRAIN))
        return train, sharded.deal(toy.comparisons(2, data.eval_rows)), []
    train, dropped = _read(config, data.train)
    questions = train.questions()
    if data.eval:
        rows, dropped_too = _read(config, data.eval)
        theirs = rows.questions()
        heldout, _ = _hold_out(theirs, data.eval_rows)
        num_shared = len(np.intersect1d(questions, theirs[heldout]))
        if num_shared:
            log.warning("%d held-out questions are in %s too", num_shared, data.train)
        return train, rows.select(heldout), [*dropped, *dropped_too]
    heldout, rest = _hold_out(questions, data.eval_rows)
    if not len(rest):
        raise UsageError(
            f"{data.train} has {len(train)} usable rows, data.eval_rows={data.eval_rows} would "
            "hold all of them out. Lower it, or name a data.eval file."
        )
    return train.select(rest), train.select(heldout), dropped


def _read(config: Config, source: str) -> tuple[ShardedRows, list[Dropped]]:
    """Read a source; the released code's reward can't use rows that have a preference alone."""
    rows, dropped = sharded.read(source, columns=config.data.columns, scores=config.data.scores)
    if config.reward.mode == "judgelrm":
        is_scored = rows.flags("rows with scores", lambda row: row.scores is not None)
        if not is_scored.any():
            raise UsageError(
                f"{source} has no scores, only preferences. Set reward.mode=judgelrm_symmetric, "
                "which is paid by preferences too."
            )
        dropped = [*dropped, *rows.left_out(np.flatnonzero(~is_scored), "no_scores")]
        rows = rows.select(np.flatnonzero(is_scored))
    if dropped:
        log.warning("%s: left out %s", source, describe_dropped(dropped))
    return rows, dropped


def _hold_out(
    questions: UInt64[np.ndarray, " N"], num_rows: int
) -> tuple[Int[np.ndarray, " H"], Int[np.ndarray, " M"]]:
    """Return which rows are held out, and those whose questions are not among theirs."""
    in_order = np.argsort(questions, kind="stable")[:num_rows]
    return in_order, np.flatnonzero(questions > questions[in_order[-1]])


def _fill_model(config: Config, directory: pathlib.Path) -> None:
    """Fill `model/` of the run directory, once: the config is saved when all was done."""
    source, target = config.model, directory / "model"
    if (directory / "config.yaml").is_file():
        return
    if source.path:
        origin = model_files(source.path)
        hf_config.read_config(origin)
        hf.copy_side_files(origin, target)
    else:
        target.mkdir(parents=True, exist_ok=True)
        fields = hf_config.config_to_hf(preset(source.preset), "float32")
        (target / "config.json").write_text(json.dumps(fields, indent=2))
    if source.tokenizer == "toy":
        toy.save_tokenizer(target)
    elif source.tokenizer:
        hf.copy_tokenizer(hf.resolve(source.tokenizer, hf.TOKENIZER_FILES), target)


def _open_model(config: Config, directory: pathlib.Path) -> tuple[QwenConfig, pathlib.Path]:
    """Read the architecture from `model/` of the run directory."""
    source, target = config.model, directory / "model"
    if not target.is_dir():
        raise UsageError(
            f"Process {hosts.index()} does not find in run.dir={directory} what process 0 has just "
            "written there. Put it where all hosts see it: a shared disk, or gs://."
        )
    model = hf_config.read_config(
        target,
        param_dtype=source.param_dtype,
        compute_dtype=source.compute_dtype,
        remat=source.remat,
    )
    return model, target


def _encode(
    config: Config, train: ShardedRows, heldout: ShardedRows, tokenizer: Tokenizer
) -> tuple[Examples, Examples]:
    """Return the training and held-out rows that fit."""
    data, scale = config.data, config.reward.scale
    rows, together = train, 1
    if data.orders == "both":
        if train.flags("swapped rows", lambda row: row.id.endswith(SWAPPED)).any():
            raise UsageError(
                f"{data.train} holds swapped rows already (prepared with --swap), and "
                "data.orders=both would swap them back. Set data.orders=given, or prepare it anew."
            )
        rows, together = train.in_both_orders(), 2
    examples = encode_prompts(rows, tokenizer, data, scale, together=together, progress="tokenise")
    if examples.dropped:
        log.warning(
            "%d of %d training rows left out: prompts over data.max_prompt_tokens=%d",
            len(examples.dropped),
            len(train),
            data.max_prompt_tokens,
        )
    pairs = encode_prompts(heldout.in_both_orders(), tokenizer, data, scale, together=2)
    if pairs.dropped:
        log.warning("%d of %d held-out rows left out", len(pairs.dropped), len(heldout))
    places = range(len(pairs))
    return examples, pairs.select([*places[::2], *places[1::2]])
