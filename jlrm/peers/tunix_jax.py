"""Tunix on JAX: its own sampler, and its GRPO learner with the trainer that this has."""

# Its packages are those of another Python.
# pyright: reportMissingImports=false

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as samplers
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

PACKAGES = ("jax", "flax", "google-tunix")
ENDLESS = 10**9  # steps


def device_peak():
    """Return the most bytes of a GPU that were held; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def check(work):
    """Return log-probabilities [B, T] of the batch, and its loss."""
    cluster, _ = make_learner(work)
    example, trainer = example_of(work), cluster.actor_trainer
    logps = cluster.get_ref_per_token_logps(
        example.prompt_ids, example.completion_ids, work.pad_id, work.eos_id
    )
    loss = trainer.loss_fn(trainer.model, **trainer.gen_model_input_fn(example))[0]
    return logps, loss


def rollout(work, turns):
    """Draw completions."""
    model, mesh = load(work)
    config = model.config
    cache = samplers.CacheConfig(
        cache_size=work.prompt_tokens + work.new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = samplers.Sampler(model, work.tokenizer(), cache)
    prompts = [text for text in work.texts for _ in range(work.rollouts)]
    with mesh:
        for number in turns:
            drawn = sampler(
                prompts,
                max_generation_steps=work.new_tokens,
                max_prompt_length=work.prompt_tokens,
                temperature=1.0,
                top_p=1.0,
                seed=number,
            )
            turns.tokens = [np.asarray(ids) for ids in drawn.tokens]


def update(work, turns):
    """Take optimiser steps on the batch."""
    cluster, _ = make_learner(work)
    example = example_of(work)
    for _ in turns:
        cluster.update_actor([example], None)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))


def iteration(work, turns):
    """Train, one batch of prompts a turn."""
    cluster, learner = make_learner(work)

    def batches():
        for _ in turns:
            yield {"prompts": np.array(work.texts)}  # of a list, each text would be repeated alone
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

    learner.train(batches())


def load(work):
    """Return the model in float32, and the mesh of one device that it lies on."""
    source = json.loads(pathlib.Path(work.model, "config.json").read_text())
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), automatic, devices=jax.devices()[:1])
    config = qwen2.ModelConfig(
        num_layers=source["num_hidden_layers"],
        vocab_size=source["vocab_size"],
        embed_dim=source["hidden_size"],
        hidden_dim=source["intermediate_size"],
        num_heads=source["num_attention_heads"],
        head_dim=source["head_dim"],
        num_kv_heads=source["num_key_value_heads"],
        rope_theta=int(source["rope_theta"]),
        norm_eps=source["rms_norm_eps"],
        use_tied_embedding=True,
    )
    read = qwen2_params.create_model_from_safe_tensors
    return read(work.model, config, mesh, dtype=jnp.float32), mesh


def make_learner(work):
    """Return the cluster of models and the learner that trains with it."""
    (actor, mesh), (reference, _) = load(work), load(work)
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
    optimizer = optax.chain(
        optax.clip_by_global_norm(work.clip_norm),
        optax.adamw(work.learning_rate, weight_decay=0.0),
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=work.tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer, eval_every_n_steps=ENDLESS, max_steps=ENDLESS
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work.new_tokens,
                max_prompt_length=work.prompt_tokens,
                temperature=1.0,
                top_p=1.0,
                kv_cache_size=work.prompt_tokens + work.new_tokens,
            ),
        ),
    )
    config = grpo_learner.GRPOConfig(
        num_generations=work.rollouts,
        num_iterations=1,
        beta=work.kl_weight,
        epsilon=work.clip,
        kl_loss_mode="low_var_kl",
    )
    return cluster, grpo_learner.GRPOLearner(cluster, config, reward_fns=work.reward)


def example_of(work):
    """Return the batch as the trainer takes it."""
    batch = {name: jnp.asarray(array) for name, array in work.batch.items()}
    return grpo_learner.TrainExample(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        completion_ids=batch["completion_ids"],
        completion_mask=jnp.ones_like(batch["completion_ids"]),
        advantages=batch["advantages"],
        ref_per_token_logps=batch["ref_logps"],
        old_per_token_logps=batch["old_logps"],
    )
