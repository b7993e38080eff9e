"""Every setting of a run, as frozen dataclasses, and the two errors that commands report.

The dataclasses below *are* the documentation of every setting. A field's comment (behind it or
above it) says its meaning and unit, and `--help` prints that comment. Its annotation carries the
least value (`Count`, `Positive`, `NonNegative`) or the choices. `runtime/settings.py` reads YAML
files and `key=value` overrides onto these classes. There is no inheritance and no registry, and no
field without an effect. `_check` compares sections with each other; checks that need the model or
the devices happen where those are known.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

Count = Annotated[int, 0]  # the number is the least value, see `_check_range`
Positive = Annotated[int, 1]
NonNegative = Annotated[float, 0.0]
MOST = 2**31 - 1  # counts become int32 on the devices
Seed = Annotated[int, 0, 2**32 - 1]  # random keys hold 32 bits: a larger seed would repeat another


class RunError(Exception):
    """A run can't go on, and the message says why. Commands print it and exit with code 1."""


class UsageError(Exception):
    """A mistake in what the user gave. Commands print it as one sentence and exit with code 2."""


@dataclass(frozen=True)
class RunConfig:
    dir: str  # everything the run writes; started again in the same place, the run goes on
    seed: Seed = 0  # initial weights, order of the data, every sampled token
    save_every: Positive = 50  # steps between checkpoints; the last step of a stage always has one
    keep_last: Positive = 2  # newest checkpoints kept
    keep_best: Count = 1  # checkpoints kept by the highest `best_metric`
    # Held-out metric that ranks checkpoints. Responses are read as the reward reads them: one that
    # it calls malformed has no verdict, and so is wrong, whatever a lenient reader makes of it.
    best_metric: Literal["agreement", "f1", "parse_rate", "swap_consistency", "reward"] = (
        "agreement"
    )
    eval_every: Count = 50  # steps between held-out evaluations; 0: only at the end of a stage
    completions_every: Count = 10  # steps between parquet files of sampled judgements; 0: none
    # Seconds that a host may stay behind the others before all give up and name it.
    host_timeout: Positive = 1800
    tensorboard: bool = True
    wandb_project: str = ""  # empty: no Weights & Biases


@dataclass(frozen=True)
class ModelSource:
    path: str = ""  # Hugging Face directory or hub id, or an earlier run's directory[@STEP]
    preset: str = ""  # random weights of this named shape (weights/presets.py), instead of `path`
    # Hugging Face directory or hub id; empty: the one beside `path`; "toy": generated.
    tokenizer: str = ""
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # master weights and optimiser moments
    # Matrix products, activations, KV cache.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass recomputes


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # across slices: parameters replicated, gradients summed
    fsdp: int = -1  # parameters sharded, gathered layer by layer; -1: all devices that are left
    tensor: int = 1  # heads, MLP and vocabulary sharded during rollouts


@dataclass(frozen=True)
class DataConfig:
    # A file, a prepared directory, hf:ORG/NAME or tfds:NAME, `#split` after it (data/readers.py);
    # or "toy".
    train: str
    eval: str = ""  # held-out rows, named as above; empty: rows of `train`, by whole questions
    eval_rows: Positive = 200  # held-out comparisons
    # Our field name: the source's own, e.g. {answer_1: response_a}.
    columns: dict[str, str] = field(default_factory=dict)
    scores: Literal["score", "score_w_reference"] = "score"  # which scores of a JudgeLM row
    prompt: str = "judgelrm_train"  # template name (judgement/prompts.py)
    # "both": every pair is judged in both orders in one step, and GRPO compares all of them.
    orders: Literal["given", "both"] = "given"
    max_prompt_tokens: Positive = 1024
    overlong: Literal["skip", "refuse"] = "skip"  # longer prompts: counted and left out, or refused


@dataclass(frozen=True)
class SamplingConfig:
    max_new_tokens: Positive = 2048
    temperature: NonNegative = 1.0  # 0: greedy
    top_k: Count = 0  # 0: off
    top_p: float = 1.0
    # Weights that rollouts are drawn with; "int8" halves what a step reads. The sampler is then
    # another policy, so grpo.loss.importance_cap is needed. Evaluation is never quantised.
    weights: Literal["full", "int8"] = "full"
    # Rollouts of a prompt that run at once, the next begins where one ends; 0: all of them.
    slots: Count = 0
    # Text: which occurrence of it ends a completion.
    stop_strings: dict[str, int] = field(default_factory=lambda: {"</answer>": 2})
    eval_temperature: NonNegative = 0.0  # for the held-out set
    eval_batch_size: Positive = 32  # sequences


@dataclass(frozen=True)
class RewardConfig:
    # "none": only what `plugins` pay.
    mode: Literal["judgelrm", "judgelrm_symmetric", "none"] = "judgelrm_symmetric"
    format: float = 1.0  # well-formed output
    out_of_range: float = -0.5  # well-formed, but a score outside the scale
    malformed: float = -1.0
    no_verdict: float = 0.0  # added to either of the two above (the authors' code: -2.0)
    relation: float = 2.0  # right order of the two scores
    wrong_relation: float = -1.5
    preference: float = 2.0  # the same for rows that have a preference alone
    wrong_preference: float = -1.5
    absolute_exact: float = 1.0  # both scores equal gold's
    absolute_near: float = 0.6  # distance of the two scores together at most `near_distance`
    near_distance: float = 2.0
    confidence: float = 0.2  # margin at least gold's
    brier: float = 0.0  # proper score of the confidence that the margin implies: from 1 to -3
    certain_margin: NonNegative = 0.0  # margin that means certainty; 0: the whole scale
    # Share of its content's pay that a verdict loses when the other order's contradicts it.
    swap_consistency: NonNegative = 0.0
    length: float = 0.0  # longer than `length_tokens` (the paper's ablation: 0.2)
    length_tokens: int = 120
    limit: float = 0.0  # token limit reached (the paper's ablation: -1.0)
    min_score: int = 1  # of the scale, in the prompt `jlrm` too
    max_score: int = 10
    # "module:function" in TRL's or verl's form (judgement/plugins.py): its weight.
    plugins: dict[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> tuple[int, int]:
        """The least and the highest score."""
        return self.min_score, self.max_score


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: NonNegative = 1e-6
    # After warm-up; the last two fall to zero at the last step.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    b1: float = 0.9
    b2: float = 0.999
    # Precision of the two moments at rest; they are computed in float32.
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01
    clip_norm: NonNegative = 1.0  # global norm; 0: off


@dataclass(frozen=True)
class SFTConfig:
    steps: Count = 0  # 0: no warm start
    batch_size: Positive = 64  # sequences per optimiser step
    pack_tokens: Count = 0  # tokens a device runs at a time: less memory, same result; 0: chosen
    max_target_tokens: int = 512  # longer written judgements are counted and left out
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))


@dataclass(frozen=True)
class LossConfig:
    """Settings of the policy loss (rl/losses.py): what is done with log-probabilities."""

    surrogate: Literal["ppo", "cispo"] = "ppo"  # a function of `rl/losses.py:SURROGATES`
    # Whose probabilities are compared; "sequence" with "ppo" is GSPO.
    ratio: Literal["token", "sequence"] = "token"
    clip_low: NonNegative = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: NonNegative = 0.2
    dual_clip: float = 0.0  # upper bound of the ratio where the advantage is negative; 0: off
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"] = (
        "token_mean"
    )
    # Truncated importance sampling: the update recomputes old log-probabilities and weighs each
    # token by min(old / sampled probability, importance_cap); 0: off.
    importance_cap: NonNegative = 0.0
    mask_truncated: bool = False  # completions cut by the limit carry no loss; their rewards count
    kl_weight: NonNegative = 0.001  # k3 against the frozen reference; 0: no reference in memory
    entropy_weight: float = 0.001


@dataclass(frozen=True)
class GRPOConfig:
    steps: Count = 0  # rollout batches; 0: no GRPO
    prompts: Positive = 16  # per step
    rollouts: Annotated[int, 2] = 8  # completions of each prompt
    epochs: Positive = 1  # passes over one rollout batch
    minibatches: Positive = 1  # optimiser steps per pass
    pack_tokens: Count = 0  # tokens a device runs at a time: less memory, same result; 0: chosen
    loss: LossConfig = field(default_factory=LossConfig)
    # Whose standard deviation the centred reward is divided by.
    advantage_scale: Literal["group", "batch", "none"] = "group"
    advantage_eps: NonNegative = 1e-6
    # Groups of equal rewards: kept with no advantage, taken out of the loss, or sampled anew from
    # the next prompts.
    zero_variance: Literal["keep", "skip", "resample"] = "keep"
    max_draws: Positive = 4  # rollout batches per step under "resample"
    # When the next rollout begins: after this step is logged and saved ("none"), before it is, with
    # the new weights ("next"), or before the update, with weights one step old ("stale": rewards
    # cost no device time, and loss.importance_cap corrects for them; a run that goes on after a
    # stop takes its first step on-policy).
    ahead: Literal["none", "next", "stale"] = "next"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class Config:
    run: RunConfig
    data: DataConfig
    model: ModelSource = field(default_factory=ModelSource)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    def __post_init__(self) -> None:
        _check_range(self)
        _check(self)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return a phrase that helps after a mistyped name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."


def dotted(section: str, key: object) -> str:
    """Return a key as overrides spell it, e.g. "grpo.steps"; `section` may be empty."""
    return f"{section}.{key}" if section else str(key)


def _check_range(section: Any, where: str = "") -> None:
    """Refuse numbers outside the range that their annotation carries, and what is no number."""
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value, key = getattr(section, name), dotted(where, name)
        if dataclasses.is_dataclass(value):
            _check_range(value, key)
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"{key}={value} is not a number.")
        least, most, *_ = (*getattr(hint, "__metadata__", ()), None, None)
        if least is not None and value < least:
            raise UsageError(f"{key}={value} is too small: at least {least}.")
        if not isinstance(value, int):
            continue
        if value > (most or MOST):
            raise UsageError(f"{key} is too large: at most {most or MOST}.")
        if value < -MOST:
            raise UsageError(f"{key} is too small: at least {-MOST}.")


def _check(config: Config) -> None:
    """Refuse combinations that no run can use, naming the field, the value and the way out."""
    sft, grpo = config.sft, config.grpo
    if not config.run.dir:
        raise UsageError("run.dir is empty: name a directory for everything that the run writes.")
    if bool(config.model.path) == bool(config.model.preset):
        raise UsageError(
            "Set exactly one of model.path (existing weights) and model.preset (random weights)."
        )
    if config.model.preset and not config.model.tokenizer:
        raise UsageError("model.preset has no tokenizer of its own: set model.tokenizer.")
    for name, optimizer in (("sft", sft.optimizer), ("grpo", grpo.optimizer)):
        if optimizer.nu_dtype == "bfloat16" and optimizer.b2 > 1 - 2**-8:
            raise UsageError(
                f"{name}.optimizer.nu_dtype=bfloat16 has 8 bits, and with b2={optimizer.b2} a step "
                "moves the moment by less than they resolve. Lower b2 to 0.99, or keep float32."
            )
    if not sft.steps and not grpo.steps:
        raise UsageError("Nothing to train: sft.steps and grpo.steps are both 0.")
    _check_sampling(config.sampling, grpo)
    _check_grpo(grpo, config.data)
    _check_reward(config.reward, config.data)


def _check_sampling(sampling: SamplingConfig, grpo: GRPOConfig) -> None:
    if not 0.0 < sampling.top_p <= 1.0:
        raise UsageError(f"sampling.top_p={sampling.top_p} is outside (0, 1].")
    if grpo.steps and sampling.temperature == 0.0:
        raise UsageError(
            "sampling.temperature=0 gives equal rollouts, from which GRPO learns nothing."
        )
    if grpo.steps and sampling.weights == "int8" and not grpo.loss.importance_cap:
        raise UsageError(
            "sampling.weights=int8 samples from another policy, which the loss must correct for: "
            "set grpo.loss.importance_cap, e.g. 2.0."
        )
    for text, count in sampling.stop_strings.items():
        if not text or count < 1:
            raise UsageError(
                f"sampling.stop_strings: {text!r}: {count} needs a text and a count of at least 1."
            )


def _check_grpo(grpo: GRPOConfig, data: DataConfig) -> None:
    if grpo.prompts % grpo.minibatches:
        raise UsageError(
            f"grpo.minibatches={grpo.minibatches} does not divide grpo.prompts={grpo.prompts}."
        )
    loss = grpo.loss
    if loss.dual_clip and loss.dual_clip < 1.0 + loss.clip_high:
        raise UsageError(
            f"grpo.loss.dual_clip={loss.dual_clip} must be 0 (off) or at least "
            f"1 + grpo.loss.clip_high = {1.0 + loss.clip_high}."
        )
    if loss.dual_clip and loss.surrogate == "cispo":
        raise UsageError("grpo.loss.dual_clip has no place in surrogate=cispo. Set it to 0.")
    if grpo.ahead == "stale" and not loss.importance_cap:
        raise UsageError(
            "grpo.ahead=stale samples from older weights, which the loss must correct for: set "
            "grpo.loss.importance_cap, e.g. 2.0."
        )
    if grpo.ahead == "stale" and grpo.zero_variance == "resample":
        raise UsageError(
            "grpo.ahead=stale can't know where zero_variance=resample ends. Use skip or keep."
        )
    if data.orders == "both" and grpo.prompts // grpo.minibatches % 2:
        raise UsageError(
            f"data.orders=both needs an even number of grpo.prompts for each of grpo.minibatches="
            f"{grpo.minibatches}, got grpo.prompts={grpo.prompts}."
        )


def _check_reward(reward: RewardConfig, data: DataConfig) -> None:
    if reward.swap_consistency and data.orders != "both":
        raise UsageError("reward.swap_consistency compares two orders: set data.orders=both.")
    if reward.swap_consistency and reward.mode == "none":
        raise UsageError("reward.swap_consistency takes back what reward.mode=none does not pay.")
    if reward.mode == "none" and not reward.plugins:
        raise UsageError("reward.mode=none pays nothing: name a reward in reward.plugins.")
    if reward.mode == "judgelrm" and reward.brier:
        raise UsageError(
            "reward.brier has no place in reward.mode=judgelrm. Use judgelrm_symmetric."
        )
    if reward.min_score >= reward.max_score:
        raise UsageError(
            f"reward.min_score={reward.min_score} is not below reward.max_score={reward.max_score}."
        )
