"""The batch of a step that was not applied: kept in a file, and run again alone.

    python -m jlrm.train --replay RUN/not_applied/grpo-7.npz

A step whose loss or gradient is no finite number moves no weight. Its file holds what each of its
optimiser steps learned from, with the run's config. The checkpoint of the step holds the weights
after it: of several optimiser steps, those that were applied have moved them.
Run again, each optimiser step says its loss; where that is not finite, what may be to blame.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import keystr

from jlrm.config import Config, UsageError
from jlrm.model import lora
from jlrm.model.visibility import Packing
from jlrm.rl.losses import PolicyTargets
from jlrm.rl.preferences import PairTargets, RewardTargets
from jlrm.runtime import hosts
from jlrm.runtime.mesh import compiler_options, create_mesh
from jlrm.runtime.settings import from_dict, to_dict
from jlrm.runtime.storage import write_atomically
from jlrm.sampling.policy import TextPolicy, open_policy
from jlrm.training import packing, update
from jlrm.training.packing import Rows
from jlrm.weights import source, steps

FOLDER = "not_applied"
ABOUT = "about"  # the name in the file of what is no array: JSON
Batch = tuple[Rows, Any]  # what a program of `update` takes: targets, or weights for SFT


def write(
    directory: pathlib.Path, config: Config, stage: str, step: int, batches: Sequence[Batch]
) -> pathlib.Path:
    """Write the batches of a step, and return the file. All processes call this."""
    arrays, is_shared = {}, jax.process_count() > 1
    for number, batch in enumerate(batches):
        for keys, leaf in jax.tree_util.tree_leaves_with_path(batch):
            whole = multihost_utils.process_allgather(leaf, tiled=True) if is_shared else leaf
            arrays[f"{number}.{keystr(keys, simple=True, separator='.')}"] = np.asarray(whole)
    num_devices = batches[0][0].tokens.sharding.num_devices
    told = {"stage": stage, "step": step, "devices": num_devices, "config": to_dict(config)}
    file = directory / FOLDER / f"{stage}-{step}.npz"
    if hosts.is_main():
        arrays[ABOUT] = np.array(json.dumps(told))
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_atomically(file, content.getvalue())
    return file


def read(file: pathlib.Path) -> tuple[dict[str, Any], list[Batch]]:
    """Return the stage, the step and the config of a file, and its batches.

    Raises:
      UsageError: no such file, or none that `write` wrote.
    """
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        about = json.loads(str(arrays.pop(ABOUT)))
        return about, list(_batches(arrays))
    except FileNotFoundError:
        raise UsageError(f"--replay {file}: there is no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"--replay {file} is no file of a step that was not applied.") from error


def replay(file: pathlib.Path) -> list[str]:
    """Run the optimiser steps of a file again, each from the step's weights; return what they say.

    Raises:
      UsageError: no such file; the checkpoint of its step is gone; or there are fewer devices than
        the run had.
    """
    about, batches = read(file)
    devices = jax.devices()[: about["devices"]]
    if len(devices) < about["devices"]:
        wanted = about["devices"]
        raise UsageError(f"--replay {file}: wanted {wanted} devices, as many as the run had.")
    stage, config = about["stage"], from_dict(about["config"])
    saved = f"{config.run.dir}@{stage}/{about['step']}"
    steps.find(saved)
    where = dataclasses.replace(config.model, path=saved, preset="")
    model = source.read_model(dataclasses.replace(config, model=where))
    model = dataclasses.replace(model, num_labels=source.num_labels(saved))
    mesh = create_mesh(config.mesh, devices)
    policy = open_policy(model, mesh, source.model_files(saved))
    params = source.read_params(saved, model, policy.training)
    step = jax.jit(
        _step(config, stage, policy),
        compiler_options=compiler_options(policy.mesh, policy.model.exact),
    )
    lines = [f"{stage} step {about['step']}, with the weights of {saved}:"]
    for number, batch in enumerate(batches):
        on_devices = packing.to_devices(policy.training, batch)
        values = {name: float(value) for name, value in step(params, *on_devices).items()}
        lines.append(f"  optimiser step {number}: {_told(values)}")
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            lines.append(f"    {_first_nan(step, params, on_devices)}")
    return lines


def _batches(arrays: dict[str, np.ndarray]) -> Iterator[Batch]:
    """Yield the batches of a file: `0.0.tokens` is an array of the rows of batch 0."""
    for number in range(1 + max(int(name.partition(".")[0]) for name in arrays)):
        of_rows, of_targets = (_below(arrays, f"{number}.{part}") for part in (0, 1))
        packed = {name: of_rows.pop(f"packing.{name}") for name in Packing._fields}
        rows = Rows(**of_rows, packing=Packing(**packed))
        yield rows, _targets(of_targets)


def _targets(arrays: dict[str, Any]) -> Any:
    """Return what a stage learns from beside its rows, told by the names of its arrays."""
    if "" in arrays:
        return arrays[""]
    if "is_last" in arrays:
        return RewardTargets(**arrays)
    kind = PairTargets if "num_pairs" in arrays else PolicyTargets
    return kind(**{"ref_logp": None, **arrays})


def _below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Return the arrays whose names begin so, by the rest of their names."""
    names = [name for name in arrays if name == prefix or name.startswith(f"{prefix}.")]
    return {name[len(prefix) + 1 :]: arrays[name] for name in names}


def _step(config: Config, stage: str, policy: TextPolicy) -> Any:
    """Return `(params, rows, targets) -> metrics` of one optimiser step."""
    model, layout = policy.model, policy.training
    optimizer = update.make_optimizer(getattr(config, stage).optimizer, 1)
    distribution = policy.distribution(config.sampling)
    take = {
        "sft": partial(update.sft_update, model, layout, optimizer),
        "dpo": partial(update.dpo_update, model, layout, config.dpo, optimizer),
        "reward_model": partial(
            update.reward_update, model, layout, config.reward_model.kind, optimizer
        ),
        "grpo": partial(
            update.grpo_update, model, layout, distribution, config.grpo.loss, optimizer
        ),
    }[stage]

    def step(params: Any, rows: Rows, targets: Any) -> dict[str, jax.Array]:
        params, base = lora.split(model.lora, params)
        state = update.TrainState(params, optimizer.init(params), jax.numpy.int32(0), base)
        return take(state, rows, targets)[1]

    return step


def _told(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(values.items()))


def _first_nan(step: Any, params: Any, batch: Batch) -> str:
    """Return what of the batch is not finite, or else what JAX says, and the largest weight.

    Of arrays that are spread over a mesh JAX does not say by which operation.
    """
    for keys, leaf in jax.tree_util.tree_leaves_with_path(batch[1]):
        if not np.isfinite(np.asarray(leaf)).all():
            name = keystr(keys, simple=True, separator=".") or "weights"
            return f"what it learns from is not finite already: {name}"
    with jax.debug_nans(True), contextlib.redirect_stdout(sys.stderr):  # JAX prints
        try:
            step(params, *batch)
        except FloatingPointError as error:
            largest, name = max(_sizes(params))
            first = str(error).splitlines()[0]
            return f"JAX: {first} The largest weight is {largest:.3g}, in {name}."
    return "no operation gave NaN: a number was too large"


def _sizes(params: Any) -> Iterator[tuple[float, str]]:
    """Yield the largest magnitude in every array of weights, and its name."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = float(jax.numpy.max(jax.numpy.abs(leaf)))
        yield size if math.isfinite(size) else math.inf, keystr(keys, simple=True, separator=".")
