"""Record GRPO losses, gradients and advantages computed by the real `trl` and `verl` packages.

Run `python tests/golden/make_grpo_golden.py` in an environment apart from the project's own: `pip
install torch==2.13.0 trl==1.16.0 tensordict omegaconf hydra-core codetiming ray orjson pillow`
and `pip install --no-deps verl==0.9.1` (its pins clash with TRL's). CPU, no network, ten seconds.
Writes `grpo.json` beside this file, in float64 except where said below.

TRL: each case builds a real `GRPOTrainer` around a tiny random model that is never called. On the
instance `_get_per_token_logps_and_entropies` is replaced by a function returning fixed tensors;
`rollout_func` returns the completions and sampler log-probs, reward functions the rewards. Then
`_generate_and_score_completions` and `compute_loss` run as upstream wrote them: train mode, one
process, no accumulation. Policy "off" is num_iterations=2, for which TRL asks for old log-probs;
"on" is 1, where it takes logp.detach(). For the sampler correction `use_vllm` is set on the built
trainer, as vLLM is absent. TRL rounds rewards to float32, so they are given in tenths (exact) with
a float64 weight 0.1; GDPO weights last: float32 rewards (1 if r > -1 else -1, r), weights 1, 0.5.

verl: `compute_grpo_outcome_advantage`, then the engine's `ppo_loss` on packed log-probs. It calls
`compute_policy_loss_vanilla` or that of the loss mode, `agg_loss` and `kl_penalty`. Sampler
weights are from `compute_rollout_correction_weights`. "clip_cov" may take as many tokens as there
are, so its choice by chance is none. The kl_* cases are masked means of `kl_penalty` alone.
"advantages" are those of other estimators, by row; rewards stand at the last token, and BASELINES
are those of ReMax.
"""

import json
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import (
    agg_loss,
    compute_grpo_outcome_advantage,
    get_adv_estimator_fn,
    kl_penalty,
)
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

# fmt: off
torch.set_default_dtype(torch.float64)
ROWS, COLUMNS, GROUP, EOS = 8, 6, 4, 1
LENGTHS, TRUNCATED = [6, 4, 3, 5, 6, 2, 1, 4], [0, 4]
REWARDS = [4.2, 3.6, -0.5, -3.0, 3.8, -2.5, -0.5, 3.2]
BASELINES = [1.5] * GROUP + [-0.5] * GROUP
ROW, COLUMN = torch.arange(float(ROWS))[:, None], torch.arange(float(COLUMNS))
LOGP = -(0.2 + 0.13 * ((5 * ROW + 3 * COLUMN) % 7))
OLD = LOGP - 0.45 * torch.sin(1.7 * ROW + 0.9 * COLUMN)
REF = LOGP + 0.3 * torch.cos(0.8 * ROW - 1.1 * COLUMN)
ROLL = OLD - 0.25 * torch.cos(1.3 * ROW + 0.5 * COLUMN)
ENTROPY = 0.5 + 0.1 * ((ROW + 2 * COLUMN) % 5)
MASK = torch.tensor(LENGTHS)[:, None] > COLUMN
PROMPTS = ["a"] * GROUP + ["b"] * GROUP

TRL_DEFAULTS = dict(
    policy="off", loss_type="dapo", importance_sampling_level="token", epsilon=0.2, delta=None,
    epsilon_high=0.2, beta=0.0, use_bias_correction_kl=False, scale_rewards="group",
    mask_truncated_completions=False, max_completion_length=8, vllm_importance_sampling_mode=None,
    vllm_importance_sampling_clip_max=None, multi_objective_aggregation="sum_then_normalize",
    missing_rewards=[])
OWN = {"policy", "missing_rewards", "loss_mode", "norm_adv_by_std_in_grpo", "rollout_is_threshold",
       "rollout_is", "covariance"}
SEQUENCE = dict(loss_type="grpo", importance_sampling_level="sequence")
TRL_CASES = {f"{t}_{p}": dict(loss_type=t, policy=p) for p in ("off", "on")
             for t in ("grpo", "bnpo", "dapo", "dr_grpo", "sapo")} | {
    "dr_grpo_off_scale_none": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo_off_epsilon_high_0.28": dict(epsilon_high=0.28),
    "dapo_off_delta_1.3": dict(delta=1.3),
    "dapo_off_beta_0.04": dict(beta=0.04),
    "dapo_off_beta_0.04_bias_corrected": dict(beta=0.04, use_bias_correction_kl=True),
    "grpo_off_beta_0.04": dict(loss_type="grpo", beta=0.04),
    "sequence_off_3e-4_4e-4": SEQUENCE | dict(epsilon=3e-4, epsilon_high=4e-4),
    "sequence_off_0.2_0.2": SEQUENCE,
    "dapo_off_reward_1_missing": dict(missing_rewards=[1]),
    "dapo_off_gdpo": dict(multi_objective_aggregation="normalize_then_sum"),
} | {f"{t}_off_mask_truncated": dict(loss_type=t, mask_truncated_completions=True)
     for t in ("grpo", "dapo", "dr_grpo")
} | {f"dapo_off_scale_{scale}": dict(scale_rewards=scale) for scale in ("none", "batch")
} | {f"cispo_off_cap_{cap}": dict(loss_type="cispo", epsilon_high=cap) for cap in (5.0, 1.2)
} | {f"dapo_off_{mode}_1.2": dict(vllm_importance_sampling_mode=mode,
                                  vllm_importance_sampling_clip_max=1.2)
     for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")}

VERL_DEFAULTS = dict(
    policy="off", loss_mode="vanilla", norm_adv_by_std_in_grpo=True, clip_ratio_low=0.2,
    clip_ratio_high=0.2, clip_ratio_c=3.0, loss_agg_mode="token-mean", loss_scale_factor=None,
    use_kl_loss=False, kl_loss_coef=0.001, kl_loss_type="low_var_kl", entropy_coeff=0.0,
    rollout_is_threshold=None, rollout_is="token", covariance={})
SUM_NORM = "seq-mean-token-sum-norm"
GSPO = dict(loss_mode="gspo", loss_agg_mode="seq-mean-token-mean")
JUDGELRM = dict(use_kl_loss=True, kl_loss_coef=0.001, entropy_coeff=0.001)
VERL_CASES = {f"{mode}_{p}": dict(loss_agg_mode=mode, policy=p) for p in ("off", "on")
              for mode in ("token-mean", "seq-mean-token-sum", SUM_NORM, "seq-mean-token-mean")} | {
    "dr_grpo_off_scale_8": dict(
        loss_agg_mode=SUM_NORM, loss_scale_factor=8, norm_adv_by_std_in_grpo=False),
    "token-mean_off_c_1.2": dict(clip_ratio_c=1.2),
    "token-mean_off_high_0.28": dict(clip_ratio_high=0.28),
    "token-mean_off_kl_entropy": JUDGELRM,
    "judgelrm_preset_on_before_factor": JUDGELRM | dict(policy="on"),
    "gspo_off_3e-4_4e-4": GSPO | dict(clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    "gspo_off_0.2_0.2": GSPO,
    "cispo_off": dict(loss_mode="cispo"),
    "sapo_off": dict(loss_mode="sapo", loss_agg_mode="seq-mean-token-mean"),
    "sapo_on": dict(loss_mode="sapo", loss_agg_mode="seq-mean-token-mean", policy="on"),
    "geo_mean_off_0.4_0.3": dict(loss_mode="geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.3),
    "clip_cov_off": dict(loss_mode="clip_cov", covariance=dict(
        clip_cov_ratio=1.0, clip_cov_lb=0.05, clip_cov_ub=0.3)),
    "clip_cov_on": dict(loss_mode="clip_cov", policy="on", covariance=dict(
        clip_cov_ratio=1.0, clip_cov_lb=0.05, clip_cov_ub=0.3)),
    "kl_cov_off": dict(loss_mode="kl_cov", covariance=dict(kl_cov_ratio=0.2, ppo_kl_coef=0.7)),
    "token-mean_off_icepop": dict(rollout_is_threshold="0.85_1.2"),
    "token-mean_off_sequence_tis": dict(rollout_is_threshold=1.3, rollout_is="sequence"),
    "token-mean_off_sequence_icepop": dict(rollout_is_threshold="0.7_1.4", rollout_is="sequence"),
} | {f"token-mean_off_tis_{cap}": dict(rollout_is_threshold=cap) for cap in (2.0, 1.2)}


def trl_step(tokenizer, model_dir, logp, settings):
    """Run one GRPOTrainer step; return the loss, the advantages and TRL's metrics."""
    missing, signs = settings["missing_rewards"], [1.0 if r > -1 else -1.0 for r in REWARDS]
    is_gdpo = settings["multi_objective_aggregation"] == "normalize_then_sum"
    tenths = [None if i in missing else round(10 * r) for i, r in enumerate(REWARDS)]
    rewards = [lambda **_: signs, lambda **_: REWARDS] if is_gdpo else [lambda **_: tenths]

    def rollout(prompts, trainer):
        ids = [[5] * (n - 1) + [5 if i in TRUNCATED else EOS] for i, n in enumerate(LENGTHS)]
        logprobs = [ROLL[i, :n].tolist() for i, n in enumerate(LENGTHS)]
        return {"prompt_ids": [[3, 4]] * ROWS, "completion_ids": ids, "logprobs": logprobs}

    def scores(model, *_, compute_entropy=False, **__):
        fixed = REF if model is trainer.ref_model else OLD
        return (logp if compute_entropy else fixed), ENTROPY, None

    args = GRPOConfig(
        output_dir=model_dir, use_cpu=True, bf16=False, report_to="none", num_generations=GROUP,
        gradient_checkpointing=False, per_device_train_batch_size=ROWS, steps_per_generation=1,
        gradient_accumulation_steps=1, num_iterations={"off": 2, "on": 1}[settings["policy"]],
        **{k: v for k, v in settings.items() if v is not None and k not in OWN})
    trainer = GRPOTrainer(
        model_dir, rewards, args, Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer, rollout_func=rollout)
    trainer.reward_weights = torch.tensor([1.0, 0.5] if is_gdpo else [0.1])
    trainer._get_per_token_logps_and_entropies = scores
    trainer.current_gradient_accumulation_steps = 1  # otherwise set by the training loop
    if settings["vllm_importance_sampling_mode"]:
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS])
    loss = trainer.compute_loss(trainer.model, inputs)
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items() if "rewards/" not in k}
    return loss, inputs["advantages"], metrics


def verl_step(logp, settings):
    """Run verl's engine loss once; return the loss, the advantages and verl's metrics."""
    actor = ActorConfig(strategy="fsdp", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=ROWS,
                        policy_loss=PolicyLossConfig(
                            loss_mode=settings["loss_mode"], **settings["covariance"]),
                        **{k: v for k, v in settings.items() if k not in OWN})
    advantages, _ = compute_grpo_outcome_advantage(
        torch.tensor(REWARDS)[:, None] * (COLUMN == 0), MASK, np.array(PROMPTS),
        norm_adv_by_std_in_grpo=settings["norm_adv_by_std_in_grpo"])
    ids = torch.ones(ROWS, 1 + COLUMNS, dtype=torch.long)
    data = dict(prompts=ids[:, :1], responses=ids[:, 1:], response_mask=MASK, ref_log_prob=REF,
                attention_mask=torch.cat([ids[:, :1], MASK.long()], dim=1), advantages=advantages,
                old_log_probs=OLD if settings["policy"] == "off" else LOGP)
    if settings["rollout_is_threshold"]:
        data["rollout_is_weights"], _ = compute_rollout_correction_weights(
            OLD - ROLL, MASK, settings["rollout_is"], settings["rollout_is_threshold"])
    counts = dict(dp_size=1, batch_num_tokens=int(MASK.sum()), global_batch_size=ROWS)
    # Packed rows: one prompt token, then the response; the output at a position scores the next.
    output = {key: torch.cat([torch.cat([x[i, :n], torch.zeros(1)]) for i, n in enumerate(LENGTHS)])
              for key, x in (("log_probs", logp), ("entropy", ENTROPY))}
    loss, metrics = ppo_loss(actor, output, get_tensordict(data, counts))
    metrics = {k: float(getattr(v, "aggregate", lambda v=v: v)()) for k, v in metrics.items()}
    return loss, advantages[:, 0], metrics


def verl_kl(logp, settings):
    kl = kl_penalty(logp, REF, settings["kl_loss_type"])
    return agg_loss(kl, MASK, "token-mean"), torch.zeros(ROWS), {}


def verl_advantages():
    """Return the advantages of each row by verl's other estimators."""
    last = MASK & (MASK.sum(1, keepdim=True) == COLUMN + 1)
    rewards, index = torch.tensor(REWARDS)[:, None] * last, np.array(PROMPTS)
    common = dict(token_level_rewards=rewards, response_mask=MASK.double(), index=index)
    signs = [1.0 if r > -1 else -1.0 for r in REWARDS]
    gdpo = dict(config=AlgoConfig(gdpo_reward_keys=["signs", "values"],
                                  gdpo_reward_weights=[1.0, 0.5]),
                non_tensor_batch=dict(signs=signs, values=REWARDS),
                batch=dict(prompts=torch.ones(ROWS, 1), attention_mask=torch.cat(
                    [torch.ones(ROWS, 1), MASK.double()], 1).long()))
    extra = {"reinforce_plus_plus": dict(config=AlgoConfig(gamma=1.0)), "gdpo": gdpo,
             "remax": dict(reward_baselines=torch.tensor(BASELINES))}
    names = ("rloo", "rloo_vectorized", "opo", "reinforce_plus_plus",
             "reinforce_plus_plus_baseline", "remax", "gdpo")
    return {n: get_adv_estimator_fn(n)(**common, **extra.get(n, {}))[0][:, 0].tolist()
            for n in names}


def case(name, settings, step):
    """Call step(logp, settings) and return the JSON record with the full gradient."""
    logp = LOGP.clone().requires_grad_()
    loss, advantages, metrics = step(logp, settings)
    loss.backward()
    return dict(name=name, package=name.split("/")[0], settings=settings, loss=loss.item(),
                metrics=metrics, advantages=advantages.tolist(), gradient=logp.grad.tolist())


def main():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, "x")),
        pad_token="<pad>", eos_token="<eos>", unk_token="x")
    with tempfile.TemporaryDirectory() as model_dir:
        Qwen2ForCausalLM(Qwen2Config(vocab_size=6, hidden_size=32, num_hidden_layers=1)
                         ).save_pretrained(model_dir)
        trl = partial(trl_step, tokenizer, model_dir)
        cases = [case(f"trl/{n}", TRL_DEFAULTS | c, trl) for n, c in TRL_CASES.items()]
    cases += [case(f"verl/{n}", VERL_DEFAULTS | c, verl_step) for n, c in VERL_CASES.items()]
    cases += [case(f"verl/kl_{kind}", dict(kl_loss_type=kind), verl_kl)
              for kind in ("k1", "abs", "k2", "k3", "k3+")]
    inputs = dict(logp=LOGP, old_logp=OLD, ref_logp=REF, sampler_logp=ROLL, entropy=ENTROPY,
                  mask=MASK, rewards=torch.tensor(REWARDS), truncated_rows=torch.tensor(TRUNCATED))
    inputs = {k: v.tolist() for k, v in inputs.items()} | {"group_size": GROUP}
    versions = {p: version(p) for p in ("trl", "verl", "torch", "transformers", "numpy")}
    inputs["greedy_rewards"] = BASELINES
    head = json.dumps(dict(versions=versions, inputs=inputs, advantages=verl_advantages()))
    body = ",\n".join(json.dumps(c) for c in cases)
    Path(__file__).with_name("grpo.json").write_text(f'{head[:-1]},\n"cases": [\n{body}\n]}}\n')


if __name__ == "__main__":
    main()
