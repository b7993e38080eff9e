"""Orbax checkpoints of a run, and single tensors read out of them.

A run keeps one series per stage under `checkpoints/<stage>/<step>`, each with three items:
`params`, `opt_state` and `meta` (JSON). Parameters are a separate item so that evaluation and
export read nothing else, and stacked layers are stored in chunks of one layer so that export can
read one tensor at a time. Saving is asynchronous; a save that did not finish leaves no checkpoint
behind. A run may be at gs://; Orbax reads and writes there itself, each host its own shards.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jlrm.config import RunError, UsageError, stage_titles
from jlrm.runtime.settings import from_dict, parse_yaml

MIN_CHUNK_BYTES = 2**20  # smaller chunks cost more than they save
IMPORTED = "import"  # the series of weights that came from elsewhere


class Checkpoints:
    """The checkpoints of one stage; `close` waits for saves under way."""

    def __init__(
        self,
        run_dir: epath.PathLike,
        stage: str,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        metric: str = "",
    ) -> None:
        policies: list[keep.PreservationPolicy] = [keep.LatestN(keep_last)]

        def rank(metrics: dict[str, float]) -> float:
            return metrics[metric]

        if keep_best:
            policies.append(
                keep.BestN(get_metric_fn=rank, n=keep_best, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            best_fn=rank if keep_best else None,
            preservation_policy=keep.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
        )
        self._directory = _absolute(run_dir) / "checkpoints" / stage
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(
        self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Begin to save, return when the arrays are copied; a step saved before is left alone."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(state.params, save_args=_by_layer(state.params)),
            opt_state=ocp.args.PyTreeSave({"opt_state": state.opt_state, "step": state.step}),
            meta=ocp.args.JsonSave(meta),
        )
        with self._explain():  # what went wrong in the save before this one comes up here
            self._manager.save(step, args=items, metrics=metrics)

    def latest_step(self) -> int | None:
        """Return the newest step that was saved whole."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Restore a state onto the shardings of `abstract` (`ShapeDtypeStruct`s), on any mesh."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=_restore(abstract.params),
                opt_state=_restore({"opt_state": abstract.opt_state, "step": abstract.step}),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = abstract._replace(params=restored["params"], **restored["opt_state"])
        return state, restored["meta"]

    def close(self) -> None:
        """Wait for saves under way and let go of the directory."""
        with self._explain():
            self._manager.close()

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:  # tensorstore's full disk is a ValueError
            reason = str(error)
            if "RESOURCE_EXHAUSTED" not in reason and "No space left" not in reason:
                raise
            raise RunError(
                f"No space is left for a checkpoint in {self._directory}. Those before it are "
                "whole: free some space and repeat the command."
            ) from None

    def wait(self) -> None:
        """Wait until saves under way are on disk; raises what went wrong in them."""
        with self._explain():
            self._manager.wait_until_finished()


def find(source: str) -> epath.Path:
    """Return the directory of one saved step for `RUN`, `RUN@STEP`, `RUN@STAGE/STEP` or `RUN@best`.

    Without a step: the newest of the last stage that ran.

    Raises:
      UsageError: no such run or step.
    """
    text, _, wanted = source.partition("@")
    run = epath.Path(text).expanduser()
    saved = saved_steps(run)
    if not saved:
        raise UsageError(
            f"{run} holds no checkpoints (wanted a run directory with checkpoints/ in it)."
        )
    stage, _, step = wanted.rpartition("/")
    stage = stage or next(iter(saved))
    if step == "best" and stage in saved:
        step = str(_best_step(run, stage, saved[stage]))
    chosen = step or str(saved.get(stage, [""])[-1])
    if stage not in saved or not chosen.isdigit() or int(chosen) not in saved[stage]:
        known = ", ".join(f"{name}/{number}" for name, steps in saved.items() for number in steps)
        raise UsageError(f"{run} has no checkpoint '{wanted}'. Saved: {known}.")
    return run / "checkpoints" / stage / chosen


def is_run(source: str) -> bool:
    """Return whether `source` names a run directory, with or without @STEP."""
    return (epath.Path(source.partition("@")[0]).expanduser() / "checkpoints").is_dir()


def restore_params(step_dir: epath.Path, params: Any) -> Any:
    """Restore the parameters alone onto the shardings of the given `ShapeDtypeStruct`s.

    Raises:
      UsageError: some are NaN or infinite.
    """
    with _checkpointer() as checkpointer:
        args = _restore(params)
        restored = checkpointer.restore(_absolute(step_dir) / "params", args=args)
    if broken := not_finite(restored):
        raise UsageError(
            f"{step_dir} holds NaN or infinite numbers in {', '.join(broken[:3])}"
            f"{f' and {len(broken) - 3} more' * (len(broken) > 3)}: its training had diverged. "
            "Take weights from an earlier step, as RUN@STEP."
        )
    return restored


def not_finite(params: Any) -> list[str]:
    """Return the names of arrays with a number that is NaN or infinite.

    One program on the devices looks at all of them: on the host they would have to be read again.
    """

    @jax.jit
    def look(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)

    with_paths = jax.tree_util.tree_leaves_with_path(look(params))
    return [".".join(key.key for key in path) for path, is_fine in with_paths if not bool(is_fine)]


def save_params(run_dir: epath.PathLike, stage: str, params: Any, meta: dict[str, Any]) -> None:
    """Save parameters without an optimiser as step 0 of a stage of their own."""
    with ocp.CheckpointManager(_absolute(run_dir) / "checkpoints" / stage) as manager:
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params, save_args=_by_layer(params)),
            meta=ocp.args.JsonSave(meta),
        )
        manager.save(0, args=items)


def read_tensor(step_dir: epath.Path, path: str, layer: int | None) -> np.ndarray:
    """Read one array (`a.b.c`), or one layer of a stacked one, without touching a device."""
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": _url(step_dir / "params"),
            "path": f"{path}/",
        },
        # Without a cache limit of its own every read opens afresh and keeps nothing.
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }
    array = tensorstore.open(spec).result()
    return np.asarray((array if layer is None else array[layer]).read().result())


def _absolute(path: epath.PathLike) -> epath.Path:
    wanted = epath.Path(path)
    return wanted if "://" in str(path) else wanted.expanduser().absolute()


def _url(path: epath.Path) -> str:
    absolute = _absolute(path)
    return f"{absolute}/" if "://" in str(absolute) else f"file://{absolute}/"


def _by_layer(params: Any) -> Any:
    """Ask for chunks of one layer in stacked arrays large enough for it to matter."""

    def chunked(x: jax.Array) -> ocp.SaveArgs:
        layer_bytes = x.nbytes // x.shape[0]
        if layer_bytes < MIN_CHUNK_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=layer_bytes, shard_axes=(0,))

    whole = jax.tree.map(lambda _: ocp.SaveArgs(), params)
    return {**whole, "layers": jax.tree.map(chunked, params["layers"])}


def _restore(abstract: Any) -> Any:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        yield checkpointer


def saved_steps(run: epath.Path) -> dict[str, list[int]]:
    """Return the saved steps of every series, that of the newest weights first."""
    saved = {}
    for stage in (*reversed(stage_titles()), IMPORTED):
        directory = run / "checkpoints" / stage
        # A save under way carries a temporary suffix, so its name is no number.
        steps = sorted(int(entry.name) for entry in directory.glob("*") if entry.name.isdigit())
        if steps:
            saved[stage] = steps
    return saved


def _best_step(run: epath.Path, stage: str, steps: list[int]) -> int:
    """Return the step ranked highest by the run's own `run.best_metric`."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UsageError(f"{run} has no config.yaml, which says what is best. Name a step.")
    metric = from_dict(parse_yaml(file.read_text(), str(file))).run.best_metric
    ranked = {}
    for step in steps:
        file = run / "checkpoints" / stage / str(step) / "metrics" / "metrics"
        if file.is_file():
            ranked[step] = json.loads(file.read_text())[metric]
    if not ranked:
        raise UsageError(f"No {stage} checkpoint of {run} was saved with a held-out metric.")
    return max(ranked, key=lambda step: ranked[step])
