"""Every setting of a run, as frozen dataclasses, and the two errors that commands report.

The dataclasses of this folder *are* the documentation of every setting. A field's comment (behind
it or above it) says its meaning and unit, and `--help` prints that comment. Its annotation carries
the least value (`Count`, `Positive`, `NonNegative`) or the choices. `runtime/settings.py` reads
YAML files and `key=value` overrides onto these classes. `_check` compares sections with each other;
checks that need the model or the devices happen where those are known.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field

from jlrm.config.sections import (
    DataConfig,
    MeshConfig,
    ModelSource,
    RewardConfig,
    RunConfig,
    SamplingConfig,
)
from jlrm.config.stages import GRPOConfig, LossConfig, OptimizerConfig, SFTConfig
from jlrm.config.values import Part, RunError, UsageError, check_range, dotted, nearest

__all__ = [
    "Config",
    "DataConfig",
    "GRPOConfig",
    "LossConfig",
    "MeshConfig",
    "ModelSource",
    "OptimizerConfig",
    "Part",
    "RewardConfig",
    "RunConfig",
    "RunError",
    "SFTConfig",
    "SamplingConfig",
    "UsageError",
    "dotted",
    "nearest",
    "stage_titles",
    "stages_of",
]


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
        check_range(self)
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
    _check_sampling(config.sampling, grpo, config.model.compute_dtype)
    _check_grpo(grpo, config.data)
    _check_reward(config.reward, config.data)


def _check_sampling(sampling: SamplingConfig, grpo: GRPOConfig, compute_dtype: str) -> None:
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
    if sampling.exact:
        _check_exact(sampling, compute_dtype)
    for text, count in sampling.stop_strings.items():
        if not text or count < 1:
            raise UsageError(
                f"sampling.stop_strings: {text!r}: {count} needs a text and a count of at least 1."
            )


def _check_exact(sampling: SamplingConfig, compute_dtype: str) -> None:
    """Refuse what has been measured to differ in bits, or has not been measured."""
    wanted = {"top_k": 0, "top_p": 1.0, "slots": 0, "weights": "full"}
    for name, value in wanted.items():
        if getattr(sampling, name) != value:
            raise UsageError(
                f"sampling.exact=true does not hold with sampling.{name}="
                f"{getattr(sampling, name)}. Set sampling.{name}={value}."
            )
    if compute_dtype != "bfloat16":
        raise UsageError(
            f"sampling.exact=true holds in bfloat16, not in {compute_dtype}, where the gap is some "
            "1e-6 without it. Set model.compute_dtype=bfloat16, or leave it out."
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
