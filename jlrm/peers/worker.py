"""Run one phase of one library, once for each line on stdin: `worker.py ADAPTER WORKLOAD PHASE`.

It runs in the library's own Python, which has no jlrm: it imports NumPy and nothing of ours. Each
line is answered by one line of JSON. At the end of stdin the process ends where it is.

An adapter is a file with these functions; a phase that it does not have is an error.

    PACKAGES                 the packages whose versions are told
    device_peak()            -> the most bytes of the GPU that were held, None on a CPU
    check(work)              -> log-probabilities [B, T] of the batch, and its loss
    rollout(work, turns)     draw B completions in each turn, and put their ids into turns.tokens
    update(work, turns)      take one optimiser step on the batch in each turn
    iteration(work, turns)   a rollout, its rewards, log-probabilities of the reference, one step
    sft, dpo, bradley_terry  (work, turns): take one step of that stage on the pairs in each turn
    losses(work, stage)      beside these: -> the loss of each of the first `check_steps` steps

A turn begins when `turns` gives its number and ends when the next one is asked for, so its work has
to be done by then, devices included. What comes before the first turn is not timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class Given:
    """The workload as an adapter gets it: settings of workload.json, arrays, texts, rewards."""

    def __init__(self, directory: pathlib.Path, flags: list[str]) -> None:
        self.directory, self.model = directory, str(directory / "model")
        self.flags = flags  # of the variant of a library
        self.settings: dict[str, Any] = json.loads((directory / "workload.json").read_text())
        with np.load(directory / "batch.npz") as arrays:
            self.batch: dict[str, np.ndarray] = dict(arrays)
        with np.load(directory / "pairs.npz") as arrays:
            self.pairs: dict[str, np.ndarray] = dict(arrays)

    def __getattr__(self, name: str) -> Any:
        """Return a setting, as `work.rollouts`."""
        if name in self.__dict__.get("settings", ()):
            return self.settings[name]
        raise AttributeError(name)

    @property
    def texts(self) -> list[str]:
        """The prompts as text, for libraries that tokenise them."""
        return [" ".join(f"t{i}" for i in ids) for ids in self.prompts]

    def tokenizer(self) -> Any:
        """Return the tokenizer of words; every library's Python has `transformers`.

        Raises:
          ValueError: it gives other ids than the prompts': the library would do other work.
        """
        from transformers import PreTrainedTokenizerFast

        # By its class: `AutoTokenizer` takes that of the model's family, whatever the file says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.model)
        if tokenizer(self.texts)["input_ids"] != self.prompts:
            raise ValueError("the tokenizer does not give the ids of the prompts")
        return tokenizer

    @staticmethod
    def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        """Pay a text for its length, in the form that TRL and Tunix take: what is cheap to know."""
        return [float(len(text) % 7) for text in completions]


class TimedTurns:
    """Waits for a line of stdin before each turn, and tells what the turn before it took."""

    def __init__(self, tell: Any, device_peak: Callable[[], int | None]) -> None:
        self.tell, self.device_peak, self.tokens = tell, device_peak, None

    def __iter__(self) -> Iterator[int]:
        number = 0
        while sys.stdin.readline():
            number += 1
            began = time.perf_counter()
            yield number
            took = time.perf_counter() - began
            peak = self.device_peak() or peak_bytes()
            self.tell({"seconds": took, "peak_bytes": peak, **self._drawn()})
        # A library's own loop may be around this one, and could take long to end.
        os._exit(0)

    def _drawn(self) -> dict[str, list[int]]:
        """Return B, T and how many of the completions differ."""
        if self.tokens is None:
            return {}
        tokens = np.asarray(self.tokens)
        return {"drawn": [*tokens.shape, len(np.unique(tokens, axis=0))]}


def peak_bytes() -> int:
    """Return the most memory that this process has had resident."""
    # Not ru_maxrss, where there is another way: Linux lets a process inherit that of its parent.
    try:
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Answer on stdout, where nothing that a library prints gets to: that goes to stderr."""
    file, directory, phase, *flags = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    work = Given(pathlib.Path(directory), flags)
    if phase == "check":
        work.settings["dtype"] = "float32"  # what is computed, without the noise of less precision
    if work.dtype == "float32":  # JAX would multiply shorter numbers on a GPU; torch does not
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    spec = importlib.util.spec_from_file_location("adapter", file)
    assert spec is not None and spec.loader is not None
    adapter = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(adapter)
    except ModuleNotFoundError as error:
        tell({"missing": str(error)})
        return
    if phase == "check":
        logps, loss = adapter.check(work)
        versions = {name: importlib.metadata.version(name) for name in adapter.PACKAGES}
        logps = np.asarray(logps, np.float64).tolist()
        known = [stage for stage in work.stages if hasattr(adapter, stage)]
        losses = {stage: [float(each) for each in adapter.losses(work, stage)] for stage in known}
        tell({"logps": logps, "loss": float(loss), "losses": losses, "versions": versions})
    elif not hasattr(adapter, phase):
        raise SystemExit(f"nothing is known of {phase} in this library")
    else:
        getattr(adapter, phase)(work, TimedTurns(tell, adapter.device_peak))


if __name__ == "__main__":
    main()
