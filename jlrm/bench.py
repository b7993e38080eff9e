"""Measure a run's programs here: `python -m jlrm.bench --config FILE [section.key=value ...]`.

Weights, prompts and completions are random, so neither data nor a tokenizer is needed. Prompts are
between half of `data.max_prompt_tokens` and all of it long, and one has the full length; every
completion runs to `sampling.max_new_tokens`. Each phase of a GRPO step runs once to compile, and is
then repeated:

    rollout    lay the weights out for decoding, generate, fetch the tokens
    logprobs   score the batch once, as for old or reference log-probabilities
    update     pack the batch, send it, take all optimiser steps

Model FLOPs are those that any implementation needs (costs.py); `mfu` is their rate over the best
rate of a matrix product. `roofline_share` is the least possible time over the measured one, where
each piece of work takes the longer of FLOPs / rate and bytes / bandwidth, as if both were spread
evenly over all devices. Both limits are measured in the same process, none is taken from a data
sheet. Small models fit into caches, so the bandwidth of memory does not limit them.

Left out: rewards, data and checkpoints, which are the host's work. With `--compare` two configs are
in memory side by side, and their repetitions alternate: what disturbs one disturbs the other.
`--against` measures other libraries beside ours, on workloads of its own (peers/against.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jlrm.config import Config, UsageError
from jlrm.model import lora, qwen
from jlrm.peers import against
from jlrm.planning import costs, machine
from jlrm.planning.costs import BatchSizes, Cost
from jlrm.planning.figures import BenchResult, Measured, MeasuredAgainst, PhaseFigures, Ratio
from jlrm.reports import contracts, tables
from jlrm.runtime import cluster, commands, hosts
from jlrm.runtime.mesh import open_mesh
from jlrm.runtime.settings import load, to_dict
from jlrm.runtime.settings_help import add_settings
from jlrm.sampling.generate import Generate, fetch, make_generator
from jlrm.sampling.policy import Network, bare_network
from jlrm.training import update
from jlrm.training.packing import Group
from jlrm.training.programs import (
    Known,
    Minibatch,
    grpo_programs,
    pack_minibatch,
    rollout_settings,
    training_stops,
)
from jlrm.weights.source import read_model

PHASES = ("rollout", "logprobs", "update")
PREFILL = "prefill"  # the beginning of a rollout, measured beside it
COLUMNS = {  # of the table: key of a phase's figures, unit of the column
    "s": ("seconds", 1),
    "least s": ("min_seconds", 1),
    "spread %": ("spread", 0.01),
    "tokens": ("tokens", 1),
    "tokens/s": ("tokens_per_second", 1),
    "plain/s": ("plain_tokens_per_second", 1),
    "TFLOP": ("flops", 1e12),
    "MFU %": ("mfu", 0.01),
    "roofline %": ("roofline_share", 0.01),
    "padding %": ("padding", 0.01),
    "prefill %": ("prefill_share", 0.01),
    "peak GiB": ("peak_bytes", 2**30),
    "compile s": ("compile_s", 1),
}


# --- The programs of a run, and a batch for them ---


def open_network(config: Config) -> Network:
    """Return the model of a config on a mesh of all devices."""
    return bare_network(read_model(config), open_mesh(config.mesh))


def draw_batch(config: Config) -> BatchSizes:
    """Return a batch as large as the config allows, prompts of random lengths."""
    longest = config.data.max_prompt_tokens
    rng = np.random.default_rng(config.run.seed)
    lengths = rng.integers(-(-longest // 2), longest + 1, config.grpo.prompts)
    lengths[0] = longest
    return BatchSizes(tuple(lengths.tolist()), config.grpo.rollouts, config.sampling.max_new_tokens)


class Workload:
    """The programs of a GRPO run, its state, and a random batch.

    `rollout`, `prefill`, `logprobs` and `update` each do their work once and wait for it.
    """

    def __init__(self, config: Config, network: Network) -> None:
        self.config, self.mesh, self.model = config, network.mesh, network.model
        self.network, self.training, model = network, network.training, network.model
        self.batch = draw_batch(config)
        sampling, longest = config.sampling, config.data.max_prompt_tokens
        self.programs = grpo_programs(config, network, longest)
        settings = rollout_settings(config, network)
        # Without a tokenizer no id spells anything, and no stop string is ever found.
        stops = training_stops(config, network)
        self.generate, self.generate_first = (
            make_generator(
                network,
                dataclasses.replace(settings, max_new_tokens=num_new),
                stops,
                config.run.seed,
                config.grpo.rollouts,
                longest,
            )
            for num_new in (sampling.max_new_tokens, 1)
        )
        self.number = 0  # of the rollout
        params = qwen.init(model, self.training, config.run.seed)
        self.state = update.init_state(model, self.training, self.programs.optimizer, params)
        self.reference: qwen.Params | None = None  # what is trained of it
        if config.grpo.has_reference:
            self.reference = self.programs.freeze(self.state.params)
        self._draw_tokens()
        self.parts = self._pack()

    def rollout(self) -> None:
        """Lay out the weights, generate all completions and fetch them."""
        self._generate(self.generate)

    def prefill(self) -> None:
        """Do what a rollout does up to its first tokens."""
        self._generate(self.generate_first)

    def logprobs(self) -> None:
        """Score the batch once."""
        scored = self.state.params if self.reference is None else self.reference
        params = lora.join(self.state.base, scored)
        for part in self.parts:
            jax.block_until_ready(self.programs.logprobs(params, part.rows))

    def update(self) -> None:
        """Pack and send the batch, and take the optimiser steps of one GRPO step."""
        for part in self._pack() * self.config.grpo.epochs:
            self.state, _ = self.programs.update(self.state, part.rows, part.targets)
        jax.block_until_ready(self.state)

    def costs(self) -> dict[str, list[Cost]]:
        """Return what each phase costs at least."""
        grpo, model = self.config.grpo, self.model
        dtypes = grpo.optimizer.mu_dtype, grpo.optimizer.nu_dtype
        moment_bytes = sum(jnp.dtype(dtype).itemsize for dtype in dtypes)
        parts = self.batch.split(grpo.minibatches)
        steps = [cost for part in parts for cost in costs.update_costs(model, part, moment_bytes)]
        return {
            "rollout": costs.rollout_costs(model, self.batch, self.config.sampling.slots),
            "logprobs": [cost for part in parts for cost in costs.logprobs_costs(model, part)],
            "update": steps * grpo.epochs,
        }

    def counts(self) -> dict[str, dict[str, float]]:
        """Return how many tokens each phase works on, and what share packing adds to them."""
        tokens, plain = self.batch.num_tokens, self.batch.num_plain_tokens
        padding = statistics.mean(part.packing["perf/padding"] for part in self.parts)
        epochs = self.config.grpo.epochs
        return {
            "rollout": {"tokens": self.batch.num_completion_tokens},
            "logprobs": {"tokens": tokens, "plain_tokens": plain, "padding": padding},
            "update": {
                "tokens": tokens * epochs,
                "plain_tokens": plain * epochs,
                "padding": padding,
            },
        }

    def _draw_tokens(self) -> None:
        batch, num_ids = self.batch, self.model.vocab_size - 1
        rng = np.random.default_rng(self.config.run.seed)
        num_rows = len(batch.prompts) * batch.rollouts
        self.prompts = [rng.integers(0, num_ids, length).tolist() for length in batch.prompts]
        self.completions = rng.integers(0, num_ids, (num_rows, batch.new_tokens)).tolist()
        self.logps = np.full((num_rows, batch.new_tokens), -np.log(num_ids), np.float32)
        self.advantages = rng.standard_normal(num_rows).astype(np.float32)

    def _generate(self, generate: Generate) -> None:
        self.number += 1
        weights = self.programs.lay_out(self.state.weights)
        numbers = np.arange(len(self.prompts))
        fetch(generate(weights, self.prompts, numbers, self.number), len(self.prompts))

    def _pack(self) -> list[Minibatch]:
        grpo, parts = self.config.grpo, []
        for chosen in np.split(np.arange(grpo.prompts), grpo.minibatches):
            rows = slice(chosen[0] * grpo.rollouts, (chosen[-1] + 1) * grpo.rollouts)
            groups = [
                Group(self.prompts[i], self.completions[i * grpo.rollouts :][: grpo.rollouts])
                for i in chosen
            ]
            logps, advantages = self.logps[rows], self.advantages[rows]
            parts.append(
                pack_minibatch(
                    self.network,
                    self.programs.sizes,
                    groups,
                    Known(
                        logps,
                        advantages,
                        np.ones(len(logps), bool),
                        logps if grpo.has_reference else None,
                    ),
                    grpo.loss.aggregation,
                )
            )
        return parts


# --- Measuring ---


@dataclass
class Times:
    """How long the calls of one phase took, and the peak of memory use up to its end."""

    first: float  # compiles
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def measure(workloads: Sequence[Workload], repeats: int) -> list[dict[str, Times]]:
    """Run every phase once, and then `repeats` times, in which the workloads take turns."""
    measured: list[dict[str, Times]] = [{} for _ in workloads]
    phases = ("rollout", PREFILL, "logprobs", "update")
    total = len(phases) * len(workloads) * (1 + repeats)
    with tqdm(total=total, file=sys.stderr, disable=not hosts.is_main()) as bar:

        def timed(workload: Workload, phase: str) -> float:
            bar.set_description(phase)
            began = time.perf_counter()
            getattr(workload, phase)()
            seconds = time.perf_counter() - began
            bar.update()
            return seconds

        for phase in phases:
            for workload, times in zip(workloads, measured, strict=True):
                times[phase] = Times(timed(workload, phase))
            for repeat in range(repeats):
                pairs = list(zip(workloads, measured, strict=True))
                for workload, times in pairs if repeat % 2 == 0 else reversed(pairs):
                    times[phase].seconds.append(timed(workload, phase))
            for workload, times in zip(workloads, measured, strict=True):
                times[phase].peak_bytes = machine.peak_bytes(workload.mesh)
    return measured


def figures(
    times: dict[str, Times],
    phase_costs: dict[str, list[Cost]],
    counts: dict[str, dict[str, float]],
    limits: dict[str, Any],
) -> dict[str, PhaseFigures]:
    """Return the figures of each phase."""
    by_phase: dict[str, PhaseFigures] = {}
    first_token = statistics.median(times[PREFILL].seconds)
    rates = limits["matmul_flops_per_second"], limits["read_bytes_per_second"]
    for phase in PHASES:
        seconds = statistics.median(times[phase].seconds)
        flops = sum(cost.flops for cost in phase_costs[phase])
        least, most = min(times[phase].seconds), max(times[phase].seconds)
        count = counts[phase]
        plain_tokens = count.get("plain_tokens")
        by_phase[phase] = PhaseFigures(
            seconds=seconds,
            min_seconds=least,
            spread=(most - least) / seconds,
            **count,
            tokens_per_second=count["tokens"] / seconds,
            flops=flops,
            mfu=flops / seconds / rates[0],
            roofline_share=costs.least_seconds(phase_costs[phase], *rates) / seconds,
            peak_bytes=times[phase].peak_bytes,
            compile_s=max(times[phase].first - seconds, 0.0),
            plain_tokens_per_second=None if plain_tokens is None else plain_tokens / seconds,
            prefill_share=first_token / seconds if phase == "rollout" else None,
        )
    return by_phase


def ratios(of: dict[str, Times], to: dict[str, Times]) -> dict[str, Ratio]:
    """Return how many times as long each phase of `of` took as that of `to`, pair by pair."""
    by_phase = {}
    for phase in PHASES:
        pairs = [a / b for a, b in zip(of[phase].seconds, to[phase].seconds, strict=True)]
        by_phase[phase] = Ratio(statistics.median(pairs), min(pairs), max(pairs))
    return by_phase


# --- The command ---


def bench(configs: Sequence[Config], repeats: int) -> BenchResult:
    """Measure one config, or two against each other."""
    networks = [open_network(config) for config in configs]
    dtypes = dict.fromkeys(network.model.compute_dtype for network in networks)
    mesh = networks[0].mesh  # measured before memory fills
    machines = {dtype: machine.limits(mesh, dtype) for dtype in dtypes}
    workloads = list(map(Workload, configs, networks))
    times = measure(workloads, repeats)
    results = []
    for workload, of_one in zip(workloads, times, strict=True):
        limits = machines[workload.model.compute_dtype]
        measured = figures(of_one, workload.costs(), workload.counts(), limits)
        results.append({**measured, "machine": limits})
    first, *others = results
    if not others:
        return BenchResult(**first)
    against = MeasuredAgainst(**others[0], ratio=ratios(times[1], times[0]))
    return BenchResult(**first, compare=against)


def describe(result: BenchResult, names: Sequence[str]) -> str:
    """Return the result as text: a table for each config, and one of the ratios."""
    lines = []
    parts: list[Measured] = [result, result.compare] if result.compare else [result]
    for name, part in zip(names, parts, strict=True):
        rows = [{"phase": phase, **_row(part.phase(phase))} for phase in PHASES]
        lines += [name, tables.table(rows, ["phase", *COLUMNS]), machine.describe(part.machine)]
    if result.compare:
        rows = [{"phase": p, **contracts.encode(result.compare.ratio[p])} for p in PHASES]
        lines += [
            "",
            f"Time of {names[1]} over that of {names[0]}, of runs that followed each other:",
            tables.table(rows, ["phase", "median", "min", "max"]),
        ]
    return "\n".join(lines)


def _row(phase: PhaseFigures) -> dict[str, Any]:
    """Return a phase's figures in the units of the table."""
    cells: dict[str, Any] = {}
    for column, (name, unit) in COLUMNS.items():
        value = getattr(phase, name)
        cells[column] = value if value is None or name == "tokens" else float(value / unit)
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and print."""
    words = sys.argv[1:] if argv is None else list(argv)
    if against.is_asked(words):
        against.main(words)
        return
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.bench",
        description="Measure rollout, log-probabilities and update of a config on these devices, "
        "with random weights and tokens: throughput, MFU, and share of the roofline.",
        epilog="MFU: needed FLOPs over the best rate of a matrix product. Roofline: least possible "
        "time, by FLOPs and bytes, over the time taken. Both limits are measured in the same run. "
        "Prefill: the share of a rollout up to its first tokens. plain/s: tokens a second, if "
        "each rollout's prompt were counted. Other libraries beside ours: --against NAMES --help.",
    )
    add_settings(parser)
    parser.add_argument("--compare", metavar="CONFIG", help="measure this one in turn with it")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each phase (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change a setting, of both"
    )
    cluster.add_arguments(parser)
    args = parser.parse_intermixed_args(words)
    if args.repeats < 1:
        raise UsageError(f"--repeats {args.repeats} measures nothing: at least 1.")
    names = [args.config, args.compare] if args.compare else [args.config]
    configs = [load(name, args.overrides) for name in names]
    for name, config in zip(names, configs, strict=True):
        if not config.grpo.steps:
            raise UsageError(
                f"{name} has grpo.steps=0, and what is measured is GRPO. Set grpo.steps=1."
            )
    with hosts.joined(args, to_dict(configs[0]), configs[0].run.host_timeout):
        result = bench(configs, args.repeats)
    if hosts.is_main():
        print(json.dumps(contracts.encode(result)) if args.json else describe(result, names))


if __name__ == "__main__":
    commands.finish(main)
