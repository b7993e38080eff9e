"""How long a run takes and what it costs: an estimate from what was counted in its programs.

A program takes longer than its lower bound. By how much is taken from runs that others have
published. The same shapes were compiled here as programs of ours, and their bounds set beside the
published times:

    training   Llama-3.1-8B on v6e-8, 3 x 8,192 tokens a chip: 3.44 s a step (MaxText's recipe) over
               a bound of 1.44 s. On v5e MaxText reaches 61 to 67 % of the peak, and its layers are
               computed four times for every three that count: 2.1 bounds.
    decoding   Qwen3-8B on v6e-8, 32 x (512 + 512): 4,985 tokens a second by vLLM and 4,084 by
               Levanter (marin, pull request 6185), so 6.4 and 7.8 ms a step over a bound of 1.1 ms.
               What comes on top is 0.147 and 0.187 ms a layer.

No run of ours has been timed on a TPU. So an estimate reaches from the smaller figure to twice the
larger one. Completions are counted as long as they may be.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from jlrm.config import Config, stages_of
from jlrm.planning.figures import Duration, ProgramPlan

MARGIN = 2.0  # of programs that nobody has timed, over those of published runs
BOUNDS = 2.1, 2.4 * MARGIN  # how many lower bounds a program takes that does not decode
LAYER_S = 0.147e-3, 0.187e-3 * MARGIN  # a step and layer of decoding, beside the lower bound
BASIS = (
    f"Lower bounds of the compiled programs times {BOUNDS[0]:.1f} to {BOUNDS[1]:.1f}, and for each "
    f"step of decoding the bound and {1e3 * LAYER_S[0]:.2f} to {1e3 * LAYER_S[1]:.2f} ms a layer: "
    "from what published runs of MaxText, vLLM and Levanter took for shapes compiled here, up to "
    "twice that. Every completion as long as allowed; start, compiling and saving not counted. No "
    "run of jlrm has been timed on a TPU."
)
DEFAULT_ROWS = 200  # held-out comparisons, where the config leaves their number open


def estimate(
    config: Config,
    programs: Mapping[str, ProgramPlan],
    num_layers: int,
    num_chips: int,
    num_steps: int | None = None,
    dollars_per_chip_hour: float | None = None,
) -> Duration | None:
    """Return how long a run takes; None where a program's work could not be counted.

    Args:
      programs: all that the run has.
      num_steps: of the last stage, in place of the config's.
    """
    if any(program.lower_bound_s is None for program in programs.values()):
        return None
    took = {name: _seconds(program, num_layers) for name, program in programs.items()}
    stages, every = stages_of(config), config.run.eval_every
    steps = {name: getattr(config, name).steps for name in stages}
    if num_steps is not None:
        steps[stages[-1]] = num_steps
    step_s = {name: _sum(_runs(config, name, programs), took) for name in stages}
    judging_s = {name: _sum(_judging(config, name, programs), took) for name in stages}
    num_judged = {name: math.ceil(steps[name] / (every or steps[name] or 1)) for name in stages}
    least, most = (
        sum(
            steps[name] * step_s[name][i] + num_judged[name] * judging_s[name][i] for name in stages
        )
        / 3600
        for i in range(2)
    )
    dollars = None
    if dollars_per_chip_hour is not None:
        rate = num_chips * dollars_per_chip_hour
        dollars = least * rate, most * rate
    return Duration(steps, step_s, (least, most), dollars, BASIS)


def _runs(config: Config, stage: str, programs: Container[str]) -> dict[str, int]:
    """Return how often a step of a stage runs each of its programs."""
    grpo = config.grpo
    counts = {
        "dpo": {"lay_out": int(config.dpo.is_sampled), "rollout_dpo": 1, "dpo_reference": 1},
        "grpo": {
            "lay_out": 1,
            "rollout": 1,
            "rollout_greedy": 1,
            "logprobs_reference": grpo.minibatches,
            "logprobs_policy": grpo.minibatches,
            "update": grpo.epochs * grpo.minibatches,
        },
    }.get(stage, {})
    counts |= {stage: 1}  # the update of all stages but GRPO
    return {name: count for name, count in counts.items() if name in programs}


def _judging(config: Config, stage: str, programs: Container[str]) -> dict[str, int]:
    """Return how often judging the held-out rows once, in both orders, runs each program."""
    num_games = 2 * (config.data.eval_rows or DEFAULT_ROWS)
    if stage == "reward_model":
        num_texts = num_games * (2 if config.reward_model.kind == "bradley_terry" else 1)
        return {"reward_scores": math.ceil(num_texts / config.sampling.eval_batch_size)}
    lay_out = "lay_out_evaluation" if "lay_out_evaluation" in programs else "lay_out"
    return {lay_out: 1, "evaluation": math.ceil(num_games / config.sampling.eval_batch_size)}


def _sum(counts: Mapping[str, int], took: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    least, most = (
        sum(count * took[name][end] for name, count in counts.items()) for end in range(2)
    )
    return least, most


def _seconds(program: ProgramPlan, num_layers: int) -> tuple[float, float]:
    """Return how long a program takes, from the least to the most."""
    assert program.lower_bound_s is not None
    bound, step, prefill = max(program.lower_bound_s.values()), program.decode_step, program.prefill
    if step is None or prefill is None:
        return bound * BOUNDS[0], bound * BOUNDS[1]
    first, layers = max(prefill.lower_bound_s.values()), step.steps * num_layers
    steps = bound - first  # not `step` so often: caches grow
    return (
        first * BOUNDS[0] + steps + layers * LAYER_S[0],
        first * BOUNDS[1] + steps * MARGIN + layers * LAYER_S[1],
    )
