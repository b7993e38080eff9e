"""The workload that every library gets, as files: a random model, prompts, a batch of each stage.

    model/          Hugging Face layout, float32: weights, config.json, a tokenizer of words
    workload.json   prompts as token ids, and the settings of sampling and loss
    batch.npz       GRPO: prompts padded on the left, completions, advantages, log-probabilities
    pairs.npz       other stages: prompts, a preferred answer and another to each, equally long

The tokenizer has one word for each id (`t17` is 17), so texts and ids say the same. Its end token
lies outside the model's vocabulary and is never drawn: every completion has all its tokens. Pairs
end in the vocabulary's last token.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlrm.model.qwen import QwenConfig
from jlrm.weights import hf, hf_config
from jlrm.weights.hf import Tensor

PROMPTS, ROLLOUTS = 4, 8
PAIRS = 8
STAGES = ("sft", "dpo", "bradley_terry")  # SFT has the preferred answers alone
SCALE = 0.02  # standard deviation of the weights


@dataclass(frozen=True)
class Size:
    """A model and how much it reads and writes; prompts have half to all of `prompt_tokens`."""

    model: QwenConfig
    prompt_tokens: int
    new_tokens: int

    @property
    def num_weights(self) -> int:
        """The number of the model's weights."""
        return sum(int(np.prod(tensor.shape)) for tensor in hf.tensors(self.model))


def _qwen2(
    width: int, mlp: int, layers: int, heads: int, vocabulary: int, kv_heads: int = 2
) -> QwenConfig:
    return QwenConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        qkv_bias=True,
        qk_norm=False,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )


SIZES = {
    "tiny": Size(_qwen2(256, 512, 4, 4, 2048), prompt_tokens=128, new_tokens=128),
    "small": Size(_qwen2(512, 1408, 8, 8, 32768), prompt_tokens=128, new_tokens=128),
    "tiny-judge": Size(_qwen2(256, 512, 4, 4, 2048), prompt_tokens=512, new_tokens=64),
    # A judge reads a question and two answers, and writes little.
    "judge": Size(_qwen2(384, 1024, 6, 6, 8192), prompt_tokens=512, new_tokens=64),
    # The shapes of SmolLM2-135M and Qwen2.5-0.5B, for accelerators.
    "135m": Size(_qwen2(576, 1536, 30, 9, 49152, 3), prompt_tokens=512, new_tokens=128),
    "0.5b": Size(_qwen2(896, 4864, 24, 14, 151936), prompt_tokens=512, new_tokens=128),
}


def write(
    directory: pathlib.Path,
    size: Size,
    device: str = "cpu",
    dtype: str = "float32",
    stages: Sequence[str] = (),
) -> None:
    """Write the files of a workload into an empty directory.

    device: "cpu" or "gpu". dtype: of products and activations, "float32" or "bfloat16".
    stages: of STAGES, those whose losses are to be compared.
    """
    rng = np.random.default_rng(0)
    _write_model(directory / "model", size.model, rng)
    vocabulary = size.model.vocab_size
    lengths = np.linspace(size.prompt_tokens // 2, size.prompt_tokens, PROMPTS).astype(int)
    prompts = [rng.integers(1, vocabulary, length).tolist() for length in lengths]
    settings = {
        "device": device,
        "dtype": dtype,
        "prompts": prompts,
        "rollouts": ROLLOUTS,
        "prompt_tokens": size.prompt_tokens,
        "new_tokens": size.new_tokens,
        "pad_id": 0,
        "eos_id": vocabulary,
        "kl_weight": 0.04,
        "clip": 0.2,
        "learning_rate": 1e-6,
        "clip_norm": 1.0,
        "beta": 0.1,
        "stages": list(stages),
        # Before the first step DPO's loss is log 2, whoever computes it.
        "check_steps": 3,
        "check_rate": 1e-4,
        "pair_end": vocabulary - 1,
    }
    (directory / "workload.json").write_text(json.dumps(settings))
    padded = np.zeros((PROMPTS, size.prompt_tokens), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[-len(prompt) :] = prompt
    padded = np.repeat(padded, ROLLOUTS, axis=0)
    shape = len(padded), size.new_tokens

    def near_uniform() -> np.ndarray:
        # Some ratios of the policies leave the clip's range, so that the check sees the clip.
        return (0.2 * rng.standard_normal(shape) - np.log(vocabulary)).astype(np.float32)

    np.savez(
        directory / "batch.npz",
        prompt_ids=padded,
        prompt_mask=padded != 0,
        completion_ids=rng.integers(1, vocabulary, shape).astype(np.int32),
        advantages=rng.standard_normal(len(padded)).astype(np.float32),
        old_logps=near_uniform(),
        ref_logps=near_uniform(),
    )
    _write_pairs(directory, size, rng)


def _write_pairs(directory: pathlib.Path, size: Size, rng: np.random.Generator) -> None:
    last = size.model.vocab_size - 1

    def draw(num_tokens: int) -> np.ndarray:
        return rng.integers(1, last, (PAIRS, num_tokens)).astype(np.int32)

    chosen, rejected = draw(size.new_tokens), draw(size.new_tokens)
    chosen[:, -1] = rejected[:, -1] = last
    head = SCALE * rng.standard_normal(size.model.hidden_size, np.float32)  # of Bradley-Terry
    rows = {"prompts": draw(size.prompt_tokens), "chosen": chosen, "rejected": rejected}
    np.savez(directory / "pairs.npz", allow_pickle=False, head=head, **rows)


def _write_model(directory: pathlib.Path, model: QwenConfig, rng: np.random.Generator) -> None:
    directory.mkdir()

    def draw(tensor: Tensor) -> np.ndarray:
        # Biases and the scales of norms too are random: a library that left one out would differ.
        drawn = SCALE * rng.standard_normal(tensor.shape, np.float32)
        return drawn + 1 if tensor.path.endswith("scale") else drawn

    for _ in hf.save_tensors(draw, model, directory, "float32"):
        pass
    words = ["<pad>", *(f"t{i}" for i in range(1, model.vocab_size)), "<eos>"]
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    ends = {words[0]: 0, words[-1]: len(words) - 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": word, "normalized": False, **special}
            for word, number in ends.items()
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "<pad>",
        },
    }
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    files = {
        "config.json": hf_config.config_to_hf(model, "float32"),
        "generation_config.json": {"pad_token_id": 0},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
