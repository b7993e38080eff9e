"""`summary.json` of a run: held-out metrics of each stage, and what the run cost.

A diverged run has metrics that are no numbers. They are written as the strings "nan", "inf" and
"-inf", as in `metrics.jsonl`, and read back as floats.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlrm.config import UsageError
from jlrm.reports import contracts
from jlrm.reports.tracking import jsonable
from jlrm.runtime.storage import first_line, write_atomically

VERSION = 1
NAME = "summary.json"


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    stages: metrics on the held-out set, by the name of the stage, in the order in which they ran;
    `start` is before any training. In JSON each stage is a key beside the counts.
    """

    stages: Mapping[str, Mapping[str, float | None]]
    steps: int = 0
    seconds: float = 0.0  # of wall time in stages, over all starts of the run
    tokens: int = 0
    version: int = VERSION

    def as_json(self) -> dict[str, Any]:
        """Return what `summary.json` holds and `jlrm.train --json` prints."""
        stages = jsonable(self.stages)
        counts = {"steps": self.steps, "seconds": self.seconds, "tokens": self.tokens}
        return {**stages, **counts, "version": self.version}


def write(run_dir: pathlib.Path, summary: RunSummary) -> None:
    """Write `summary.json`, replacing an earlier one."""
    text = json.dumps(summary.as_json(), indent=2, allow_nan=False) + "\n"
    write_atomically(run_dir / NAME, text.encode())


def read(run_dir: pathlib.Path) -> RunSummary | None:
    """Return the summary of a run directory; None where no stage has ended yet.

    Raises:
      UsageError: the file is no JSON object, or of a version that is not known here.
    """
    path = run_dir / NAME
    if not path.exists():
        return None
    remedy = "Run the training again: it goes on and writes it."
    content = contracts.read(path, VERSION, remedy)
    try:
        return RunSummary(
            stages={
                stage: {name: None if v is None else float(v) for name, v in metrics.items()}
                for stage, metrics in content.items()
                if isinstance(metrics, dict)
            },
            steps=int(content.get("steps") or 0),
            seconds=float(content.get("seconds") or 0),
            tokens=int(content.get("tokens") or 0),
        )
    except (TypeError, ValueError, OverflowError) as error:
        reason = first_line(error)
        raise UsageError(f"{path} is no summary of a run: {reason}. {remedy}") from None
