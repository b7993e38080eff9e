"""Orbax checkpoints of a run, and single tensors read out of them.

A run keeps one series per stage under `checkpoints/<stage>/<step>`, each with four items: `params`,
`opt_state`, `meta` and `digests` (both JSON). Parameters are a separate item so that evaluation and
export read nothing else, and stacked layers are stored in chunks of one layer so that export can
read one tensor at a time. Saving is asynchronous; a save that did not finish leaves no checkpoint
behind. What is read is compared with the digests of what was saved (digests.py). A run may be at
gs://; Orbax reads and writes there itself, each host its own shards.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jlrm.config import RunError, UsageError
from jlrm.runtime import hosts
from jlrm.weights import digests, steps
from jlrm.weights.steps import read_digests

log = logging.getLogger(__name__)

MIN_CHUNK_BYTES = 2**20  # smaller chunks cost more than they save


class Damaged(UsageError):
    """What a step holds is not what was saved; the message is a part of a sentence."""


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
        resume: str = "",
    ) -> None:
        """Open a series, which need not exist; `resume`: see `RunConfig`.

        Raises:
          UsageError: its newest step is damaged, and `resume` takes no other.
        """
        self._keep_last, self._keep_best, self._metric = keep_last, keep_best, metric
        run = steps.absolute(run_dir)
        self._directory = run / "checkpoints" / stage
        self._wanted = steps.wanted_step(run, stage, resume)
        if hosts.is_main():
            steps.clear(self._directory, self._wanted, resume)
        hosts.gather("the checkpoints to go on from", None)
        options = ocp.CheckpointManagerOptions(
            best_fn=self._rank if keep_best else None,
            preservation_policy=keep.PreserveAll(),  # `_settle` lets go of the old ones
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        self._settled: int | None = None

    def prepare(self, state: Any) -> None:
        """Compile what a save runs on the devices."""
        digests.look(_items(state))

    def save(
        self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Begin to save, return when the arrays are copied; a step saved before is left alone.

        Raises:
          RunError: a number is NaN or infinite, and nothing is saved; what went wrong in the save
            before.
        """
        if step in self._manager.all_steps():
            return
        digested, broken = digests.look(_items(state))
        if broken:
            raise RunError(self._diverged(step, broken))
        self.wait()
        kept_metrics = metrics if self._keep_best else None
        with self._explain():
            args = _saved(state, meta, digested, kept_metrics)
            self._manager.save(step, args=args, metrics=metrics)
        self._metrics[step] = kept_metrics

    def latest_step(self) -> int | None:
        """Return the newest step that was saved whole."""
        return self._manager.latest_step()

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]]:
        """Restore the newest step onto the shardings of `abstract` (`ShapeDtypeStruct`s).

        The mesh may be another than the one that saved it.

        Returns:
          The step, the state and what was saved beside it.

        Raises:
          UsageError: it is not what was saved, and `resume` takes no other.
        """
        while True:
            step = self._manager.latest_step()
            assert step is not None, "nothing is saved"
            try:
                return step, *self._restore(step, abstract)
            except Damaged as error:
                reason = str(error)
            older = [each for each in self._manager.all_steps() if each < step]
            if self._wanted != "previous" or not older:
                whole = [each for each in older if self._is_whole(each, abstract)]
                raise UsageError(steps.refusal(self._directory, step, reason, whole))
            log.warning("%s is damaged: %s.", self._directory / str(step), reason)
            if hosts.is_main():
                log.warning("It is set aside: %s", steps.set_aside(self._directory, step))
            hosts.gather("the damaged step is set aside", None)
            self._manager.reload()

    def close(self) -> None:
        """Wait for saves under way and let go of the directory."""
        with self._explain():
            self._manager.close()

    def wait(self) -> None:
        """Wait until saves under way are on disk, and let go of old steps; all processes do so.

        Raises:
          RunError: what went wrong in them.
        """
        with self._explain():
            self._manager.wait_until_finished()
            self._settle()

    def _settle(self) -> None:
        """Look whether the newest step is whole, and only then let go of those it replaces."""
        step = self.latest_step()
        if step is None or step == self._settled:
            return
        directory = self._directory / str(step)
        reason = steps.damage(directory) if hosts.is_main() else ""
        (reason, *_) = hosts.gather("whether the checkpoint is whole", reason)
        if reason:
            raise RunError(
                f"{directory} was saved and is not whole: {reason}. Those before it are kept: look "
                "after the disk, and repeat the command."
            )
        if hosts.is_main():
            steps.note_sizes(directory)
        self._settled = step
        saved = list(self._manager.all_steps())
        ranked = [each for each in saved if self._metrics.get(each)]
        ranked.sort(key=lambda each: self._rank(self._metrics[each]))
        best = ranked[max(len(ranked) - self._keep_best, 0) :]
        for old in saved[: -self._keep_last]:
            if old not in best:
                self._manager.delete(old)

    def _rank(self, metrics: Any) -> float:
        return metrics[self._metric]

    def _is_whole(self, step: int, abstract: Any) -> bool:
        if hosts.count() > 1:  # processes that restore must all succeed or all fail
            return not steps.damage(self._directory / str(step))
        try:
            self._restore(step, abstract)
        except UsageError:
            return False
        return True

    def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        directory = self._directory / str(step)
        if reason := steps.damage(directory):
            raise Damaged(reason)
        items, wanted = _items(abstract), read_digests(directory)
        restored, broken = {}, []
        for name, item in items.items():
            with _reading(name):
                args = ocp.args.Composite(**{name: _restore(item)})
                restored[name] = self._manager.restore(step, args=args)[name]
            broken += _compare(name, restored[name], wanted)
        if broken:
            raise UsageError(
                f"{directory} holds NaN or infinite numbers in {_some(broken)}: training had "
                f"diverged. {self._way_out(step)}"
            )
        state = abstract._replace(params=restored["params"], **restored["opt_state"])
        return state, steps.read_meta(directory)

    def _diverged(self, step: int, broken: list[str]) -> str:
        return (
            f"{self._directory.name} step {step}: {_some(broken)} hold NaN or infinite numbers, so "
            f"nothing of this step is saved. {self._way_out(step)}"
        )

    def _way_out(self, step: int) -> str:
        stage = self._directory.name
        rate = f"a lower {stage}.optimizer.learning_rate"
        before = [each for each in self._manager.all_steps() if each < step]
        if not before:
            return f"No checkpoint was before it: begin anew with {rate}."
        source = f"{self._directory.parent.parent}@{stage}/{before[-1]}"
        return f"Go on from the one before: model.path={source} run.dir=NEW, and {rate}."

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


def restore_params(step_dir: epath.Path, params: Any) -> Any:
    """Restore the parameters alone onto the shardings of the given `ShapeDtypeStruct`s.

    Raises:
      UsageError: they are not what was saved; some are NaN or infinite.
    """
    wanted, handler = read_digests(step_dir), ocp.PyTreeCheckpointHandler()
    with _naming(step_dir), ocp.Checkpointer(handler) as checkpointer:
        with _reading("params"):
            args = _restore(params)
            restored = checkpointer.restore(steps.absolute(step_dir) / "params", args=args)
        broken = _compare("params", restored, wanted)
    if broken:
        names = [name.removeprefix(digests.PARAMS) for name in broken]
        raise UsageError(
            f"{step_dir} holds NaN or infinite numbers in {_some(names)}: its training had "
            "diverged. Take weights from an earlier step, as RUN@STEP."
        )
    return restored


def save_params(run_dir: epath.PathLike, stage: str, params: Any, meta: dict[str, Any]) -> None:
    """Save parameters without an optimiser as step 0 of a stage of their own."""
    digested, _ = digests.look({"params": params})
    with ocp.CheckpointManager(steps.absolute(run_dir) / "checkpoints" / stage) as manager:
        manager.save(0, args=_saved(params, meta, digested, None))


def read_tensor(
    step_dir: epath.Path, path: str, layer: int | None, wanted: dict[str, Any] | None = None
) -> np.ndarray:
    """Read one array (`a.b.c`), or one layer of a stacked one, without touching a device.

    wanted: what `read_digests` returns.

    Raises:
      UsageError: it can't be read, or is not what was saved.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": _store(step_dir / "params"),
            "path": f"{path}/",
        },
        # Without a cache limit of its own every read opens afresh and keeps nothing.
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }
    name = digests.PARAMS + path
    with _naming(step_dir):
        with _reading("params"):
            stored = tensorstore.open(spec).result()
            array = np.asarray((stored if layer is None else stored[layer]).read().result())
        if wanted and not digests.is_stored(array, layer, wanted["params"].get(name, {})):
            raise Damaged(f"its item 'params' is not what was saved, in {name}")
    return array


def _items(state: Any) -> dict[str, Any]:
    """Return the items of a state that are arrays."""
    return {
        "params": state.params,
        "opt_state": {"opt_state": state.opt_state, "step": state.step},
    }


def _saved(
    state: Any, meta: dict[str, Any], digested: dict[str, Any], metrics: dict[str, float] | None
) -> ocp.args.Composite:
    """Return the items of a step, of a state or of parameters alone, with their digests."""
    items = _items(state) if hasattr(state, "params") else {"params": state}
    described: dict[str, Any] = {
        item: {name: each for name, each in digested.items() if name.startswith(f"{item}.")}
        for item in items
    }
    meta = json.loads(json.dumps(meta))  # as it will be read
    described |= {"meta": digests.of_json(meta)}
    if metrics is not None:
        described |= {"metrics": digests.of_json(metrics)}
    params = items.pop("params")
    return ocp.args.Composite(
        params=ocp.args.PyTreeSave(params, save_args=_by_layer(params)),
        **{name: ocp.args.PyTreeSave(item) for name, item in items.items()},
        meta=ocp.args.JsonSave(meta),
        digests=ocp.args.JsonSave(digests.sealed(described)),
    )


def _compare(item: str, value: Any, wanted: dict[str, Any]) -> list[str]:
    """Compare one restored item with its digests; return the names of what is not finite.

    Raises:
      Damaged: it is not what was saved.
    """
    if not wanted:
        return digests.look({item: value})[1]
    if item not in wanted:
        raise Damaged(f"its digests do not name the item '{item}'")
    wrong, broken = digests.changed({item: value}, wanted[item])
    if wrong:
        raise Damaged(f"its item '{item}' is not what was saved, in {_some(wrong)}")
    return broken


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"


@contextlib.contextmanager
def _naming(step_dir: epath.Path) -> Iterator[None]:
    """Say which step is damaged, and what to do."""
    try:
        yield
    except Damaged as error:
        raise UsageError(
            f"{step_dir} is damaged: {error}. Bring its files back, or name another step as "
            "RUN@STEP."
        ) from None


@contextlib.contextmanager
def _reading(item: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a reader raise into `Damaged`."""
    try:
        yield
    except (Damaged, jax.errors.JaxRuntimeError):  # the latter: no memory
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise Damaged(f"its item '{item}' can't be read ({reason})") from None


def _store(path: epath.Path) -> Any:
    """Return a directory as tensorstore names it. In a url, # and % would not be of the name."""
    absolute = str(steps.absolute(path))
    return f"{absolute}/" if "://" in absolute else {"driver": "file", "path": f"{absolute}/"}


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
