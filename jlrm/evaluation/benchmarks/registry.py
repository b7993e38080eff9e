"""All benchmarks by name.

Each file beside this one, or in a folder beside it, is a benchmark or several of one family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence

from jlrm.config import UsageError, nearest
from jlrm.evaluation import benchmarks
from jlrm.evaluation.benchmark import Benchmark
from jlrm.evaluation.policies import Policy, overridden


def _benchmarks() -> Iterator[Benchmark]:
    """Yield what the files here and below define, files in the order of their names."""
    for file in pkgutil.walk_packages(benchmarks.__path__, f"{benchmarks.__name__}."):
        if file.name != __name__:
            module = importlib.import_module(file.name)
            yield from (each for each in vars(module).values() if isinstance(each, Benchmark))


BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _benchmarks()}


def benchmark(name: str) -> Benchmark:
    """Return a benchmark by name. Raises UsageError with the nearest name for an unknown one."""
    if name not in BENCHMARKS:
        raise UsageError(f"--benchmark {name} is unknown. {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def policy_of(name: str, overrides: Sequence[str] = ()) -> Policy:
    """Return the policy of a benchmark with overrides, as `policies.overridden` reads them."""
    return overridden(name, BENCHMARKS[name].policies, overrides, BENCHMARKS)
