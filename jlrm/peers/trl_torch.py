"""TRL's `GRPOTrainer` on torch: its own generation, loss and training loop.

Without the flag "checkpointing" it keeps activations, which is faster than its default.
"""

# Its packages are those of another Python.
# pyright: reportMissingImports=false

import torch
import transformers
import trl
from datasets import Dataset

PACKAGES = ("torch", "transformers", "trl")


def device_peak():
    """Return the most bytes of a GPU that were held; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


MANY = 1000  # batches, more than there are turns


def check(work):
    """Return log-probabilities [B, T] of the batch, and its loss."""
    trainer, inputs = make_trainer(work), inputs_of(work)
    trainer.current_gradient_accumulation_steps = 1
    ids, mask = (
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1)
        for part in ("ids", "mask")
    )
    with torch.no_grad():
        scored = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, work.new_tokens
        )
        loss = trainer._compute_loss(trainer.model, inputs)
    return scored[0].cpu(), loss


def rollout(work, turns):
    """Draw completions."""
    trainer = make_trainer(work)
    prompts = [text for text in work.texts for _ in range(work.rollouts)]
    for _ in turns:
        ids, images, fields = trainer._tokenize_prompts(prompts)
        turns.tokens = trainer._generate_single_turn(ids, images, fields, work.rollouts)[0]


def update(work, turns):
    """Take optimiser steps on the batch."""
    trainer = make_trainer(work, turns)
    inputs = inputs_of(work)
    trainer._prepare_inputs = lambda _: inputs  # in place of generation
    trainer.train()


def iteration(work, turns):
    """Train, one step a turn."""
    make_trainer(work, turns).train()


def make_trainer(work, turns=None):
    """Return a trainer whose steps are turns."""
    args = trl.GRPOConfig(
        output_dir=str(work.directory / "trl"),
        use_cpu=work.device == "cpu",
        bf16=work.dtype == "bfloat16",
        per_device_train_batch_size=len(work.texts) * work.rollouts,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=work.rollouts,
        max_completion_length=work.new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=work.kl_weight,
        epsilon=work.clip,
        loss_type="grpo",
        use_bias_correction_kl=False,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=work.clip_norm,
        gradient_checkpointing="checkpointing" in work.flags,
        shuffle_dataset=False,
        max_steps=MANY,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": torch.float32},
    )
    return trl.GRPOTrainer(
        model=work.model,
        reward_funcs=work.reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": work.texts * MANY}),
        processing_class=work.tokenizer(),
        callbacks=[] if turns is None else [Steps(turns)],
    )


class Steps(transformers.TrainerCallback):
    """Ends a turn and waits for the next one where the trainer begins a step."""

    def __init__(self, turns):
        self.turns = iter(turns)

    def on_step_begin(self, args, state, control, **_):
        """Wait; the process ends here after the last turn."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        next(self.turns)


def inputs_of(work):
    """Return the batch as the trainer's own step prepares it."""
    place = "cpu" if work.device == "cpu" else "cuda"
    batch = {name: torch.from_numpy(array).to(place) for name, array in work.batch.items()}
    ids = batch["completion_ids"].long()
    return {
        "prompt_ids": batch["prompt_ids"].long(),
        "prompt_mask": batch["prompt_mask"].long(),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logps"],
        "ref_per_token_logps": batch["ref_logps"],
        "num_items_in_batch": torch.tensor(ids.numel(), device=place),
    }


def losses(work, stage):
    """Return the loss of each of the first steps of a stage."""
    trainer = make_stage(work, stage, work.check_rate, work.check_steps)
    found, compute = [], trainer.compute_loss

    def recording(*args, **named):
        loss = compute(*args, **named)
        found.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    trainer.compute_loss = recording
    trainer.train()
    return found


def sft(work, turns):
    """Train on the preferred answers, one step a turn."""
    make_stage(work, "sft", work.learning_rate, MANY, turns).train()


def dpo(work, turns):
    """Train on pairs; the reference is a copy of the model and is asked in each step."""
    make_stage(work, "dpo", work.learning_rate, MANY, turns).train()


def bradley_terry(work, turns):
    """Train a reward model on pairs."""
    make_stage(work, "bradley_terry", work.learning_rate, MANY, turns).train()


def make_stage(work, stage, rate, num_steps, turns=None):
    """Return a trainer of a stage whose steps are turns; all pairs are one batch, and an epoch."""
    settings = {
        "output_dir": str(work.directory / "trl"),
        "use_cpu": work.device == "cpu",
        "bf16": work.dtype == "bfloat16",
        "per_device_train_batch_size": len(work.pairs["prompts"]),
        "num_train_epochs": num_steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": work.clip_norm,
        "max_length": None,
        "gradient_checkpointing": "checkpointing" in work.flags,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    tokenizer = work.tokenizer()
    tokenizer.eos_token = f"t{work.pair_end}"  # which the texts end in
    names = ("prompts", "chosen", "rejected")
    rows = list(zip(*(work.pairs[name].tolist() for name in names), strict=True))
    makers = {"sft": sft_parts, "dpo": dpo_parts, "bradley_terry": reward_parts}
    trainer, config, model, listed = makers[stage](work, rows)
    return trainer(
        model=model,
        args=config(**settings, **({"beta": work.beta} if stage == "dpo" else {})),
        train_dataset=Dataset.from_list(listed),
        processing_class=tokenizer,
        callbacks=[] if turns is None else [Steps(turns)],
    )


def sft_parts(work, rows):
    """Return trainer, config, model and rows of SFT."""
    listed = [
        {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
        for prompt, chosen, _ in rows
    ]
    return trl.SFTTrainer, trl.SFTConfig, load_policy(work), listed


def dpo_parts(work, rows):
    """Return trainer, config, model and rows of DPO, which tokenises texts itself."""
    listed = [
        {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected)}
        for prompt, chosen, rejected in rows
    ]
    return trl.DPOTrainer, trl.DPOConfig, load_policy(work), listed


def reward_parts(work, rows):
    """Return trainer, config, model and rows of a reward model, whose head is the workload's."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        work.model, num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(work.pairs["head"])[None])
    listed = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in rows
    ]
    return trl.RewardTrainer, trl.RewardConfig, model, listed


def load_policy(work):
    """Return the model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)


def words(ids):
    """Return ids as text."""
    return " ".join(f"t{i}" for i in ids)
