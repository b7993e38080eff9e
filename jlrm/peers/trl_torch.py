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
