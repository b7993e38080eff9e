"""The shapes of all published Qwen2.5 and Qwen3 models, of others, and of the toy model.

Sources: the config.json files of `Qwen/Qwen2.5-*-Instruct`, `Qwen/Qwen3-*`, `meta-llama/Llama-3.*`
and `mistralai/Mistral-7B-v0.3`.
"""

from __future__ import annotations

import dataclasses

from jlrm.config import UsageError, nearest
from jlrm.model.qwen import QwenConfig
from jlrm.model.rope import Llama3


def _qwen25(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, *, tied: bool
) -> QwenConfig:
    return QwenConfig(
        vocab_size=151936 if tied else 152064,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        qkv_bias=True,
        qk_norm=False,
        tie_word_embeddings=tied,
    )


def _qwen3(width: int, mlp: int, layers: int, heads: int, *, tied: bool) -> QwenConfig:
    return QwenConfig(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


def _qwen3_moe(width: int, mlp: int, layers: int, heads: int) -> QwenConfig:
    dense = _qwen3(width, mlp, layers, heads, tied=False)
    experts = {"num_experts": 128, "num_experts_per_tok": 8}
    return dataclasses.replace(dense, num_key_value_heads=4, **experts)


def _llama3(
    width: int, mlp: int, layers: int, heads: int, factor: float, *, tied: bool
) -> QwenConfig:
    return QwenConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width // heads,
        qkv_bias=False,
        qk_norm=False,
        tie_word_embeddings=tied,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_scaling=Llama3(factor, 1.0, 4.0, 8192),
        model_type="llama",
    )


PRESETS = {
    "toy": QwenConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        qkv_bias=True,
        qk_norm=False,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        max_position_embeddings=1024,
    ),
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen25(2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen25(3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-14b": _qwen25(5120, 13824, 48, 40, 8, tied=False),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8, tied=False),
    "qwen2.5-72b": _qwen25(8192, 29568, 80, 64, 8, tied=False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "qwen3-30b-a3b": _qwen3_moe(2048, 768, 48, 32),
    "qwen3-235b-a22b": _qwen3_moe(4096, 1536, 94, 64),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8.0, tied=False),
    "mistral-7b-v0.3": QwenConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        model_type="mistral",
    ),
}


def preset(name: str) -> QwenConfig:
    """Return the shape with this name.

    Raises:
      UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"model.preset={name}: there is no such preset. {nearest(name, PRESETS)}")
    return PRESETS[name]
