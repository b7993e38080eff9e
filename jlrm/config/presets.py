"""Named sets of settings that a config can start from: `preset: dapo`, or several, the last wins.

A preset is a word of the YAML file and of the command line, and no field: it is resolved when they
are read (runtime/settings.py), so that a run's config.yaml holds values and no name whose meaning
may change. The first four are what a package or a run does by default, quirk by quirk, as far as
this project has a setting for it. The others hold only what makes the method, for use after one of
these: `preset: [trl, gspo]`.

Left out, as they are no settings of the algorithm: models, data, prompts and sizes of batches.
"""

from __future__ import annotations

from typing import Any

# Group-relative advantages and PPO's clip, with the values that most packages share.
_GRPO = {
    "grpo.epochs": 1,
    "grpo.loss.surrogate": "ppo",
    "grpo.loss.ratio": "token",
    "grpo.loss.clip_low": 0.2,
    "grpo.loss.clip_high": 0.2,
    "grpo.loss.dual_clip": 0.0,
    "grpo.loss.aggregation": "token_mean",
    "grpo.loss.importance_cap": 0.0,
    "grpo.loss.mask_truncated": False,
    "grpo.loss.kl_weight": 0.0,
    "grpo.loss.kl_estimator": "k3",
    "grpo.loss.kl_correction": "none",
    "grpo.loss.entropy_weight": 0.0,
    "grpo.advantage.baseline": "group",
    "grpo.advantage.scale": "group",
    "grpo.advantage.eps": 1e-6,
    "grpo.advantage.whiten": "none",
    "grpo.advantage.orders": "together",
    "grpo.advantage.terms": "summed",
    "grpo.zero_variance": "keep",
    "grpo.optimizer.learning_rate": 1e-6,
    "grpo.optimizer.schedule": "constant",
    "grpo.optimizer.weight_decay": 0.01,
    "grpo.optimizer.clip_norm": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The authors' scripts and what these inherit from Logic-RL (verl 0.1). Their gradients are
    # divided by an accumulation count of 4: Adam does not see it, the clip by norm does. They clip
    # no log-ratio; one step a batch, so no ratio is clipped at all. The 3B was trained at 3e-7.
    "judgelrm": _GRPO
    | {
        "reward.mode": "judgelrm",
        "reward.min_score": 0,
        "reward.no_verdict": -2.0,
        "grpo.rollouts": 8,
        "grpo.minibatches": 1,
        "grpo.loss.kl_weight": 0.001,
        "grpo.loss.kl_estimator": "low_var",
        "grpo.loss.entropy_weight": 0.001,
        "grpo.optimizer.clip_norm": 4.0,
    },
    # GRPOConfig of TRL 1.16. Its correction for vLLM (sequence_mask, 3.0) has no part here: the
    # sampler computes as the trainer does, as TRL's does without vLLM.
    "trl": _GRPO
    | {
        "grpo.rollouts": 8,
        "grpo.loss.kl_correction": "ratio",
        "grpo.advantage.eps": 1e-4,
        "grpo.optimizer.schedule": "linear",
        "grpo.optimizer.weight_decay": 0.0,
    },
    # actor.yaml and ppo_trainer.yaml of verl 0.9, with adv_estimator=grpo. Its clamp of log-ratios
    # at 20 is left out: behind the two clips it changes the loss by less than 1e-8.
    "verl": _GRPO
    | {
        "grpo.loss.dual_clip": 3.0,
        "grpo.loss.kl_estimator": "low_var",
    },
    # arXiv 2503.14476, Section 4.1, and the recipe in verl: the length is punished over the last
    # 4,096 of 20,480 tokens.
    "dapo": _GRPO
    | {
        "reward.overlong": -1.0,
        "reward.overlong_share": 0.2,
        "grpo.rollouts": 16,
        "grpo.loss.clip_high": 0.28,
        "grpo.loss.dual_clip": 10.0,
        "grpo.zero_variance": "resample",
        "grpo.max_draws": 10,
        "grpo.optimizer.weight_decay": 0.1,
        "grpo.optimizer.warmup_steps": 10,
    },
    "dr_grpo": {"grpo.loss.aggregation": "fixed_length", "grpo.advantage.scale": "none"},
    "gspo": {
        "grpo.loss.ratio": "sequence",
        "grpo.loss.clip_low": 3e-4,
        "grpo.loss.clip_high": 4e-4,
        "grpo.loss.dual_clip": 0.0,
        "grpo.loss.aggregation": "sequence_mean",
    },
    "gmpo": {
        "grpo.loss.surrogate": "geo_mean",
        "grpo.loss.ratio": "sequence",
        "grpo.loss.clip_low": 0.4,
        "grpo.loss.clip_high": 0.4,
        "grpo.loss.dual_clip": 0.0,
        "grpo.loss.aggregation": "sequence_mean",
    },
    "cispo": {
        "grpo.loss.surrogate": "cispo",
        "grpo.loss.clip_low": 1.0,
        "grpo.loss.clip_high": 4.0,
        "grpo.loss.dual_clip": 0.0,
    },
    "sapo": {
        "grpo.loss.surrogate": "sapo",
        "grpo.loss.gate_positive": 1.0,
        "grpo.loss.gate_negative": 1.05,
        "grpo.loss.dual_clip": 0.0,
        "grpo.loss.aggregation": "sequence_mean",
    },
    "clip_cov": {
        "grpo.loss.surrogate": "clip_cov",
        "grpo.loss.covariance_share": 2e-4,
        "grpo.loss.covariance_low": 1.0,
        "grpo.loss.covariance_high": 5.0,
        "grpo.loss.dual_clip": 0.0,
    },
    "kl_cov": {
        "grpo.loss.surrogate": "kl_cov",
        "grpo.loss.covariance_share": 2e-4,
        "grpo.loss.covariance_kl": 1.0,
        "grpo.loss.dual_clip": 0.0,
    },
    "rloo": {"grpo.advantage.baseline": "leave_one_out", "grpo.advantage.scale": "none"},
    "opo": {"grpo.advantage.baseline": "length_weighted", "grpo.advantage.scale": "none"},
    "remax": {"grpo.advantage.baseline": "greedy", "grpo.advantage.scale": "none"},
    "reinforce++": {
        "grpo.advantage.baseline": "none",
        "grpo.advantage.scale": "none",
        "grpo.advantage.whiten": "tokens",
    },
    "reinforce++_baseline": {
        "grpo.advantage.baseline": "group",
        "grpo.advantage.scale": "none",
        "grpo.advantage.whiten": "tokens",
    },
    "gdpo": {"grpo.advantage.terms": "apart", "grpo.advantage.whiten": "rows"},
    "eis_grpo": {"data.orders": "both", "grpo.advantage.orders": "summed"},
    # arXiv 2601.00677: a score is paid by the share of the other answer's scores that it is on the
    # right side of, and compared with the scores of the same answer.
    "irpm": {
        "data.judging": "single",
        "reward.relation": 1.0,
        "reward.wrong_relation": 0.0,
        "reward.preference": 1.0,
        "reward.wrong_preference": 0.0,
        "reward.absolute_exact": 0.0,
        "reward.absolute_near": 0.0,
        "reward.confidence": 0.0,
        "grpo.advantage.orders": "apart",
    },
}
