"""What a reward of a user's is told beside its rows, and what it notes beside its values.

TRL hands a reward its own state and two functions that log. Here they write into one context, which
whoever asked for the rewards reads afterwards. Whatever a user's code gives is made plain here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jlrm.config import RunError


@dataclass(frozen=True)
class TrainerState:
    """How far a stage has come, under TRL's names."""

    global_step: int = 0  # steps that are done
    max_steps: int = 0  # of the stage
    epoch: float = 0.0  # how often the data has been gone through


class Noted(NamedTuple):
    """A number or a column that a reward logs."""

    plugin: str
    name: str
    value: Any


@dataclass(frozen=True)
class PluginContext:
    """What a batch of calls is given beside its rows, and where its notes are kept."""

    state: TrainerState = TrainerState()
    metrics: list[Noted] = field(default_factory=list)
    columns: list[Noted] = field(default_factory=list)

    def handed(self, plugin: str) -> dict[str, Any]:
        """Return the keywords of TRL's form that are no columns."""

        def log_metric(name: str, value: Any) -> None:
            self.metrics.append(Noted(plugin, name, value))

        def log_extra(column: str, values: Any) -> None:
            self.columns.append(Noted(plugin, column, values))

        return {
            "trainer_state": self.state,
            "log_metric": log_metric,
            "log_extra": log_extra,
        }

    def numbers(self) -> list[tuple[str, float]]:
        """Return the metrics that were logged, checked; a name may occur more than once."""
        return [(noted.name, _metric(noted)) for noted in self.metrics]

    def by_row(self, num_rows: int) -> list[dict[str, Any]]:
        """Return the values of each row by column, checked."""
        columns: dict[str, list[Any]] = {}
        for noted in self.columns:
            values = plain(noted.value)
            if not isinstance(values, list):
                values = [values]
            columns.setdefault(noted.name, []).extend(map(_cell, values))
        for name, values in columns.items():
            if len(values) != num_rows:
                raise RunError(
                    f"A reward logs the column {name!r} with {len(values)} values for "
                    f"{num_rows} completions. Wanted one value for each."
                )
        return [{name: values[i] for name, values in columns.items()} for i in range(num_rows)]


def plain(given: Any) -> Any:
    """Return arrays, tensors and whatever has an order as a list; numbers, sets and others stay."""
    if hasattr(given, "tolist"):  # NumPy, JAX, torch, pandas
        return given.tolist()
    is_listed = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Set)
    return list(given) if is_listed else given


def number_of(value: Any) -> float:
    """Return a number as a float, NaN for what is none."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _metric(noted: Noted) -> float:
    number = number_of(noted.value)
    if not math.isfinite(number):
        raise RunError(
            f"The reward {noted.plugin} logs the metric {noted.name!r} as {noted.value!r}, "
            "wanted a finite number."
        )
    return number


def _cell(value: Any) -> Any:
    """Return what a table can hold: a number, a truth value, a text or nothing."""
    value = plain(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
