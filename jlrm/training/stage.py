"""What surrounds the steps of a stage: resume, time, log, evaluate, save, and stop cleanly.

    with Stage(run, "grpo", optimizer, initial_params, evaluate, names) as stage:
        for step in stage:
            with stage.timed("update"):
                stage.state, values = update(stage.state, ...)
            stage.finish(values, num_tokens)

Nothing here knows an algorithm. Ctrl-C and SIGTERM let the step end, save, and leave by
`Interrupted`.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jlrm.config import RunConfig, RunError, stages_of
from jlrm.data import audit
from jlrm.data.audit import Draws
from jlrm.judgement.notes import TrainerState
from jlrm.model import lora
from jlrm.model.qwen import Params
from jlrm.reports.alarms import Alarm
from jlrm.reports.tracking import Tracker, progress_bar
from jlrm.runtime import devices, hosts, preemption
from jlrm.runtime.commands import Interrupted
from jlrm.runtime.settings import to_dict
from jlrm.training import replay, same_run, update
from jlrm.training.calls import Call, compilations
from jlrm.training.heldout import EvaluateFn
from jlrm.training.programs import heldout_calls
from jlrm.training.setup import Run, frozen_params, refuse_to_begin_before
from jlrm.training.update import TrainState
from jlrm.weights.checkpoint import Checkpoints

log = logging.getLogger(__name__)


def means(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    reports = jax.device_get(reports)
    names = reports[0] if reports else ()
    return {name: float(np.mean([each[name] for each in reports])) for name in names}


def floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(values).items()}


MOST_COMPILERS = 8  # at a time: each takes some gigabytes
SLOW_COMPILE = 5.0  # seconds; what compiles faster is not worth a line
MOST_UNAPPLIED = 3  # steps in a row that were not finite; then the run stops


class StageResult(NamedTuple):
    """What is left of a stage when its state is gone."""

    start: dict[str, float]  # held-out metrics before the first step; empty: not taken
    evaluation: dict[str, float]  # and after the last
    num_steps: int
    num_tokens: int
    seconds: float


class Stage:
    """One stage of a run: iterate over its remaining steps, `finish` each of them.

    Begins from the stage's newest checkpoint, or from `initial` weights, given the frozen ones.
    `start` and `evaluation` hold the first and the newest held-out metrics, `num_tokens` and
    `seconds` (of wall time, from reading weights to saving them, evaluation included) what the
    stage has cost over all its starts.
    """

    state: TrainState

    def __init__(
        self,
        run: Run,
        name: str,
        optimizer: optax.GradientTransformation,
        initial: Callable[[Params], Params],
        evaluate: EvaluateFn,
        programs: Sequence[str],
    ) -> None:
        self._marked = self._step_began = time.monotonic()
        self._run, self._name, self._evaluate = run, name, evaluate
        self._programs = programs  # that a step runs, for people to read
        self._num_steps: int = getattr(run.config, name).steps
        self._checkpoints = _open_checkpoints(run.config.run, name)
        if (self._checkpoints.latest_step() or 0) < self._num_steps:
            refuse_to_begin_before(run.config, name)
        self.start: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.num_tokens, self.seconds = 0, 0.0
        self.position = 0  # in the data, in batches drawn
        self.carried: dict[str, Any] | None = None  # by the checkpoint, for the first step
        self.carry: Callable[[], dict[str, Any]] | None = None  # what the next one is to carry
        self.num_rows = len(run.data.train)  # that a stage draws from; SFT sets its own
        self.stream: int = getattr(run.config, name).stream
        self._done = self._checkpoints.latest_step() or 0
        self.is_resumed = self._done > 0
        base = frozen_params(run)
        if self._done:
            self._restore(optimizer, base)
        else:
            model, layout = run.policy.model, run.policy.training
            params = lora.join(base, initial(base))
            self.state = update.init_state(model, layout, optimizer, params)
        self.tracker = _open_tracker(run, name, self._num_steps, self._done)
        if hosts.is_main():
            is_finished = self._done >= self._num_steps
            audit.forget_after(run.directory.path, name, self._done, is_finished)
        self._seconds = collections.defaultdict[str, float](float)
        self._compiled = devices.watch_compiling()
        self._signum = self._num_unapplied = 0
        self._signalled = 0.0  # when, if so

    def _restore(self, optimizer: optax.GradientTransformation, base: Params) -> None:
        """Go on from the newest checkpoint."""
        network = self._run.policy
        abstract = update.abstract_state(network.model, network.training, optimizer)
        self._done, state, meta = self._checkpoints.restore_newest(abstract)
        self.state = state._replace(base=base)
        if self._done < self._num_steps:  # which `run.resume` may have led further back
            refuse_to_begin_before(self._run.config, self._name)
        self.start, self.evaluation = meta["start"], meta["evaluation"]
        self.num_tokens, self.seconds = meta["num_tokens"], meta["seconds"]
        self.position, self.carried = meta["position"], meta.get("carried")
        # A run from before streams goes on in the order that all its stages had.
        self.stream = meta.get("stream", 0)

    def __enter__(self) -> Stage:
        self.tracker.__enter__()
        self._old_handlers = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[signum] = signal.signal(signum, self._on_signal)
        if self._done:
            self.tracker.note(f"{self._name}: going on after step {self._done}")
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)
        try:
            self.tracker.__exit__(*error)
            if error[0] is None:  # else other processes may not come to where all wait
                self._checkpoints.wait()
        finally:
            self._checkpoints.close()

    def __iter__(self) -> Iterator[int]:
        """Yield the remaining steps, counted from 0; `finish` belongs to each."""
        if self._done < self._num_steps:
            self.tracker.note(f"{self._name}: the first step compiles {', '.join(self._programs)}")
            self._checkpoints.prepare(self.state)  # so that no later step compiles anything
        for step in range(self._done, self._num_steps):
            self._step_began = time.monotonic()
            self._seconds.clear()
            yield step
            assert self._done == step + 1, "finish was not called"

    def compile_ahead(self, calls: Callable[[], Mapping[str, Call]]) -> None:
        """Compile all that the steps may run, several at a time, if `run.precompile` says so."""
        if not is_compiled_ahead(self._run.config.run) or self._done >= self._num_steps:
            return
        policy, (longest, _) = self._run.policy, self._run.data.heldout.longest
        is_writer = not policy.model.num_labels  # else it judges by scores
        heldout = heldout_calls(self._run.config, policy, longest) if is_writer else {}
        tasks = compilations({**calls(), **heldout})
        label, workers = f"{self._name}: compiling ahead", max(1, (os.cpu_count() or 1) // 4)
        with (
            progress_bar(label, len(tasks), "program", is_shown=hosts.is_main()) as bar,
            futures.ThreadPoolExecutor(min(workers, MOST_COMPILERS)) as pool,
        ):
            names = {pool.submit(task): name for name, task in tasks.items()}
            for done in futures.as_completed(names):
                done.result()
                hosts.at(f"{label} ({names[done]})")
                bar.update()
        seconds = sum(self._compiled.take().values())
        self.tracker.note(f"{self._name}: compiled {len(tasks)} programs ahead, {seconds:.0f} s")

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `time/<phase>` of this step."""
        began = time.monotonic()
        yield
        self._seconds[phase] += time.monotonic() - began

    def evaluate_start(self) -> None:
        """Judge the held-out set before the run's first step, to have something to compare with.

        Weights that are random have nothing to say, and a later stage compares with the one before.
        With `run.eval_every=0` only the end of a stage is judged.
        """
        config = self._run.config
        is_first = stages_of(config)[0] == self._name and not self.is_resumed
        if is_first and config.model.path and config.run.eval_every:
            self.start = self._evaluate(self.state.weights, "before training", self.progress)
            self.tracker.log(0, {f"eval/{name}": value for name, value in self.start.items()})

    def finish(
        self,
        values: dict[str, float],
        num_tokens: int,
        batches: Sequence[replay.Batch],
        draws: Draws,
    ) -> None:
        """Log the step, evaluate and save where it is time, and stop if asked to.

        Args:
          batches: what each optimiser step has learned from.
          draws: the rows that the step has used.

        Raises:
          RunError: the loss or the gradient was no finite number, several times in a row, an alarm
            of `run.stop_on` was raised (the state is saved in both cases), or the weights are not
            finite.
          Interrupted: a signal came; the state is saved.
        """
        settings, step = self._run.config.run, self._done + 1
        self._run.directory.check()
        is_applied = all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))
        self._num_unapplied = 0 if is_applied else self._num_unapplied + 1
        if not is_applied:
            self._tell_unapplied(step, values, batches)
            draws = draws.unapplied()
        # A signal comes to one process or to all: they stop after the same step.
        self._signum = hosts.highest(f"the end of {self._name} step {step}", self._signum)
        elapsed = time.monotonic() - self._step_began
        values = {
            **values,
            **{f"time/{phase}": seconds for phase, seconds in self._seconds.items()},
            "time/step": elapsed,
            "perf/tokens_per_second": num_tokens / elapsed,
            "time/compile": self._tell_compiled(step),
            "perf/compiles": self._compiled.count,
        }
        if hosts.is_main():
            audit.write(self._run.directory.path, self._name, step, self.position, draws)
        self._done = step
        self.position += len(draws.rows)
        self.num_tokens += num_tokens
        is_last = step == self._num_steps
        is_evaluated = is_last or _is_due(step, settings.eval_every)
        if is_evaluated:
            when = f"after {self._name} step {step}"
            self.evaluation = self._evaluate(self.state.weights, when, self.progress)
            values |= {f"eval/{name}": value for name, value in self.evaluation.items()}
        alarm = self._alarm_to_stop_on(self.tracker.log(step, values))
        is_saved = is_evaluated or not is_applied or bool(self._signum) or bool(alarm)
        if is_saved or _is_due(step, settings.save_every):
            # What was evaluated is saved too, since the best of these is kept.
            self._save(step, self.evaluation if is_evaluated else None)
        self._end_if_asked(step, alarm)

    def _end_if_asked(self, step: int, alarm: str) -> None:
        """Leave after a step that is logged and saved, if there is a reason to."""
        if not (self._num_unapplied == MOST_UNAPPLIED or alarm or self._signum):
            return
        self._checkpoints.wait()
        if self._num_unapplied == MOST_UNAPPLIED:
            raise RunError(
                f"{self._name}: the last {MOST_UNAPPLIED} steps were not applied. Saved after step "
                f"{step} with weights that are finite. {self._name}.optimizer.learning_rate may be "
                "too high: the same command with a lower one goes on from there."
            )
        if alarm:
            raise RunError(
                f"Stopped after {self._name} step {step}, and saved: run.stop_on names the alarm "
                f"{alarm}, and the line above says what helps. The same command goes on from "
                "there, and is stopped by this alarm no more."
            )
        run_dir = self._run.config.run.dir
        raise Interrupted(
            self._signum,
            f"Stopped after {self._name} step {step}, saved in {run_dir}{self._took()}. The same "
            "command goes on from there.",
        )

    def _alarm_to_stop_on(self, raised: Sequence[Alarm]) -> str:
        """Return the name of a raised alarm that ends the run, or ""; the same on all hosts."""
        names = self._run.config.run.stop_on
        if not names:
            return ""
        mine = [names.index(alarm.name) + 1 for alarm in raised if alarm.name in names]
        where = f"the alarms of {self._name} step {self._done}"
        number = hosts.highest(where, max(mine, default=0))
        return names[number - 1] if number else ""

    @property
    def progress(self) -> TrainerState:
        """How far the stage has come, for plug-ins."""
        settings = getattr(self._run.config, self._name)
        epoch = self.position * getattr(settings, settings.batch_field) / self.num_rows
        return TrainerState(self._done, self._num_steps, epoch)

    def outcome(self) -> StageResult:
        """Return what the stage came to."""
        return StageResult(self.start, self.evaluation, self._done, self.num_tokens, self.seconds)

    def _tell_compiled(self, step: int) -> float:
        """Say what a step has compiled, if that took long; return how long it all took."""
        seconds = self._compiled.take()
        slow = {name: took for name, took in seconds.items() if took >= SLOW_COMPILE}
        if slow and hosts.is_main():
            listed = ", ".join(f"{name} {took:.0f} s" for name, took in slow.items())
            self.tracker.note(f"{self._name} step {step} compiled: {listed}")
        return sum(seconds.values())

    def _tell_unapplied(
        self, step: int, values: dict[str, float], batches: Sequence[replay.Batch]
    ) -> None:
        run = self._run
        file = replay.write(run.directory.path, run.config, self._name, step, batches)
        self.tracker.note(
            f"{self._name} step {step} was not applied: loss {values['loss']:.4g}, grad_norm "
            f"{values['grad_norm']:.4g}. Its batch runs alone with: python -m jlrm.train "
            f"--replay {file}"
        )

    def _save(self, step: int, ranked_by: dict[str, float] | None) -> None:
        now = time.monotonic()
        self.seconds += now - self._marked
        self._marked = now
        meta = {
            "stage": self._name,
            "step": step,
            # All there is to know of the data: see data/batches.py.
            "position": self.position,
            "stream": self.stream,
            "start": self.start,
            "evaluation": self.evaluation,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "carried": self.carry() if self.carry else None,
            "config": to_dict(self._run.config),
            "made_from": dict(self._run.made_from),
            "libraries": same_run.libraries(),
        }
        self._checkpoints.save(step, self.state, meta, ranked_by)
        if hosts.is_main():
            self._run.directory.mirror.push()

    def _took(self) -> str:
        """Return how long it took from the signal to the end of saving, for people to read."""
        if not self._signalled:  # another process got it
            return ""
        allowed = preemption.seconds_allowed()
        of = "" if allowed is None else f" of {allowed:.0f} s allowed"
        return f", {time.monotonic() - self._signalled:.0f} s after the signal{of}"

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signum, self._signalled = signum, time.monotonic()
        signal.signal(signum, self._old_handlers[signum])
        self.tracker.note("Stopping after this step and saving; the same again stops at once.")


def is_compiled_ahead(settings: RunConfig) -> bool:
    """Return whether programs are compiled before the first step that needs them."""
    return {"always": True, "never": False, "auto": hosts.count() > 1}[settings.precompile]


def _open_checkpoints(settings: RunConfig, name: str) -> Checkpoints:
    return Checkpoints(
        settings.dir,
        name,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        metric=settings.best_metric,
        resume=settings.resume,
    )


def _open_tracker(run: Run, name: str, num_steps: int, first_step: int) -> Tracker:
    settings = run.config.run
    return Tracker(
        run.directory.path,
        stage=name,
        num_steps=num_steps,
        first_step=first_step,
        tensorboard=settings.tensorboard,
        wandb_project=settings.wandb_project,
        config=to_dict(run.config),
        is_writer=hosts.is_main(),
    )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
