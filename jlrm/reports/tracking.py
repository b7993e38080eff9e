"""Metrics of a run: console, `metrics.jsonl`, TensorBoard, Weights & Biases, sampled completions.

The one idea: `metrics.jsonl` is the record, everything else a view of it. It holds one strict JSON
object per step in the order of time, so going back to a checkpoint means cutting the file there.
Step N means "after N steps". NaN and infinities, for which JSON has no numbers, are written as the
strings "nan", "inf" and "-inf" and read back as floats: a diverged loss stays visible and no parser
chokes. Other files are replaced whole, so a killed run leaves no half-written one behind.

Left out: what the metrics mean (run_page.py draws them) and remote file systems.
"""

from __future__ import annotations

import io
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jlrm.config import UsageError
from jlrm.reports.alarms import Alarm, Alarms
from jlrm.runtime import step_log
from jlrm.runtime.storage import explain_full_disk, first_line, write_atomically

METRICS = "metrics.jsonl"
CONSOLE_METRICS = {  # shown beside the step; label: metric
    "reward": "reward",
    "agreement": "judge/agreement",
    "parsed": "judge/parse_rate",
    "loss": "loss",
    "tok/s": "perf/tokens_per_second",
}
PLAIN_SECONDS = 10.0  # between progress lines where stderr is no terminal
PLAIN_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Tracker:
    """Record one stage of a run; use as a context manager.

    `first_step` steps are already done. What the run directory holds of this stage beyond them, and
    of later stages, was written after the checkpoint now resumed and is dropped (metrics and
    completions); a stage without steps left drops nothing. Where `is_writer` is false (all
    processes but the first) nothing happens.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        *,
        stage: str,
        num_steps: int,
        first_step: int,
        tensorboard: bool,
        wandb_project: str,
        config: dict[str, Any],
        is_writer: bool,
    ) -> None:
        self._run_dir, self._stage, self._is_writer = run_dir, stage, is_writer
        self._last_step = first_step if first_step > 0 else -1  # step 0 is: before any training
        self._tensorboard = self._wandb = None
        if not is_writer:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        is_finished = first_step >= num_steps  # and is opened again when a later stage resumes
        if wandb_project and not is_finished:  # before anything is dropped, because it can refuse
            self._wandb = _start_wandb(run_dir, stage, wandb_project, config, first_step > 0)
        _forget_after(run_dir, stage, self._last_step, is_finished)
        if tensorboard and not is_finished:
            log_dir = run_dir / "tensorboard" / stage
            self._tensorboard = _TensorBoard(log_dir, self._last_step + 1)
        self._alarms = Alarms()
        for row in read_metrics(run_dir):
            self._alarms.see(row)  # and what they show has been said
        self._bar = progress_bar(stage, num_steps, "step", initial=first_step, stays=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Record all metrics of one step, once; say, and return, what they show to be wrong.

        Steps go up. A full disk raises OSError.
        """
        if not self._is_writer:
            return []
        if step <= self._last_step:
            raise ValueError(f"{self._stage}: step {step} logged after step {self._last_step}")
        self._last_step = step
        values = {name: float(value) for name, value in metrics.items()}
        row = {"stage": self._stage, "step": int(step), **jsonable(values)}
        step_log.append(self._run_dir / METRICS, row)
        if self._tensorboard is not None:
            self._tensorboard.log(step, values)
        if self._wandb is not None:
            self._wandb.log({**values, "step": step})
        self._show(step, values)
        raised = self._alarms.see({"stage": self._stage, "step": step, **values})
        for alarm in raised:
            self.note(f"{alarm.stage} step {alarm.step}, alarm {alarm.name}: {alarm.text}")
        return raised

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled judgements to `completions/<stage>_<step>.parquet`, one column per key.

        The report reads: id, order, question, answer_1, answer_2, prompt, response (in older files
        `completion`), gold and verdict (two scores each, or None), label, status,
        `rewards/<term>`, reward, advantage. The column `step` is added here.
        """
        if not self._is_writer or not rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys(name for row in rows for name in row)  # rows may differ in keys
        columns = {name: [row.get(name) for row in rows] for name in names}
        content = io.BytesIO()
        pq.write_table(pa.table({"step": [step] * len(rows)} | columns), content)
        write_atomically(completions_path(self._run_dir, self._stage, step), content.getvalue())

    def note(self, text: str) -> None:
        """Print a line on stderr without breaking the progress bar."""
        if self._is_writer:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._is_writer:
            return
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error[0] is not None))
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        is_first = self._bar.n == self._bar.initial
        shown = {label: values[name] for label, name in CONSOLE_METRICS.items() if name in values}
        self._bar.set_postfix({label: _short(v) for label, v in shown.items()}, refresh=False)
        self._bar.update(step - self._bar.n)
        if is_first:
            self._bar.refresh()


def read_metrics(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl` in order; a last line torn by a kill is left out.

    Raises:
      UsageError: another line is no step of a stage with its metrics.
    """
    rows = []
    for where, row in step_log.read(run_dir / METRICS):
        named = {"stage": row.pop("stage"), "step": row.pop("step")}
        try:
            rows.append(named | {name: float(value) for name, value in row.items()})
        except (TypeError, ValueError, OverflowError) as error:
            reason = first_line(error)
            raise UsageError(f"{where} holds what is no metric: {reason}. Remove it.") from None
    return rows


def completions_path(run_dir: pathlib.Path, stage: str, step: int) -> pathlib.Path:
    return run_dir / "completions" / f"{stage}_{step:06d}.parquet"


def _forget_after(run_dir: pathlib.Path, stage: str, last_step: int, keep_later: bool) -> None:
    """Cut the record after `last_step` of `stage`, and the completions of what is cut."""

    def forget(row: Mapping[str, Any]) -> None:
        completions_path(run_dir, row["stage"], row["step"]).unlink(missing_ok=True)

    step_log.go_back(run_dir / METRICS, stage, last_step, forget, keep_later)


def progress_bar(
    label: str,
    total: int,
    unit: str,
    *,
    initial: int = 0,
    stays: bool = False,
    is_shown: bool = True,
) -> tqdm:
    """Return a bar on stderr, which is a line now and then where stderr is no terminal.

    It is wiped when it is closed, unless it `stays`.
    """
    is_terminal = sys.stderr.isatty()
    return tqdm(
        desc=label,
        total=total,
        initial=initial,
        unit=unit,
        leave=stays or not is_terminal,
        disable=not is_shown,
        position=None if is_terminal else 0,  # else a bar beside another moves the cursor
        dynamic_ncols=True,
        miniters=1,
        mininterval=0.1 if is_terminal else PLAIN_SECONDS,
        file=sys.stderr if is_terminal else _PlainLines(),
        bar_format=None if is_terminal else PLAIN_FORMAT,
    )


class _PlainLines:
    """Take the redraws of a progress bar as lines, fit for log files."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: every line is flushed."""


class _TensorBoard:
    """Write event files in the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread that dies on a full disk, after which the
    run would wait for ever on a full queue.
    """

    def __init__(self, log_dir: pathlib.Path, purge_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        self._event, self._summary, self._log_dir = Event, Summary, log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        # Their file names hold whole seconds: a quick restart would overwrite what it resumes.
        self._writer = EventsWriter(str(log_dir / "events"), f".{time.time_ns()}")
        # A start hides what earlier files hold of this step and later ones.
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=v) for name, v in metrics.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        with explain_full_disk(self._log_dir):
            self._writer.write_event(self._event(wall_time=time.time(), **fields))
            self._writer.flush()


def _start_wandb(
    run_dir: pathlib.Path, stage: str, project: str, config: dict[str, Any], is_resumed: bool
) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"run.wandb_project={project} needs wandb, which is not installed. "
            "Run `pip install 'jlrm[wandb]'` or leave run.wandb_project empty."
        ) from error
    id_path, group = run_dir / "wandb" / f"{stage}.id", run_dir.resolve().name
    run_id = id_path.read_text() if is_resumed and id_path.exists() else None
    run = wandb.init(
        project=project,
        group=group,
        name=f"{group}-{stage}",
        dir=run_dir,
        config=config,
        id=run_id,
        resume="allow" if run_id else None,
    )
    # W&B ignores steps that go back, as a resumed run's do; so `step` is a metric of our own there.
    run.define_metric("*", step_metric="step")
    write_atomically(id_path, run.id.encode())
    return run


def jsonable(value: Any) -> Any:
    """Return nested metrics as strict JSON holds them; NaN and infinities as their names."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(entry) for name, entry in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _short(value: float) -> str:
    return tqdm.format_sizeof(value) if value >= 1000 else f"{value:.3g}"
