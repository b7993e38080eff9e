"""Rewards that users write: Python functions named `module:function`, in the form of TRL or verl.

    def brevity(completions, **columns) -> list[float | None]: ...              # TRL: a whole batch
    def compute_score(data_source, solution_str, ground_truth, extra_info): ... # verl: one row

The parameter names tell the forms apart. A function in TRL's form is called once per batch, with
`prompts`, `completions`, `completion_ids` and a list for every field of the comparison. Without
`**columns` it gets only the fields that it names. A function in verl's form is called once per row,
and returns a number or a dictionary with a "score". None means that the reward does not apply to a
row. A function that raises stops the run, and the error names the row. No failure becomes 0.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jlrm.config import RunError, UsageError
from jlrm.judgement.rewards import TERMS


@dataclass(frozen=True)
class Plugin:
    """A loaded reward: the name of its term, its weight and the form it is called in."""

    name: str
    weight: float
    function: Callable[..., Any]
    form: Literal["trl", "verl"]
    parameters: frozenset[str] | None  # None: it takes any keyword

    def pay(self, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Return the weighted reward of every row, None where it does not apply.

        A row holds `prompt`, `completion`, `completion_ids` and the fields of its comparison.

        Raises:
          RunError: the function raised, or gave something that is no finite number; names the row.
        """
        given = [self._verl(row) for row in rows] if self.form == "verl" else self._trl(rows)
        return [self._weighted(row, value) for row, value in zip(rows, given, strict=True)]

    def _trl(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        try:
            given = self.function(**self._columns(rows))
        except Exception as error:
            # One call for all rows does not say which it was: each is tried alone.
            raise self._failed(self._culprit(rows), error) from error
        if not isinstance(given, Sequence) or len(given) != len(rows):
            got = f"{len(given)} values" if isinstance(given, Sequence) else repr(given)
            raise RunError(f"The reward {self.name} gave {got} for {len(rows)} completions.")
        return list(given)

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        for one, many in (("prompt", "prompts"), ("completion", "completions")):
            columns[many] = columns.pop(one)
        return self._named(columns)

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the function takes of what there is."""
        if self.parameters is None:
            return values
        return {name: value for name, value in values.items() if name in self.parameters}

    def _culprit(self, rows: Sequence[Mapping[str, Any]]) -> str:
        for row in rows:
            try:
                self.function(**self._columns([row]))
            except Exception:
                return str(row["id"])
        return f"{rows[0]['id']} and {len(rows) - 1} others together, none alone"

    def _verl(self, row: Mapping[str, Any]) -> Any:
        scores = (row["score_1"], row["score_2"])
        meta = row["meta"]
        truth = row["preference"] if scores == (None, None) else list(scores)
        values = {
            "data_source": row["source"],
            "solution_str": row["completion"],
            "ground_truth": meta.get("ground_truth", truth),
            "extra_info": meta.get("extra_info", {"index": row["id"]}),
        }
        try:
            given = self.function(**self._named(values))
        except Exception as error:
            raise self._failed(str(row["id"]), error) from error
        return given.get("score") if isinstance(given, Mapping) else given

    def _weighted(self, row: Mapping[str, Any], value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RunError(
                f"The reward {self.name} gave {value!r} for row {row['id']}, "
                "wanted a finite number or None."
            )
        return self.weight * number

    def _failed(self, row: str, error: Exception) -> RunError:
        return RunError(f"The reward {self.name} failed on row {row}: {error!r}")


def load(weights: Mapping[str, float]) -> list[Plugin]:
    """Import every `module:function`.

    Raises:
      UsageError: no such module or function, a name given twice, or a function of neither form.
    """
    plugins = [_load(spec, weight) for spec, weight in weights.items()]
    names = [plugin.name for plugin in plugins]
    for name in names:
        if names.count(name) > 1 or name in (*TERMS, "swap_consistency"):
            raise UsageError(
                f"reward.plugins: there are two rewards '{name}'. Rename the function."
            )
    return plugins


def _load(spec: str, weight: float) -> Plugin:
    module_name, separator, function_name = spec.partition(":")
    if not (module_name and separator and function_name):
        raise UsageError(f"reward.plugins: '{spec}' is not of the form module:function.")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:
        raise UsageError(
            f"reward.plugins: importing '{module_name}' failed: {error!r}. "
            "It must be installed, or stand in the directory you start from."
        ) from error
    if not callable(function):
        raise UsageError(f"reward.plugins: '{module_name}' has no function '{function_name}'.")
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "solution_str" in parameters:
        form = "verl"
    elif "completions" in parameters or "completion_ids" in parameters or takes_any:
        form = "trl"
    else:
        raise UsageError(
            f"reward.plugins: '{spec}' takes ({', '.join(parameters)}). Wanted TRL's form, "
            "(prompts, completions, completion_ids, **columns), or verl's, "
            "(data_source, solution_str, ground_truth, extra_info)."
        )
    return Plugin(
        function_name, weight, function, form, None if takes_any else frozenset(parameters)
    )
