"""Families of models by `model_type`: what each fixes, and which ones are refused and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a `model_type` fixes, and what stands for fields that its config.json leaves out."""

    architecture: str  # the class of transformers
    qkv_bias: bool = False
    qk_norm: bool = False
    has_experts: bool = False
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: the width over the heads
    max_position_embeddings: int = 32768
    # Slots that every layer sees. Up to this length a window hides nothing, and a model with one is
    # read as a model of so few positions. None: no window for all layers.
    sliding_window: int | None = None
    unwindowed: tuple[str, Any] = ("use_sliding_window", False)  # the field that says: no window
    refused: tuple[str, ...] = ()  # flags that add parameters, or layers of another kind


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, num_key_value_heads=32),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        num_key_value_heads=32,
        head_dim=128,
        refused=("attention_bias",),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        has_experts=True,
        num_key_value_heads=4,
        refused=("attention_bias", "mlp_only_layers"),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        max_position_embeddings=2048,
        refused=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
        unwindowed=("sliding_window", None),
    ),
}
EXPERTS = "its experts are others than Qwen3's"
IMAGES = "it sees images"
OTHERS = {  # why a known family is none of these
    **dict.fromkeys(("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"), EXPERTS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "mistral3"), IMAGES),
    **dict.fromkeys(("ministral", "cohere2", "olmo3"), "windows in some layers only"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "other norms and activations"),
    "phi3": "queries, keys and values in one matrix",
}
