"""Record the losses of the trainers of `trl` on a tiny model: five steps of each stage.

Run `python tests/golden/make_trl_stages.py` in an environment apart from the project's own: `pip
install torch==2.13.0 trl==1.16.0`. CPU, no network, a minute. Writes `trl_stages.json` beside this
file: the rows, the settings, and the loss of each step before its update, in float32.

The model is `qwen2_tied` of this folder. A step's batch is all rows, so that no order of them
matters. The tokenizer's words are the numbers of ids. A Bradley-Terry head, which has no weights
there, begins as a sine. Losses are taken from `compute_loss`: what trainers log is rounded.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

HERE = Path(__file__).parent
MODEL = HERE / "qwen2_tied"
END, PAD, STEPS, RATE, BETA = 95, 94, 5, 1e-3, 0.1


def rows() -> list[dict[str, list[int]]]:
    """Return prompts with a preferred completion and another, of random lengths."""
    rng = np.random.default_rng(7)

    def ids(most: int) -> list[int]:
        return rng.integers(3, 90, rng.integers(2, most)).tolist()

    return [
        {"prompt": ids(12), "chosen": [*ids(9), END], "rejected": [*ids(9), END]} for _ in range(4)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token=str(PAD)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=str(END), pad_token=str(PAD), unk_token=str(PAD)
    )


def text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def settings(folder: str) -> dict:
    return dict(
        output_dir=folder, per_device_train_batch_size=4, num_train_epochs=STEPS, logging_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        bf16=False, use_cpu=True, report_to=[], save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip


def losses(trainer) -> list[float]:
    """Train, and return the loss of every step."""
    found, compute = [], trainer.compute_loss

    def recording(*args, **kwargs):
        loss = compute(*args, **kwargs)
        found.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    trainer.compute_loss = recording
    trainer.train()
    assert len(found) == STEPS, found
    return found


def policy():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def sft(folder: str) -> list[float]:
    listed = [
        {
            "input_ids": row["prompt"] + row["chosen"],
            "labels": [-100] * len(row["prompt"]) + row["chosen"],
        }
        for row in rows()
    ]
    return losses(
        SFTTrainer(
            model=policy(),
            args=SFTConfig(**settings(folder)),
            train_dataset=Dataset.from_list(listed),
            processing_class=tokenizer(),
        )
    )


def dpo(folder: str) -> list[float]:
    listed = [
        {
            "prompt": text(row["prompt"]) + " ",
            "chosen": text(row["chosen"]),
            "rejected": text(row["rejected"]),
        }
        for row in rows()
    ]
    return losses(
        DPOTrainer(
            model=policy(),
            args=DPOConfig(beta=BETA, **settings(folder)),
            train_dataset=Dataset.from_list(listed),
            processing_class=tokenizer(),
        )
    )


def bradley_terry(folder: str) -> list[float]:
    listed = [
        {
            "chosen_ids": row["prompt"] + row["chosen"],
            "rejected_ids": row["prompt"] + row["rejected"],
        }
        for row in rows()
    ]
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL, num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = PAD
    with torch.no_grad():
        model.score.weight.copy_(0.1 * torch.sin(torch.arange(32.0))[None])
    return losses(
        RewardTrainer(
            model=model,
            args=RewardConfig(**settings(folder)),
            train_dataset=Dataset.from_list(listed),
            processing_class=tokenizer(),
        )
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "trl": version("trl"),
            "rows": rows(),
            "learning_rate": RATE,
            "beta": BETA,
            "losses": {
                "sft": sft(folder),
                "dpo": dpo(folder),
                "bradley_terry": bradley_terry(folder),
            },
        }
    (HERE / "trl_stages.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
