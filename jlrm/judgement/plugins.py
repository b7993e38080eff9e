"""Rewards that users write, named `module:name`, in the form of TRL or verl.

    def brevity(completions, **columns) -> list[float | None]: ...              # TRL: a whole batch
    def compute_score(data_source, solution_str, ground_truth, extra_info): ... # verl: one row

The parameter names tell the forms apart. A function, a callable object, or a class that is made
without arguments will do, and each may be `async`: those of one batch run at the same time.

A reward in TRL's form is called once per batch, with `prompts`, `completions`, `completion_ids`, a
list for every field of the comparison and for every column of the row's own (`meta`), and with
`trainer_state`, `log_metric(name, value)` and `log_extra(column, values)`. Without `**columns` it
gets only what it names. It returns a number for each completion: a list, or an array or tensor of
NumPy, JAX or torch. A reward in verl's form is called once per row, and returns a number or a
dictionary with a "score".

None means that the reward does not apply to a row: the other rewards alone pay it, and a row that
none pays is out of the baseline and out of the loss. A reward that raises, or calls `sys.exit`,
stops the run, and the error names the row. No failure becomes 0.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from jlrm.config import RunError, UsageError
from jlrm.judgement.notes import PluginContext, number_of, plain
from jlrm.judgement.rewards import TERMS
from jlrm.judgement.turns import Turn

Row = Mapping[str, Any]
# What a user's code raises: sys.exit would end the run with exit code 0, as if all were done.
FAILURES = (Exception, SystemExit, asyncio.CancelledError)


@dataclass(frozen=True)
class Plugin:
    """A loaded reward: the name of its term, its weight and the form it is called in."""

    name: str
    weight: float
    function: Callable[..., Any]
    form: Literal["trl", "verl"]
    parameters: frozenset[str] | None  # None: it takes any keyword
    required: frozenset[str] = frozenset()  # those without a default

    def pay(self, rows: Sequence[Row], context: PluginContext | None = None) -> list[float | None]:
        """Return the weighted reward of every row, None where it does not apply; see `pay`."""
        return pay([self], rows, context or PluginContext())[self.name]

    def calls(self, rows: Sequence[Row], context: PluginContext) -> list[PluginCall]:
        """Return the calls that pay these rows: one for all of them, or one for each.

        Raises:
          RunError: it takes a column that no row has.
        """
        if self.form == "verl":
            return [PluginCall(self, [row], self._named(_verl_arguments(row))) for row in rows]
        values = {**_columns(rows), **context.handed(self.name)}
        if absent := sorted(self.required - values.keys()):
            raise RunError(
                f"The reward {self.name} takes {', '.join(map(repr, absent))}, which no row of "
                f"this batch has (columns: {', '.join(sorted(values))}). Give the parameter a "
                "default if only some rows have that column."
            )
        return [PluginCall(self, rows, self._named(values))]

    def values(self, call: PluginCall, given: Any) -> list[float | None]:
        """Return the weighted rewards of a call's rows from what it gave.

        Raises:
          RunError: no number for each of them.
        """
        if self.form == "verl":
            given = [self._score(call.rows[0], given)]
        elif not isinstance(given, list) or len(given) != len(call.rows):
            got = f"{len(given)} values" if isinstance(given, list) else f"{given!r:.80}"
            raise RunError(f"The reward {self.name} gave {got} for {len(call.rows)} completions.")
        return [self._weighted(row, value) for row, value in zip(call.rows, given, strict=True)]

    def failed(self, call: PluginCall, error: BaseException) -> RunError:
        """Return the error that stops the run, which names the row."""
        if isinstance(error, SystemExit):
            what = f"it called sys.exit({'' if error.code is None else repr(error.code)})"
        else:
            what = repr(error)
        return RunError(f"The reward {self.name} failed on row {self._culprit(call)}: {what}")

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the function takes of what there is."""
        if self.parameters is None:
            return values
        return {name: value for name, value in values.items() if name in self.parameters}

    def _culprit(self, call: PluginCall) -> str:
        """Try each row alone: one call for all of them does not say which it was."""
        if len(call.rows) == 1:
            return str(call.rows[0]["id"])
        for i, row in enumerate(call.rows):
            given = call.alone(i).begin()
            if isinstance(_settled([given])[0] if inspect.isawaitable(given) else given, Failure):
                return str(row["id"])
        return f"{call.rows[0]['id']} and {len(call.rows) - 1} others together, none alone"

    def _score(self, row: Row, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if "score" not in given:
            raise RunError(
                f"The reward {self.name} gave a dictionary without 'score' for row {row['id']} "
                f"(keys: {', '.join(map(str, given))})."
            )
        return given["score"]

    def _weighted(self, row: Row, value: Any) -> float | None:
        if value is None:
            return None
        number = number_of(value)
        if not math.isfinite(number):
            raise RunError(
                f"The reward {self.name} gave {value!r:.80} for row {row['id']}, "
                "wanted a finite number or None."
            )
        return self.weight * number


class Failure(NamedTuple):
    """What a user's code raised."""

    error: BaseException


class PluginCall(NamedTuple):
    """One call of a user's function, and the rows that it pays."""

    plugin: Plugin
    rows: Sequence[Row]
    arguments: dict[str, Any]

    def alone(self, i: int) -> PluginCall:
        """Return the same call for one of its rows."""
        of_row = {
            name: value[i : i + 1] if isinstance(value, list) else value
            for name, value in self.arguments.items()
        }
        return PluginCall(self.plugin, self.rows[i : i + 1], of_row)

    def begin(self) -> Any:
        """Return what the function gives, something to await, or its `Failure`."""
        try:
            given = self.plugin.function(**self.arguments)
            return given if inspect.isawaitable(given) else plain(given)
        except FAILURES as error:
            return Failure(error)


def pay(
    plugins: Sequence[Plugin], rows: Sequence[Row], context: PluginContext
) -> dict[str, list[float | None]]:
    """Return the weighted rewards of every row, by plug-in; None where one does not apply.

    A row holds `prompt`, `completion`, `completion_ids` and the fields of its comparison.

    Raises:
      RunError: a function raised, or gave something that is no finite number; names the row.
    """
    calls = [call for plugin in plugins for call in plugin.calls(rows, context)]
    given = [_checked(call, call.begin()) for call in calls]
    waiting = [i for i, value in enumerate(given) if inspect.isawaitable(value)]
    for i, value in zip(waiting, _settled([given[i] for i in waiting]), strict=True):
        given[i] = _checked(calls[i], value)
    paid: dict[str, list[float | None]] = {plugin.name: [] for plugin in plugins}
    for call, value in zip(calls, given, strict=True):
        paid[call.plugin.name] += call.plugin.values(call, value)
    return paid


def load(weights: Mapping[str, float]) -> list[Plugin]:
    """Import every `module:name`.

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
    module_name, separator, name = spec.partition(":")
    if not (module_name and separator and name):
        raise UsageError(f"reward.plugins: '{spec}' is not of the form module:function.")
    function = _import(spec, module_name, name)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # of some functions written in C
        raise UsageError(f"reward.plugins: '{spec}' does not tell its parameters.") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
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
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    required = frozenset(n for n, p in named.items() if p.default is p.empty)
    return Plugin(name, weight, function, form, None if takes_any else frozenset(named), required)


def _import(spec: str, module_name: str, name: str) -> Callable[..., Any]:
    """Return the function or the callable object; a class is made without arguments."""
    try:
        module = importlib.import_module(module_name)
    except FAILURES as error:
        raise UsageError(
            f"reward.plugins: importing '{module_name}' failed: {error!r}. "
            "It must be installed, or stand in the directory you start from."
        ) from error
    try:
        function = attrgetter(name)(module)
    except AttributeError:
        function = None
    if inspect.isclass(function):
        try:
            function = function()
        except FAILURES as error:
            raise UsageError(
                f"reward.plugins: '{spec}' is a class, and making one without arguments failed: "
                f"{error!r}. Name an object of it."
            ) from error
    if not callable(function):
        raise UsageError(f"reward.plugins: '{module_name}' has no function '{name}'.")
    return function


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return a list for every field of the rows; a row's own columns can't hide one of ours."""
    own = dict.fromkeys(name for row in rows for name in row["meta"])
    ours = {name: [row[name] for row in rows] for name in rows[0]}
    prompts, completions = ours.pop("prompt"), ours.pop("completion")
    return {
        # Copies: what one reward changes in them, no other sees, nor the next epoch.
        **{name: [copy.deepcopy(row["meta"].get(name)) for row in rows] for name in own},
        **ours,
        "meta": [copy.deepcopy(row["meta"]) for row in rows],
        "prompts": [Turn(text, "user") for text in prompts],
        "completions": [Turn(text) for text in completions],
    }


def _verl_arguments(row: Row) -> dict[str, Any]:
    scores, meta = (row["score_1"], row["score_2"]), copy.deepcopy(row["meta"])
    truth = row["preference"] if scores == (None, None) else list(scores)
    truth = row.get("scores") or row.get("ranking") or truth  # of a list of answers
    return {
        "data_source": row["source"],
        "solution_str": row["completion"],
        "ground_truth": meta.get("ground_truth", truth),
        "extra_info": meta.get("extra_info", {"index": row["id"]}),
    }


def _checked(call: PluginCall, given: Any) -> Any:
    if isinstance(given, Failure):
        raise call.plugin.failed(call, given.error) from given.error
    return given


def _settled(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    """Wait for all of them at once; each becomes what it gives, or its `Failure`."""

    async def settle(awaitable: Awaitable[Any]) -> Any:
        try:
            return plain(await awaitable)
        except FAILURES as error:
            return Failure(error)

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(settle, waiting))

    return asyncio.run_coroutine_threadsafe(gather(), _event_loop()).result() if waiting else []


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop that awaits rewards, one for the process.

    Clients that a user's module keeps open belong to the loop they were first used in. A thread of
    its own, because a notebook's main thread runs a loop already.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
