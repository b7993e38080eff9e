"""Programs that several runs of one test share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest


class Programs:
    """Stands in for `jax.jit`: a program made twice of equal settings is traced and compiled once.

    It compares by `repr`, which holds the address of whatever has no value to show: what is made
    of a closure, or of an object that is told apart by identity, is shared with nothing.
    """

    def __init__(self) -> None:
        self._jit, self._made = jax.jit, {}

    def __call__(self, function: Callable | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(self, **options)
        bound = (function,)
        if isinstance(function, functools.partial):
            bound = function.func, function.args, function.keywords
        key = repr((bound, options))
        if key not in self._made:
            self._made[key] = self.made(function, options)
        return self._made[key]

    def made(self, function: Callable, options: Any) -> Any:
        return self._jit(function, **options)


@pytest.fixture
def shared_programs(monkeypatch):
    """Let the runs of a test share what they compile, as the starts of one run do by the cache."""
    from jlrm.training import update

    monkeypatch.setattr(jax, "jit", Programs())
    monkeypatch.setattr(update, "make_optimizer", functools.cache(update.make_optimizer))
