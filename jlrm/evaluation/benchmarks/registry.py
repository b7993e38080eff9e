"""All benchmarks by name."""

from __future__ import annotations

from jlrm.config import UsageError, nearest
from jlrm.evaluation.benchmark import Benchmark
from jlrm.evaluation.benchmarks import (
    helpsteer3,
    judgebench,
    judgelm,
    llmbar,
    pairs,
    pandalm,
    ppe,
    rewardbench,
    rewardbench2,
    rmb,
    rmbench,
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        pandalm.BENCHMARK,
        judgelm.BENCHMARK,
        rewardbench.BENCHMARK,
        rewardbench2.BENCHMARK,
        rmbench.BENCHMARK,
        judgebench.BENCHMARK,
        llmbar.BENCHMARK,
        helpsteer3.BENCHMARK,
        ppe.PREFERENCE,
        ppe.CORRECTNESS,
        rmb.BENCHMARK,
        pairs.BENCHMARK,
    )
}


def benchmark(name: str) -> Benchmark:
    """Return a benchmark by name. Raises UsageError with the nearest name for an unknown one."""
    if name not in BENCHMARKS:
        raise UsageError(f"--benchmark {name} is unknown. {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
