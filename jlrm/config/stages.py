"""The sections of the stages, with their optimiser and loss. A section with a title is a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jlrm.config.values import Count, NonNegative, Positive


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
    stream = 0  # which order of the data is this stage's
    batch_field = "batch_size"  # the setting that says how many rows a batch takes
    steps: Count = 0  # optimiser steps; 0: no SFT before GRPO
    batch_size: Positive = 64  # sequences per optimiser step
    # Tokens that a device runs at a time: fewer need less memory, same result; 0: automatic.
    pack_tokens: Count = 0
    max_target_tokens: int = 512  # a longer written judgement is counted and left out
    # Where the written reasoning stands: before the scores, in think tags; after them, as JudgeLM
    # was trained; or nowhere ("none"), for which a row needs no more than a label.
    reasoning: Literal["before", "after", "none"] = "before"
    # Share of rows, chosen by the seed, whose answers stand in the other order; their judgement is
    # turned round too, with names such as "Assistant 1" in it (JudgeLM: 0.5).
    swap: NonNegative = 0.0
    # Share of rows with a reference answer (column `reference`) whose prompt shows it; it drops
    # from the others (JudgeLM: 0.5). For data.prompt=jlrm.
    reference: NonNegative = 0.0
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))


@dataclass(frozen=True)
class DPOConfig:
    title = "DPO"
    stream = 2
    batch_field = "batch_size"
    steps: Count = 0  # optimiser steps; 0: no DPO
    # What is preferred to what: of `rollouts` judgements that the policy samples of a prompt, the
    # best paid to the worst paid; the gold scores to the same in the other order, without any
    # reasoning ("verdicts"); or the better answer to the worse one, as replies to the question.
    pairs: Literal["judgements", "verdicts", "answers"] = "judgements"
    batch_size: Positive = 16  # prompts per optimiser step, a pair of completions each
    rollouts: Annotated[int, 2] = 4  # judgements sampled of each prompt, with pairs=judgements
    # Tokens that a device runs at a time: fewer need less memory, same result; 0: automatic.
    pack_tokens: Count = 0
    max_target_tokens: int = 512  # a pair with a longer answer or verdict is counted and left out
    # The loss of a pair (rl/preferences.py): the logistic one of DPO, or IPO's square.
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: Annotated[float, 1e-6] = 0.1  # how much the distance from the reference costs
    # Share of pairs whose preference is taken to be wrong; for the logistic loss.
    label_smoothing: NonNegative = 0.0
    # What log-probabilities are compared with: the weights at the start of the stage, kept frozen,
    # or nothing, which spares their memory.
    reference: Literal["start", "none"] = "start"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def is_sampled(self) -> bool:
        """Whether the stage runs, and samples what it learns from."""
        return self.steps > 0 and self.pairs == "judgements"


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model, trained from the weights of the stage before; it can't be trained further."""

    title = "Reward model"
    stream = 3
    batch_field = "batch_size"
    steps: Count = 0  # optimiser steps; 0: no reward model
    # Each answer scored alone, as a reply to the question ("bradley_terry"); both answers in the
    # judge's prompt, with a score for each ("cross"); the same with a class of 1, 2 or a tie.
    kind: Literal["bradley_terry", "cross", "classes"] = "bradley_terry"
    batch_size: Positive = 16  # comparisons per optimiser step
    # Tokens that a device runs at a time: fewer need less memory, same result; 0: automatic.
    pack_tokens: Count = 0
    max_target_tokens: int = 512  # a longer answer is counted and left out, with bradley_terry
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))


@dataclass(frozen=True)
class LossConfig:
    """Settings of the policy loss (rl/losses.py): what is done with log-probabilities."""

    # A function of `rl/losses.py:SURROGATES`.
    surrogate: Literal["ppo", "cispo", "sapo", "geo_mean", "clip_cov", "kl_cov"] = "ppo"
    # Whose probabilities are compared; "sequence" with "ppo" is GSPO.
    ratio: Literal["token", "sequence"] = "token"
    # The ratio is clipped to [1 - clip_low, 1 + clip_high]; its logarithm to [-clip_low, clip_high]
    # by "geo_mean".
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2  # see clip_low
    dual_clip: float = 0.0  # upper bound of the ratio where the advantage is negative; 0: off
    gate_positive: float = 1.0  # temperature of the gate of "sapo" where the advantage is positive
    gate_negative: float = 1.05  # the same where it is not
    # Share of the tokens that "clip_cov" and "kl_cov" single out: those whose log-probability and
    # advantage vary together most.
    covariance_share: NonNegative = 0.0002
    covariance_low: float = 1.0  # "clip_cov" takes its share, by chance, above this covariance
    covariance_high: float = 5.0  # and below this one
    covariance_kl: NonNegative = 1.0  # weight of |log ratio| on the tokens that "kl_cov" takes
    # What a token's loss is divided by, of B completions: all their tokens ("token_mean"), its own
    # completion's tokens · B ("sequence_mean"), B ("sequence_sum"), the token limit · B
    # ("fixed_length"). See grpo.zero_variance for completions that are out of the loss.
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"] = (
        "token_mean"
    )
    # Importance sampling: the update recomputes old log-probabilities and weighs each token by
    # old / sampled probability, at most importance_cap; 0: off.
    importance_cap: NonNegative = 0.0
    importance_floor: NonNegative = 0.0  # the least weight, as importance_cap is the largest
    # A weight outside these bounds is set to the bound (TIS), or to 0 (MIS, IcePop).
    importance_outside: Literal["truncate", "mask"] = "truncate"
    # Whose probabilities the weight divides: a token's, or those of its whole completion.
    importance_ratio: Literal["token", "sequence"] = "token"
    mask_truncated: bool = False  # completions cut by the limit carry no loss; their rewards count
    kl_weight: NonNegative = 0.001  # of the KL to the frozen reference; 0: no such term
    # Estimate of that KL from a token, a line of `rl/losses.py:KL_ESTIMATORS`.
    kl_estimator: Literal["k1", "abs", "k2", "k3", "low_var"] = "k3"
    # Its gradient is not that of the KL: multiply the estimate by the ratio ("ratio": then it is,
    # for k3), or take the gradient of k2 under its value ("k2").
    kl_correction: Literal["none", "ratio", "k2"] = "none"
    entropy_weight: float = 0.001  # weight of the entropy, which lowers the loss

    @property
    def singles_out(self) -> bool:
        """Whether the surrogate treats some tokens otherwise than the others."""
        return self.surrogate in ("clip_cov", "kl_cov")


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of the advantages (rl/advantages.py): what is done with rewards."""

    # What is subtracted: the mean of the group, of the others in it (RLOO), the mean weighted by
    # length (OPO), the reward of one more completion of the prompt, which is drawn greedily and is
    # no part of the loss (ReMax), or nothing.
    baseline: Literal["group", "leave_one_out", "length_weighted", "greedy", "none"] = "group"
    # Whose standard deviation that is divided by.
    scale: Literal["group", "batch", "none"] = "group"
    eps: NonNegative = 1e-6  # added to that standard deviation, and to the one of `whiten`
    # Brought to mean 0 and deviation 1 at the end, over the batch's completions ("rows") or tokens.
    whiten: Literal["none", "rows", "tokens"] = "none"
    # Of a pair in both orders: compared with all of its completions, with those of the same order,
    # or the sum of both advantages (EIS-GRPO). See data.orders. With data.judging=single the same
    # of both answers of a pair.
    orders: Literal["together", "apart", "summed"] = "together"
    # Each reward is lowered by this times the sum of log(old / reference probability) over the
    # completion's tokens (k1), before rewards are compared.
    kl_weight: NonNegative = 0.0
    # Terms of the reward: summed before they are compared, or compared each by itself (GDPO).
    terms: Literal["summed", "apart"] = "summed"
    # Weights of terms that are compared apart, by name; 1 where none is given.
    term_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GRPOConfig:
    title = "GRPO"
    stream = 1
    batch_field = "prompts"
    steps: Count = 0  # rollout batches; 0: no GRPO
    prompts: Positive = 16  # per step
    rollouts: Annotated[int, 2] = 8  # completions of each prompt
    epochs: Positive = 1  # passes over one rollout batch
    minibatches: Positive = 1  # optimiser steps per pass
    # Tokens that a device runs at a time: fewer need less memory, same result; 0: automatic.
    pack_tokens: Count = 0
    loss: LossConfig = field(default_factory=LossConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    # What importance weights (loss.importance_cap) weigh: the surrogate, as in TRL and verl, or the
    # KL and entropy terms too, as in NeMo-RL.
    importance_terms: Literal["policy", "all"] = "policy"
    # Groups of equal rewards: kept with no advantage, taken out of the loss ("skip"), or sampled
    # anew from the next prompts. loss.aggregation "token_mean" then has fewer tokens to divide by,
    # so the other groups weigh more; the others still divide by all B completions, so the step gets
    # smaller. "resample" takes the deviation of advantage.scale "batch" over the groups it chose.
    zero_variance: Literal["keep", "skip", "resample"] = "keep"
    max_draws: Positive = 4  # rollout batches per step under "resample"
    # When the next rollout begins: after this step is logged and saved ("none"), before it is, with
    # the new weights ("next"), or before the update, with weights one step old ("stale": rewards
    # cost no device time, and loss.importance_cap corrects for them).
    ahead: Literal["none", "next", "stale"] = "next"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def has_reference(self) -> bool:
        """Whether the weights it begins from are kept, as the reference of a KL."""
        return self.loss.kl_weight > 0 or self.advantage.kl_weight > 0
