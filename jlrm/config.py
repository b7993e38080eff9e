"""Every setting of a run, as frozen dataclasses, and the two errors that commands report.

The dataclasses below *are* the documentation of every setting. A field's comment (behind it or
above it) says its meaning and unit, and `--help` prints that comment. Its annotation carries the
least value (`Count`, `Positive`, `NonNegative`) or the choices. `runtime/settings.py` reads YAML
files and `key=value` overrides onto these classes. `_check` compares sections with each other;
checks that need the model or the devices happen where those are known.
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
Metric = Literal["agreement", "f1", "parse_rate", "swap_consistency", "reward"]
Part = Literal["base", "model", "train", "heldout", "plugins"]  # of a run: training/same_run.py
Seed = Annotated[int, 0, 2**32 - 1]  # random keys hold 32 bits: a larger seed would repeat another


class RunError(Exception):
    """A run can't go on, and the message says why. Commands print it and exit with code 1."""


class UsageError(Exception):
    """A mistake in what the user gave. Commands print it as one sentence and exit with code 2."""


@dataclass(frozen=True)
class RunConfig:
    dir: str  # directory or url for all that the run writes; the same command again resumes there
    seed: Seed = 0  # initial weights, order of the data, every sampled token
    save_every: Positive = 50  # steps between checkpoints; the last step of a stage always has one
    keep_last: Positive = 2  # newest checkpoints kept
    accept: list[Part] = field(default_factory=list)  # changed parts with which it goes on
    resume: str = ""  # where to go on: [STAGE/]STEP, or "previous" where the newest is damaged
    keep_best: Count = 1  # checkpoints kept for the highest values of `best_metric`
    # Held-out metric that ranks checkpoints. What the reward calls malformed is wrong here.
    best_metric: Metric = "agreement"
    eval_every: Count = 50  # steps between held-out evaluations; 0: only at the end of a stage
    completions_every: Count = 10  # steps between parquet files of sampled judgements; 0: none
    # Alarms that end the run, saved, with exit code 1 (names: reports/alarms.py), e.g. [kl, place].
    stop_on: list[str] = field(default_factory=list)
    host_timeout: Positive = 1800  # seconds that a host may lag behind; then all stop and name it
    # Compile every program before the first step; "auto": where there are several hosts.
    precompile: Literal["auto", "always", "never"] = "auto"
    tensorboard: bool = True  # write event files for TensorBoard
    wandb_project: str = ""  # project on Weights & Biases; empty: not used


@dataclass(frozen=True)
class ModelSource:
    # Weights to begin with: Hugging Face directory or hub id, or an earlier run as DIR[@STEP].
    path: str = ""
    preset: str = ""  # random weights of this named shape (weights/presets.py), instead of `path`
    # Hugging Face directory or hub id; empty: the one beside `path`; "toy": generated.
    tokenizer: str = ""
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # precision of the trained weights
    # Precision of matrix products, activations and KV cache.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass computes again instead of keeping it: "full" needs least memory.
    remat: Literal["none", "dots", "full"] = "full"


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # copies of the weights, one a slice; gradients are summed over them
    # Devices that share one copy of the weights, gathered layer by layer; -1: all that are left.
    fsdp: int = -1
    tensor: int = 1  # devices that share heads, MLP and vocabulary during rollouts


@dataclass(frozen=True)
class DataConfig:
    # A file, a directory, a url, hf:ORG/NAME or tfds:NAME, `#split` after it (data/readers.py); or
    # "toy" or "languages": generated (data/worlds/).
    train: str
    eval: str = ""  # held-out rows, named as above; empty: rows of `train`, by whole questions
    # Number of held-out comparisons; 0: 200, but of `train` at most a fifth.
    eval_rows: Count = 0
    # What two questions share that are one, both trained on or both held out: words and signs, or
    # the text in lower case. A run keeps what it began with.
    folding: Literal["words", "text"] = "words"
    # Our name of a field: the name of that column in the file, e.g. {answer_1: response_a}.
    columns: dict[str, str] = field(default_factory=dict)
    # What the file's labels mean: 1, the first answer is better, 2, the second, or 0, a tie, e.g.
    # {0: 1, 1: 2, 2: 0} or {chosen_a: 1, chosen_b: 2}. Empty: 1, 2, 0 and words such as model_a.
    values: dict[str, int] = field(default_factory=dict)
    # Which scores of a JudgeLM row are gold: made without or with a reference answer.
    scores: Literal["score", "score_w_reference"] = "score"
    # Two scores of the file and what they become, if its scale is not the reward's: {0: 1, 100: 10}
    rescale: dict[str, float] = field(default_factory=dict)
    # "shuffled", a control: in half the training pairs, by chance, gold names the worse answer.
    gold: Literal["given", "shuffled"] = "given"
    prompt: str = "judgelrm_train"  # name of the prompt template (judgement/prompts.py)
    # "both": every pair is judged in both orders in one step, and GRPO compares all of them.
    orders: Literal["given", "both"] = "given"
    max_prompt_tokens: Positive = 1024  # longest prompt that is used
    # A longer prompt is counted and left out ("skip"), or stops the run ("refuse").
    overlong: Literal["skip", "refuse"] = "skip"


@dataclass(frozen=True)
class SamplingConfig:
    max_new_tokens: Positive = 2048  # longest completion
    temperature: NonNegative = 1.0  # of rollouts; 0: greedy
    top_k: Count = 0  # sample from this many likeliest tokens; 0: off
    top_p: float = 1.0  # sample from the likeliest tokens of this total probability; 1: off
    # Weights that rollouts are drawn with; "int8" halves what a step reads. The sampler is then
    # another policy, so grpo.loss.importance_cap is needed. Evaluation is never quantised.
    weights: Literal["full", "int8"] = "full"
    # Rollouts of a prompt that run at once; the next begins when one ends. 0: all of them.
    slots: Count = 0
    # Text: the number of the occurrence that ends a completion. They count from the end of the
    # reasoning, `</think>`: what is drafted or quoted before it ends nothing.
    stop_strings: dict[str, int] = field(default_factory=lambda: {"</answer>": 2})
    eval_temperature: NonNegative = 0.0  # for the held-out set; 0: greedy
    eval_batch_size: Positive = 32  # held-out prompts that are sampled together


@dataclass(frozen=True)
class RewardConfig:
    # Formula of the reward: the authors' code, its symmetric form, or only what `plugins` pay.
    mode: Literal["judgelrm", "judgelrm_symmetric", "none"] = "judgelrm_symmetric"
    format: float = 1.0  # paid for well-formed output
    out_of_range: float = -0.5  # instead of `format`: well-formed, but a score is outside the scale
    malformed: float = -1.0  # instead of `format`: the text has another form
    # Added to the two above where no verdict can be read (the authors' code: -2.0).
    no_verdict: float = 0.0
    relation: float = 2.0  # the two scores are in the order of the gold scores
    wrong_relation: float = -1.5  # they are in another order
    preference: float = 2.0  # as `relation`, for rows that have a preference and no scores
    wrong_preference: float = -1.5  # as `wrong_relation`, for the same rows
    absolute_exact: float = 1.0  # both scores equal the gold scores
    absolute_near: float = 0.6  # |score - gold| of both answers sums to at most `near_distance`
    near_distance: float = 2.0  # the distance that `absolute_near` allows
    confidence: float = 0.2  # the margin of the scores is at least as large as gold's
    brier: float = 0.0  # proper score, 1 to -3, of the confidence that the margin implies
    certain_margin: NonNegative = 0.0  # margin that means certainty to `brier`; 0: whole scale
    # Share of its content's pay that a verdict loses when the other order's contradicts it.
    swap_consistency: NonNegative = 0.0
    length: float = 0.0  # completion longer than `length_tokens` (the paper's ablation: 0.2)
    length_tokens: int = 120  # tokens of a completion that `length` asks for
    limit: float = 0.0  # completion cut by the token limit (the paper's ablation: -1.0)
    min_score: int = 1  # lowest score of the scale; the prompt `jlrm` names it too
    max_score: int = 10  # highest score of the scale
    # Rewards of your own: "module:name" of a function or callable object in TRL's or verl's form,
    # async or not (judgement/plugins.py), and their weights.
    plugins: dict[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> tuple[int, int]:
        """The least and the highest score."""
        return self.min_score, self.max_score


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: NonNegative = 1e-6  # highest rate, reached after warm-up
    # Learning rate after warm-up; the last two fall to zero at the last step.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0  # steps in which the rate rises from 0
    b1: float = 0.9  # decay of Adam's first moment
    b2: float = 0.999  # decay of Adam's second moment
    # Precision in which the first moment is stored; it is computed in float32.
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    # The same for the second moment.
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    eps: NonNegative = 1e-8  # Adam's epsilon
    weight_decay: NonNegative = 0.01  # AdamW's
    clip_norm: NonNegative = 1.0  # largest global norm of a gradient; 0: off


@dataclass(frozen=True)
class SFTConfig:
    title = "SFT"  # what makes a section a stage
    batch_field = "batch_size"  # the setting that says how many rows a batch takes
    steps: Count = 0  # optimiser steps; 0: no SFT before GRPO
    batch_size: Positive = 64  # sequences per optimiser step
    # Tokens that a device runs at a time: fewer need less memory, same result; 0: automatic.
    pack_tokens: Count = 0
    max_target_tokens: int = 512  # a longer written judgement is counted and left out
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))


@dataclass(frozen=True)
class LossConfig:
    """Settings of the policy loss (rl/losses.py): what is done with log-probabilities."""

    surrogate: Literal["ppo", "cispo"] = "ppo"  # a function of `rl/losses.py:SURROGATES`
    # Whose probabilities are compared; "sequence" with "ppo" is GSPO.
    ratio: Literal["token", "sequence"] = "token"
    clip_low: NonNegative = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: NonNegative = 0.2  # see clip_low
    dual_clip: float = 0.0  # upper bound of the ratio where the advantage is negative; 0: off
    # What a token's loss is divided by, of B completions: all their tokens ("token_mean"), its own
    # completion's tokens · B ("sequence_mean"), B ("sequence_sum"), the token limit · B
    # ("fixed_length"). See grpo.zero_variance for completions that are out of the loss.
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"] = (
        "token_mean"
    )
    # Truncated importance sampling: the update recomputes old log-probabilities and weighs each
    # token by min(old / sampled probability, importance_cap); 0: off.
    importance_cap: NonNegative = 0.0
    mask_truncated: bool = False  # completions cut by the limit carry no loss; their rewards count
    kl_weight: NonNegative = 0.001  # k3 against the frozen reference; 0: no reference in memory
    entropy_weight: float = 0.001  # weight of the entropy, which lowers the loss


@dataclass(frozen=True)
class GRPOConfig:
    title = "GRPO"
    batch_field = "prompts"
    steps: Count = 0  # rollout batches; 0: no GRPO
    prompts: Positive = 16  # per step
    rollouts: Annotated[int, 2] = 8  # completions of each prompt
    epochs: Positive = 1  # passes over one rollout batch
    minibatches: Positive = 1  # optimiser steps per pass
    # Tokens that a device runs at a time: fewer need less memory, same result; 0: automatic.
    pack_tokens: Count = 0
    loss: LossConfig = field(default_factory=LossConfig)
    # Whose standard deviation the centred reward is divided by.
    advantage_scale: Literal["group", "batch", "none"] = "group"
    advantage_eps: NonNegative = 1e-6  # added to that standard deviation
    # What importance weights (loss.importance_cap) weigh: the surrogate, as in TRL and verl, or the
    # KL and entropy terms too, as in NeMo-RL.
    importance_terms: Literal["policy", "all"] = "policy"
    # Groups of equal rewards: kept with no advantage, taken out of the loss ("skip"), or sampled
    # anew from the next prompts. loss.aggregation "token_mean" then has fewer tokens to divide by,
    # so the other groups weigh more; the others still divide by all B completions, so the step gets
    # smaller. "resample" takes the deviation of advantage_scale "batch" over the groups it chose.
    zero_variance: Literal["keep", "skip", "resample"] = "keep"
    max_draws: Positive = 4  # rollout batches per step under "resample"
    # When the next rollout begins: after this step is logged and saved ("none"), before it is, with
    # the new weights ("next"), or before the update, with weights one step old ("stale": rewards
    # cost no device time, and loss.importance_cap corrects for them).
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


def stage_titles() -> dict[str, str]:
    """Return name: title of all stages, in the order in which a run has them.

    A stage is a section that has a title, named as the section; training/stages.py has its recipe.
    """
    sections = typing.get_type_hints(Config)
    return {name: kind.title for name, kind in sections.items() if hasattr(kind, "title")}


def stages_of(config: Config) -> list[str]:
    """Return the names of the stages that a run has, in order."""
    return [name for name in stage_titles() if getattr(config, name).steps]


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


def _check_range(section: Any, where: str = "") -> None:
    """Refuse numbers outside the range that their annotation carries, and what is no number."""
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value, key = getattr(section, name), dotted(where, name)
        if dataclasses.is_dataclass(value):
            _check_range(value, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}={value} is not a finite number.")
        least, most, *_ = (*getattr(hint, "__metadata__", ()), None, None)
        if least is not None and value < least:
            raise UsageError(f"{key}={value} is too small: at least {least}.")
        if isinstance(value, int) and not -MOST <= value <= (most or MOST):
            end = f"large: at most {most or MOST}" if value > 0 else f"small: at least {-MOST}"
            raise UsageError(f"{key} is too {end}.")


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
                f"{name}.optimizer.nu_dtype=bfloat16 keeps 8 bits. With b2={optimizer.b2} a step "
                "changes the moment by less than that. Lower b2 to 0.99, or keep float32."
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
            "sampling.temperature=0 makes all rollouts of a prompt equal, and GRPO learns nothing "
            "from equal rollouts. Set it above 0."
        )
    if grpo.steps and sampling.weights == "int8" and not grpo.loss.importance_cap:
        raise UsageError(
            "sampling.weights=int8 samples from another policy than the trained one. The loss must "
            "correct for it: set grpo.loss.importance_cap, e.g. 2.0."
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
        raise UsageError("grpo.loss.dual_clip does not apply to surrogate=cispo. Set it to 0.")
    if grpo.ahead == "stale" and not loss.importance_cap:
        raise UsageError(
            "grpo.ahead=stale samples from older weights than the trained ones. The loss must "
            "correct for it: set grpo.loss.importance_cap, e.g. 2.0."
        )
    if grpo.ahead == "stale" and grpo.zero_variance == "resample":
        raise UsageError(
            "grpo.ahead=stale samples the next prompts before zero_variance=resample knows how "
            "many it still needs. Set grpo.zero_variance to skip or keep."
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
        raise UsageError(
            "reward.swap_consistency withholds a reward, and reward.mode=none pays none. Set "
            "another reward.mode, or switch it off."
        )
    if reward.mode == "none" and not reward.plugins:
        raise UsageError("reward.mode=none pays nothing: name a reward in reward.plugins.")
    if reward.mode == "judgelrm" and reward.brier:
        raise UsageError("reward.mode=judgelrm takes no reward.brier. Use judgelrm_symmetric.")
    if reward.min_score >= reward.max_score:
        raise UsageError(
            f"reward.min_score={reward.min_score} is not below reward.max_score={reward.max_score}."
        )
