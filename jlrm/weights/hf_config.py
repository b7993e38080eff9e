"""config.json of a Hugging Face model, to and from `QwenConfig`.

Every field that changes what the model computes is either applied, or refused by name. So a model
that loads here computes what `transformers` computes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

from jlrm.config import UsageError
from jlrm.model.qwen import QwenConfig
from jlrm.model.rope import Yarn


def read_config(directory: pathlib.Path, **numerics: str) -> QwenConfig:
    """Read the architecture from a directory's config.json.

    Args:
      numerics: `param_dtype`, `compute_dtype` and `remat` of the result.

    Raises:
      UsageError: there is no such file, or this code would compute the model differently.
    """
    return config_from_hf(_read_json(directory), str(directory / "config.json"), **numerics)


def stored_dtype(directory: pathlib.Path) -> str:
    """Return the dtype that a directory's config.json gives its weights; float32 by default."""
    described = _read_json(directory)
    return described.get("dtype") or described.get("torch_dtype") or "float32"


def _read_json(directory: pathlib.Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {file}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise UsageError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(described, dict):
        raise UsageError(f"{file} must hold a JSON object, got {type(described).__name__}.")
    return described


def config_from_hf(
    source: dict[str, Any], where: str = "config.json", **numerics: str
) -> QwenConfig:
    """Map a config.json onto `QwenConfig`.

    Raises:
      UsageError: it asks for something that this code does not compute, or a field is missing.
    """
    kind = source.get("model_type")
    _refuse_unsupported(source, where)
    theta, yarn = _rope_from_hf(source, where)
    try:
        heads = source["num_attention_heads"]
        return QwenConfig(
            vocab_size=source["vocab_size"],
            hidden_size=source["hidden_size"],
            intermediate_size=source["intermediate_size"],
            num_hidden_layers=source["num_hidden_layers"],
            num_attention_heads=heads,
            # The default of Qwen2Config and Qwen3Config is 32, whatever the number of heads.
            num_key_value_heads=source.get("num_key_value_heads", 32) or heads,
            head_dim=source.get("head_dim") or _default_head_dim(source),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            tie_word_embeddings=source.get("tie_word_embeddings", False),
            rope_theta=theta,
            rms_norm_eps=source.get("rms_norm_eps", 1e-6),
            max_position_embeddings=source.get("max_position_embeddings", 32768),
            yarn=yarn,
            **numerics,
        )
    except KeyError as error:
        raise UsageError(f"{where} has no field {error}.") from None


def _refuse_unsupported(source: dict[str, Any], where: str) -> None:
    """Raise a UsageError that names the first field that this code would not compute."""
    kind = source.get("model_type")
    refusals = {
        f"model_type={kind}": kind not in ("qwen2", "qwen3"),
        f"hidden_act={source.get('hidden_act')}": source.get("hidden_act", "silu") != "silu",
        "use_sliding_window=true": bool(source.get("use_sliding_window")),
        "layer_types with sliding attention": any(
            layer != "full_attention" for layer in source.get("layer_types") or []
        ),
        "attention_bias=true": kind == "qwen3" and bool(source.get("attention_bias")),
        "attention_dropout": bool(source.get("attention_dropout")),
        "quantization_config": source.get("quantization_config") is not None,
        "is_causal=false": source.get("is_causal") is False,
        "original_max_position_embeddings outside of rope_parameters": source.get(
            "original_max_position_embeddings"
        )
        is not None,
    }
    for what, is_refused in refusals.items():
        if is_refused:
            raise UsageError(
                f"{where}: {what} is not supported. Use a dense, unquantised Qwen2, Qwen2.5 or "
                "Qwen3 model with full attention."
            )


def config_to_hf(config: QwenConfig, dtype: str) -> dict[str, Any]:
    """Return a config.json for a model that has no source checkpoint.

    It has the fields of both versions: transformers 4 reads `rope_theta` and `torch_dtype`,
    transformers 5 reads `rope_parameters` and `dtype`.
    """
    kind = "qwen3" if config.qk_norm else "qwen2"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        rope |= {"rope_type": "yarn", **dataclasses.asdict(config.yarn)}
    names = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _rope_from_hf(source: dict[str, Any], where: str) -> tuple[float, Yarn | None]:
    """Read theta and scaling from transformers 4's `rope_scaling` or 5's `rope_parameters`."""
    # If a file has both, the older field wins, as in transformers.
    rope = source.get("rope_scaling") or source.get("rope_parameters") or {}
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UsageError(f"{where}: rope parameters per layer type {nested} are not supported.")
    theta = rope.get("rope_theta", source.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float):
        raise UsageError(f"{where}: rope_theta={theta!r} is not a number.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "yarn" or "mscale" in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"{where}: rope scaling {rope} is not supported. Only none and plain YaRN are."
        )
    original = rope.get("original_max_position_embeddings")
    if original is None:
        original = source.get("max_position_embeddings", 32768)
    if "factor" not in rope:
        raise UsageError(f"{where}: rope scaling {rope} has no factor.")
    factor = rope["factor"] or source.get("max_position_embeddings", 32768) / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return float(theta), Yarn(
        factor=float(factor),
        original_max_position_embeddings=int(original),
        attention_factor=float(attention),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
    )


def _default_head_dim(source: dict[str, Any]) -> int:
    if source["model_type"] == "qwen3":
        return 128  # the default of Qwen3Config in transformers, for every width
    return source["hidden_size"] // source["num_attention_heads"]
