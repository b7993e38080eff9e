"""Orbax checkpoints of a run, and single tensors read out of them.

A run keeps one series per stage under `checkpoints/<stage>/<step>`, each with four items: `params`,
`opt_state`, `meta` and `digests` (both JSON). Parameters are a separate item so that evaluation and
export read nothing else, and stacked layers are stored in chunks of one layer so that export can
read one tensor at a time. Saving is asynchronous; a save that did not finish leaves no checkpoint
behind. What is read is compared with the digests of what was saved (digests.py), and its files with
their checksums (file_list.py), which are taken in the background while training goes on. A run may
be at gs://; Orbax reads and writes there itself, each host its own shards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jlrm.config import RunError, UsageError
from jlrm.runtime import hosts, storage
from jlrm.weights import digests, file_list, steps
from jlrm.weights.reading import Damaged, compare, reading, restore_args, some
from jlrm.weights.steps import read_digests

log = logging.getLogger(__name__)

MIN_CHUNK_BYTES = 2**20  # smaller chunks cost more than they save
MOST_MISSED = 3  # saves in a row of which nothing came; then the run stops
LEFT = " Those before it are whole: see to the disk, and repeat the command."


class _Save(NamedTuple):
    """A save that is under way, to be repeated if it fails."""

    step: int
    state: Any
    begin: Callable[[], None]


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
        self._under_way: _Save | None = None
        self._num_missed = 0  # saves in a row of which nothing came
        self._settled: int | None = None
        self._listing: file_list.Listing | None = None  # of the step that is being saved

    def prepare(self, state: Any) -> None:
        """Compile what a save runs on the devices."""
        digests.look(_items(state))

    def save(
        self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Begin to save, return when the arrays are copied; a step saved before is left alone.

        Raises:
          RunError: a number is not finite, and nothing is saved; or the save before went wrong.
        """
        if step in self._manager.all_steps():
            return
        digested, broken = digests.look(_items(state))
        if broken:
            raise RunError(self._diverged(step, broken))
        self.wait()
        self._metrics[step] = metrics if self._keep_best else None

        def begin() -> None:
            args = _saved(state, meta, digested, self._metrics[step])
            self._manager.save(step, args=args, metrics=metrics)

        self._under_way = _Save(step, state, begin)
        self._insist(until_saved=False)
        if hosts.is_main() and "://" not in str(self._directory):
            self._listing = file_list.Listing(self._directory / str(step))

    def latest_step(self) -> int | None:
        """Return the newest step that was saved whole."""
        return self._manager.latest_step()

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]]:
        """Return the newest step, its state and what was saved beside it.

        The state lies as `abstract` (`ShapeDtypeStruct`s) does, whatever mesh has saved it.

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
        try:
            self._manager.close()
        except (ValueError, OSError) as error:
            raise RunError(self._failure(error) + LEFT) from None

    def wait(self) -> None:
        """Wait until saves under way are on disk, and let go of old steps; all processes do so.

        Raises:
          RunError: what went wrong in them.
        """
        self._insist(until_saved=True)
        self._under_way = None
        self._settle()

    def _insist(self, *, until_saved: bool) -> None:
        """Begin a save, or wait for the one that has begun; try again where the disk may come back.

        Where a save fails whose arrays are already given up to the next step, the next save makes
        up for it, but not three times in a row. Several processes do not try again: those to which
        it happened would wait for the others.
        """
        save, is_begun = self._under_way, until_saved
        if save is None:
            return
        for pause in (*storage.PAUSES, None):
            try:
                with storage.told_if_slow(self._directory):
                    if not is_begun:
                        save.begin()
                    if until_saved:
                        self._manager.wait_until_finished()
                        self._num_missed = 0
                return
            except (ValueError, OSError) as error:
                failure = self._failure(error)
            is_gone = any(leaf.is_deleted() for leaf in jax.tree.leaves(save.state))
            self._num_missed += is_gone
            self._remove_unfinished(save.step)
            if pause is None or hosts.count() > 1 or self._num_missed == MOST_MISSED:
                raise RunError(failure + LEFT)
            if is_gone:
                log.warning("%s Step %d is not saved, the next one will be.", failure, save.step)
                return
            log.warning("%s Trying again in %.0f s.", failure, pause)
            time.sleep(pause)
            is_begun = False

    def _remove_unfinished(self, step: int) -> None:
        """Give back the space of a save that has failed."""
        with contextlib.suppress(OSError):
            for partial in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                partial.rmtree()

    def _failure(self, error: Exception) -> str:
        """Return how storage has failed, as a sentence; another error is raised as it is."""
        if reason := storage.failure(error):
            return f"A checkpoint in {self._directory} can't be written: {reason}."
        raise error

    def _settle(self) -> None:
        """Look whether the newest step is whole, and only then let go of those it replaces."""
        if (step := self.latest_step()) in (None, self._settled):
            return
        directory = self._directory / str(step)
        if reason := _on_main(lambda: steps.damage(directory)):
            raise RunError(
                f"{directory} was saved and is not whole: {reason}. Those before it are kept: look "
                "after the disk, and repeat the command."
            )
        if hosts.is_main() and not file_list.is_written(directory):
            listed = self._listing.finish() if self._listing else {}
            file_list.write(directory, listed or file_list.read_files(directory))
        self._listing = None
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
        with contextlib.suppress(UsageError):
            self._restore(step, abstract)
            return True
        return False

    def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        directory = self._directory / str(step)
        if reason := _on_main(lambda: steps.damage(directory) or file_list.changed(directory)):
            raise Damaged(reason)
        items, wanted = _items(abstract), read_digests(directory)
        restored, broken = {}, []
        for name, item in items.items():
            with reading(name):
                args = ocp.args.Composite(**{name: restore_args(item)})
                restored[name] = self._manager.restore(step, args=args)[name]
            broken += compare(name, restored[name], wanted)
        if broken:
            raise UsageError(
                f"{directory} holds NaN or infinite numbers in {some(broken)}: training had "
                f"diverged. {self._way_out(step)}"
            )
        state = abstract._replace(params=restored["params"], **restored["opt_state"])
        return state, steps.read_meta(directory)

    def _diverged(self, step: int, broken: list[str]) -> str:
        return (
            f"{self._directory.name} step {step}: {some(broken)} hold NaN or infinite numbers, so "
            f"nothing of this step is saved. {self._way_out(step)}"
        )

    def _way_out(self, step: int) -> str:
        stage = self._directory.name
        rate = f"a lower {stage}.optimizer.learning_rate"
        if not (before := [each for each in self._manager.all_steps() if each < step]):
            return f"No checkpoint was before it: begin anew with {rate}."
        source = f"{self._directory.parent.parent}@{stage}/{before[-1]}"
        return f"Go on from the one before: model.path={source} run.dir=NEW, and {rate}."


def save_params(run_dir: epath.PathLike, stage: str, params: Any, meta: dict[str, Any]) -> None:
    """Save parameters without an optimiser as step 0 of a stage of their own."""
    digested, _ = digests.look({"params": params})
    with ocp.CheckpointManager(steps.absolute(run_dir) / "checkpoints" / stage) as manager:
        manager.save(0, args=_saved(params, meta, digested, None))


def _on_main(look: Callable[[], str]) -> str:
    """Return to all processes what process 0 finds wrong with a step."""
    (reason, *_) = hosts.gather("is the checkpoint whole", look() if hosts.is_main() else "")
    return reason


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


def _by_layer(params: Any) -> Any:
    """Ask for chunks of one layer, or expert, in stacked arrays large enough for it to matter.

    They are what is read at once (reading.py).
    """

    def chunked(path: Any, x: jax.Array) -> ocp.SaveArgs:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        depth = 2 if digests.EXPERTS in name else 1
        num_bytes = x.nbytes // math.prod(x.shape[:depth])
        if num_bytes < MIN_CHUNK_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=num_bytes, shard_axes=tuple(range(depth)))

    layers = jax.tree_util.tree_map_with_path(chunked, params["layers"])
    return {**jax.tree.map(lambda _: ocp.SaveArgs(), params), "layers": layers}
