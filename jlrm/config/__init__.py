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
    LoRAConfig,
    MeshConfig,
    ModelSource,
    RewardConfig,
    RunConfig,
    SamplingConfig,
)
from jlrm.config.stages import (
    AdvantageConfig,
    DPOConfig,
    GRPOConfig,
    LossConfig,
    OptimizerConfig,
    RewardModelConfig,
    SFTConfig,
)
from jlrm.config.values import Part, RunError, UsageError, check_range, dotted, nearest

__all__ = [
    "AdvantageConfig",
    "Config",
    "DPOConfig",
    "DataConfig",
    "GRPOConfig",
    "LoRAConfig",
    "LossConfig",
    "MeshConfig",
    "ModelSource",
    "OptimizerConfig",
    "Part",
    "RewardConfig",
    "RewardModelConfig",
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
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)

    def __post_init__(self) -> None:
        check_range(self)
        _check(self)


def stage_titles() -> dict[str, str]:
    """Return name: title of all stages, in the order in which a run has them.

    A stage is a section that has a title, named as the section; its recipe is in training/recipes/.
    """
    sections = typing.get_type_hints(Config)
    return {name: kind.title for name, kind in sections.items() if hasattr(kind, "title")}


def stages_of(config: Config) -> list[str]:
    """Return the names of the stages that a run has, in order."""
    return [name for name in stage_titles() if getattr(config, name).steps]


def _check(config: Config) -> None:
    """Refuse combinations that no run can use, naming the field, the value and the way out."""
    grpo = config.grpo
    if not config.run.dir:
        raise UsageError("run.dir is empty: name a directory for everything that the run writes.")
    if bool(config.model.path) == bool(config.model.preset):
        raise UsageError(
            "Set exactly one of model.path (existing weights) and model.preset (random weights)."
        )
    if config.model.preset and not config.model.tokenizer:
        raise UsageError("model.preset has no tokenizer of its own: set model.tokenizer.")
    for name in stage_titles():
        optimizer = getattr(config, name).optimizer
        if optimizer.nu_dtype == "bfloat16" and optimizer.b2 > 1 - 2**-8:
            raise UsageError(
                f"{name}.optimizer.nu_dtype=bfloat16 keeps 8 bits. With b2={optimizer.b2} a step "
                "changes the moment by less than that. Lower b2 to 0.99, or keep float32."
            )
    if not stages_of(config):
        listed = ", ".join(f"{name}.steps" for name in stage_titles())
        raise UsageError(f"Nothing to train: of {listed} none is above 0.")
    if config.model.adapter and not config.model.path:
        raise UsageError("model.adapter moves existing weights: set model.path to its base model.")
    if config.lora.rank and not config.lora.targets:
        raise UsageError("lora.targets is empty: name the matrices that have an adapter.")
    if config.lora.base != "stored" and not config.lora.rank:
        raise UsageError(
            f"lora.base={config.lora.base} quantises what is frozen, and lora.rank=0 trains all."
        )
    if config.sampling.weights == "unmerged" and not config.lora.rank:
        raise UsageError("sampling.weights=unmerged is of adapters, and lora.rank=0 has none.")
    _check_sampling(config)
    _check_sft(config.sft, config.data)
    _check_dpo(config.dpo)
    if config.reward_model.steps and config.run.best_metric == "reward":
        raise UsageError(
            "run.best_metric=reward ranks checkpoints by what judgements earn, and a reward model "
            "writes none. Set it to agreement or another metric."
        )
    _check_grpo(grpo, config.data)
    _check_reward(config.reward, config.data)
    if config.data.judging != "pairs":
        _check_judging(config)


def _check_judging(config: Config) -> None:
    is_single = config.data.judging == "single"
    known = {"data.orders": "given", "data.gold": ("given", "shuffled"), "dpo.steps": 0}
    known |= {"reward_model.steps": 0, "reward.mode": ("judgelrm_symmetric", "none")}
    known |= {} if is_single else {"data.gold": "given", "sft.swap": 0}
    what = "each answer alone" if is_single else "lists of answers at once"
    for name, usable in known.items():
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        listed = usable if isinstance(usable, tuple) else (usable,)
        if value not in listed:
            raise UsageError(
                f"data.judging={config.data.judging} judges {what}, which {name}={value} can't "
                f"use. Set {name}={' or '.join(map(str, listed))}."
            )


def _check_sampling(config: Config) -> None:
    sampling, grpo = config.sampling, config.grpo
    if not 0.0 < sampling.top_p <= 1.0:
        raise UsageError(f"sampling.top_p={sampling.top_p} is outside (0, 1].")
    is_sampled = {"GRPO": grpo.steps > 0, "DPO": config.dpo.is_sampled}
    learner = next((name for name, is_so in is_sampled.items() if is_so), "")
    if learner and sampling.temperature == 0.0:
        raise UsageError(
            f"sampling.temperature=0 makes all rollouts of a prompt equal, and {learner} learns "
            "nothing from equal rollouts. Set it above 0."
        )
    if grpo.steps and sampling.weights == "int8" and not grpo.loss.importance_cap:
        raise UsageError(
            "sampling.weights=int8 samples from another policy than the trained one. The loss must "
            "correct for it: set grpo.loss.importance_cap, e.g. 2.0."
        )
    if sampling.exact:
        _check_exact(config)
    for text, count in sampling.stop_strings.items():
        if not text or count < 1:
            raise UsageError(
                f"sampling.stop_strings: {text!r}: {count} needs a text and a count of at least 1."
            )


def _check_exact(config: Config) -> None:
    """Refuse what has been measured to differ in bits, or has not been measured."""
    sampling, compute_dtype = config.sampling, config.model.compute_dtype
    if not config.grpo.steps:
        raise UsageError(
            "sampling.exact=true is about GRPO, which alone learns from log-probabilities of the "
            "sampler. Set grpo.steps, or leave it out."
        )
    if config.lora.rank:
        raise UsageError(
            "sampling.exact=true does not hold with adapters, which are merged to sample. Set "
            "lora.rank=0, or leave it out."
        )
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


def _check_sft(sft: SFTConfig, data: DataConfig) -> None:
    for name in ("swap", "reference"):
        if (share := getattr(sft, name)) > 1:
            raise UsageError(f"sft.{name}={share} is a share of the rows: at most 1.")
    if sft.reference and data.prompt != "jlrm":
        raise UsageError(
            f"sft.reference={sft.reference} shows reference answers, for which data.prompt="
            f"{data.prompt} has no place. Set data.prompt=jlrm, or sft.reference=0."
        )


def _check_dpo(dpo: DPOConfig) -> None:
    if dpo.label_smoothing >= 0.5:
        raise UsageError(
            f"dpo.label_smoothing={dpo.label_smoothing} takes half of the pairs or more to be "
            "wrong, so nothing is preferred. Set it below 0.5."
        )
    if dpo.label_smoothing and dpo.loss == "ipo":
        raise UsageError("dpo.label_smoothing does not apply to dpo.loss=ipo. Set it to 0.")


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
    _check_loss(loss)
    _check_advantage(grpo, data)
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
    if data.prompts_of_row == 2 and grpo.prompts // grpo.minibatches % 2:
        setting = "orders=both" if data.orders == "both" else "judging=single"
        raise UsageError(
            f"data.{setting} needs an even number of grpo.prompts for each of grpo.minibatches="
            f"{grpo.minibatches}, got grpo.prompts={grpo.prompts}."
        )


def _check_loss(loss: LossConfig) -> None:
    if loss.dual_clip and loss.surrogate != "ppo":
        raise UsageError(
            f"grpo.loss.dual_clip does not apply to surrogate={loss.surrogate}. Set it to 0."
        )
    if loss.surrogate == "geo_mean" and loss.ratio != "sequence":
        raise UsageError(
            "grpo.loss.surrogate=geo_mean is about the mean ratio of a completion: set "
            "grpo.loss.ratio=sequence."
        )
    if loss.singles_out and loss.ratio != "token":
        raise UsageError(
            f"grpo.loss.surrogate={loss.surrogate} singles tokens out: set grpo.loss.ratio=token."
        )
    if not (loss.gate_positive > 0 and loss.gate_negative > 0):
        raise UsageError("grpo.loss.gate_positive and gate_negative must be above 0.")
    if loss.covariance_share > 1:
        raise UsageError(f"grpo.loss.covariance_share={loss.covariance_share} is above 1.")
    if loss.importance_floor > loss.importance_cap:
        raise UsageError(
            f"grpo.loss.importance_floor={loss.importance_floor} is above "
            f"grpo.loss.importance_cap={loss.importance_cap}."
        )


def _check_advantage(grpo: GRPOConfig, data: DataConfig) -> None:
    advantage = grpo.advantage
    if advantage.kl_weight and advantage.terms == "apart":
        raise UsageError(
            "grpo.advantage.kl_weight lowers a reward that is one number: set "
            "grpo.advantage.terms=summed, or use grpo.loss.kl_weight."
        )
    if advantage.kl_weight and grpo.loss.singles_out:
        raise UsageError(
            f"grpo.loss.surrogate={grpo.loss.surrogate} chooses tokens before the KL of "
            "grpo.advantage.kl_weight is known. Use grpo.loss.kl_weight."
        )
    if advantage.baseline == "greedy" and (grpo.zero_variance != "keep" or data.gold == "majority"):
        raise UsageError(
            "grpo.advantage.baseline=greedy learns from groups of equal rewards too, and its own "
            "completion has no majority: set grpo.zero_variance=keep and data.gold=given."
        )
    if advantage.orders != "together" and data.prompts_of_row == 1:
        raise UsageError(
            f"grpo.advantage.orders={advantage.orders} compares within both orders of a pair: set "
            "data.orders=both."
        )
    if advantage.term_weights and advantage.terms != "apart":
        raise UsageError(
            "grpo.advantage.term_weights weighs terms that are compared apart: set "
            "grpo.advantage.terms=apart."
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
    if data.gold == "majority" and reward.mode != "judgelrm_symmetric":
        raise UsageError(
            "data.gold=majority names the better answer and gives no scores: set "
            "reward.mode=judgelrm_symmetric."
        )
    if reward.mode == "judgelrm" and reward.brier:
        raise UsageError("reward.mode=judgelrm takes no reward.brier. Use judgelrm_symmetric.")
    if not 0.0 < reward.overlong_share <= 1.0:
        raise UsageError(f"reward.overlong_share={reward.overlong_share} is outside (0, 1].")
    if reward.min_score >= reward.max_score:
        raise UsageError(
            f"reward.min_score={reward.min_score} is not below reward.max_score={reward.max_score}."
        )
