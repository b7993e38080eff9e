"""What a setting may hold, what is said of one that can't be used, and the errors of commands."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from typing import Annotated, Any, Literal

Count = Annotated[int, 0]  # the number is the least value, see `_check_range`
Positive = Annotated[int, 1]
NonNegative = Annotated[float, 0.0]
MOST = 2**31 - 1  # counts become int32 on the devices
Metric = Literal["agreement", "f1", "parse_rate", "swap_consistency", "reward"]
Part = Literal["base", "model", "train", "heldout", "plugins"]  # of a run: training/same_run.py
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]  # matrices of a layer: model/qwen.py
Seed = Annotated[int, 0, 2**32 - 1]  # random keys hold 32 bits: a larger seed would repeat another


class RunError(Exception):
    """A run can't go on, and the message says why. Commands print it and exit with code 1."""


class UsageError(Exception):
    """A mistake in what the user gave. Commands print it as one sentence and exit with code 2."""


def nearest(
    name: str, known: typing.Iterable[str], listed: typing.Iterable[str] | None = None
) -> str:
    """Return a phrase that helps after a mistyped name: the nearest known one, or all of them.

    listed: what is listed instead of all known names, where these are many.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(listed or known)}."


def dotted(section: str, key: object) -> str:
    """Return a key as overrides spell it, e.g. "grpo.steps"; `section` may be empty."""
    return f"{section}.{key}" if section else str(key)


def check_range(section: Any, where: str = "") -> None:
    """Refuse numbers outside the range that their annotation carries, and what is no number."""
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value, key = getattr(section, name), dotted(where, name)
        if dataclasses.is_dataclass(value):
            check_range(value, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}={value} is not a finite number.")
        least, most, *_ = (*getattr(hint, "__metadata__", ()), None, None)
        if least is not None and value < least:
            raise UsageError(f"{key}={value} is too small: at least {least}.")
        if isinstance(value, int) and not -MOST <= value <= (most or MOST):
            end = f"large: at most {most or MOST}" if value > 0 else f"small: at least {-MOST}"
            raise UsageError(f"{key} is too {end}.")
