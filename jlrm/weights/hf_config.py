"""config.json of a Hugging Face model, to and from `QwenConfig`.

Every field that changes what the model computes is either applied, or refused by name. So a model
that loads here computes what `transformers` computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import reprlib
from typing import Any

from jlrm.config import UsageError
from jlrm.model.families import FAMILIES, OTHERS, Family
from jlrm.model.qwen import QwenConfig
from jlrm.model.rope import Llama3, Scaling, Yarn
from jlrm.runtime.settings import read_json
from jlrm.weights.hf_files import refuse_adapter

DTYPES = ("float32", "bfloat16", "float16")
MOST_SIZE, MOST_LAYERS = 2**24, 2**10  # beyond every model; arrays of such sizes can't be described
CLASSIFIER = "ForSequenceClassification"
LABELS = {  # what the scores of a reward model are of, by its kind
    "bradley_terry": ("answer",),
    "cross": ("answer_1", "answer_2"),
    "classes": ("tie", "answer_1", "answer_2"),
}
LARGEST = 1e30  # of numbers that become float32


def read_config(directory: pathlib.Path, **numerics: Any) -> QwenConfig:
    """Read the architecture from a directory's config.json.

    Args:
      numerics: `param_dtype`, `compute_dtype` and `remat` of the result.

    Raises:
      UsageError: there is no such file, it describes no model, this code would compute the model
        differently, or the directory holds a PEFT adapter.
    """
    return config_from_hf(_described(directory), str(directory / "config.json"), **numerics)


def num_labels(directory: pathlib.Path) -> int:
    """Return how many scores a directory's model gives a text; 0: it writes text itself."""
    described = _described(directory)
    named = described.get("architectures")
    if not (isinstance(named, list) and named and str(named[0]).endswith(CLASSIFIER)):
        return 0
    labels, where = described.get("id2label"), str(directory / "config.json")
    if isinstance(labels, dict) and labels:
        return len(labels)
    if labels:
        raise UsageError(f"{where}: id2label={_short(labels)} is not a mapping.")
    return _size(described, where, "num_labels", 2)  # as transformers


def scoring_to_hf(fields: dict[str, Any], kind: str, pad_id: int | None) -> dict[str, Any]:
    """Return the config.json of a reward model of a kind (config/stages.py) from a policy's."""
    names = LABELS[kind]
    return fields | {
        "architectures": [fields["architectures"][0].replace("ForCausalLM", CLASSIFIER)],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "pad_token_id": pad_id,  # transformers scores the last token that is another
    }


def stored_dtype(directory: pathlib.Path) -> str:
    """Return the dtype that a directory's config.json gives its weights; float32 by default.

    Raises:
      UsageError: no such file, or a dtype that weights are not read in.
    """
    described = _described(directory)
    named = described.get("dtype") or described.get("torch_dtype") or "float32"
    dtype = str(named).removeprefix("torch.")
    dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)  # as torch spells them too
    if dtype not in DTYPES:
        raise UsageError(
            f"{directory / 'config.json'}: dtype={_short(named)} is not one of {', '.join(DTYPES)}."
        )
    return dtype


def _described(directory: pathlib.Path) -> dict[str, Any]:
    refuse_adapter(directory)
    return read_json(directory / "config.json")


def config_from_hf(
    source: dict[str, Any], where: str = "config.json", **numerics: Any
) -> QwenConfig:
    """Map a config.json onto `QwenConfig`.

    Raises:
      UsageError: it asks for something that this code does not compute, a field is missing, or a
        value is none that a model can have.
    """
    _refuse_unsupported(source, where)
    kind = source["model_type"]
    family = FAMILIES[kind]
    theta, scaling = _rope_from_hf(source, where)
    size = functools.partial(_size, source, where)
    heads = size("num_attention_heads")
    width = size("hidden_size")
    # Left out, it has the family's number, whatever the query heads; null stands for as many.
    is_open = "num_key_value_heads" in source or family.num_key_value_heads is None
    kv_heads = size("num_key_value_heads", heads if is_open else family.num_key_value_heads)
    head_dim = size("head_dim", family.head_dim or width // heads)
    positions = size("max_position_embeddings", family.max_position_embeddings)
    if family.sliding_window and source.get("sliding_window", 0) is not None:
        positions = min(positions, size("sliding_window", family.sliding_window))
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise UsageError(
            f"{where}: {heads} attention heads, {kv_heads} key-value heads and a head width of "
            f"{head_dim} are no attention. Wanted a multiple of the key-value heads, and an even "
            "width."
        )
    layers, types = size("num_hidden_layers", most=MOST_LAYERS), source.get("layer_types")
    if types is not None and len(types) != layers:  # transformers could not load an export of it
        raise UsageError(
            f"{where}: layer_types has {len(types)} entries, and num_hidden_layers={layers}."
        )
    mlp = _experts(source, where) if family.has_experts else {}
    return QwenConfig(
        vocab_size=size("vocab_size"),
        hidden_size=width,
        **(mlp or {"intermediate_size": size("intermediate_size")}),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_word_embeddings=_flag(source, where, "tie_word_embeddings"),
        rope_theta=theta,
        rms_norm_eps=_number(source, where, "rms_norm_eps", 1e-6),
        max_position_embeddings=positions,
        rope_scaling=scaling,
        model_type=kind,
        num_labels=0,  # whether it scores is asked apart: `num_labels`
        **numerics,
    )


def _size(
    source: dict[str, Any],
    where: str,
    name: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = MOST_SIZE,
) -> int:
    """Return a count of the model; a field that is null counts as left out."""
    value = source.get(name)
    if value is None:
        value = default
    if value is None:
        raise UsageError(f"{where} has no field '{name}'.")
    if type(value) is not int or not least <= value <= most:  # a bool is an int too
        raise UsageError(
            f"{where}: {name}={_short(value)} is not a whole number from {least} to {most}."
        )
    return value


def _number(source: dict[str, Any], where: str, name: str, default: float) -> float:
    """Return a positive number; a field that is null or left out has the default."""
    value = default if source.get(name) is None else source[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < LARGEST):
        raise UsageError(f"{where}: {name}={_short(value)} is not a number above 0.")
    return float(value)


def _flag(source: dict[str, Any], where: str, name: str, default: bool = False) -> bool:
    value = default if source.get(name) is None else source[name]
    if not isinstance(value, bool):
        raise UsageError(f"{where}: {name}={_short(value)} is neither true nor false.")
    return value


def _refuse_unsupported(source: dict[str, Any], where: str) -> None:
    """Raise a UsageError that names the first field that this code would not compute."""
    kind = source.get("model_type")
    name = kind if isinstance(kind, str) else ""  # it may be any JSON value
    family = FAMILIES.get(name, Family(""))
    why = f" ({OTHERS[name]})" if name in OTHERS else ""
    refusals = {
        f"model_type={_plain(kind)}{why}": name not in FAMILIES,
        f"hidden_act={_plain(source.get('hidden_act'))}": (
            source.get("hidden_act", "silu") not in ("silu", "swish")  # two names of one function
        ),
        "layer_types with sliding attention": any(
            layer != "full_attention" for layer in _layer_types(source, where)
        ),
        "use_sliding_window=true": _slides(source, where, family),
        **{f"{flag}={_plain(source.get(flag))}": bool(source.get(flag)) for flag in family.refused},
        f"decoder_sparse_step={_plain(source.get('decoder_sparse_step'))}": (
            family.has_experts and source.get("decoder_sparse_step", 1) != 1
        ),
        "attention_dropout": bool(source.get("attention_dropout")),
        "quantization_config": source.get("quantization_config") is not None,
        "transformers_weights": source.get("transformers_weights") is not None,
        "is_causal=false": source.get("is_causal") is False,
        "original_max_position_embeddings outside of rope_parameters": source.get(
            "original_max_position_embeddings"
        )
        is not None,
    }
    for what, is_refused in refusals.items():
        if is_refused:
            raise UsageError(
                f"{where}: {what} is not supported. Use an unquantised Qwen2, Qwen2.5, Qwen3, "
                "Qwen3-MoE, Llama or Mistral model with full attention."
            )


def _layer_types(source: dict[str, Any], where: str) -> list[Any]:
    value = [] if source.get("layer_types") is None else source["layer_types"]
    if not isinstance(value, list):
        raise UsageError(f"{where}: layer_types={_short(value)} is not a list.")
    return value


def _slides(source: dict[str, Any], where: str, family: Family) -> bool:
    """Return whether a layer's window is shorter than what it may see.

    As in transformers: layers from `max_window_layers` on have the window, of which a file may name
    neither, and `layer_types` wins; with experts all layers have it, whatever these two say.
    `use_sliding_window` is in many files of which no layer slides.
    """
    is_said = source.get("layer_types") and not family.has_experts
    if is_said or family.sliding_window or not _flag(source, where, "use_sliding_window"):
        return False
    if "sliding_window" in source and source["sliding_window"] is None:
        return False
    size = functools.partial(_size, source, where)
    is_shorter = size("sliding_window", 4096) < size("max_position_embeddings", 32768)
    num_full = 0 if family.has_experts else size("max_window_layers", 28, least=0)
    return is_shorter and num_full < size("num_hidden_layers", most=MOST_LAYERS)


def config_to_hf(config: QwenConfig, dtype: str) -> dict[str, Any]:
    """Return a config.json for a model that has no source checkpoint.

    It has the fields of both versions: transformers 4 reads `rope_theta`, `rope_scaling` and
    `torch_dtype`, transformers 5 reads `rope_parameters` and `dtype`.
    """
    has = config.qkv_bias, config.qk_norm, config.num_experts > 0
    kind = config.model_type or next(
        kind
        for kind, family in FAMILIES.items()
        if (family.qkv_bias, family.qk_norm, family.has_experts) == has
    )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, **dataclasses.asdict(scaling)}
    return {
        "architectures": [FAMILIES[kind].architecture],
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
        **({} if scaling is None else {"rope_scaling": rope}),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_experts_to_hf(config),
        **dict([FAMILIES[kind].unwindowed]),
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _experts(source: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of experts; those left out have the defaults of transformers."""
    # Files of the hub have the first name; transformers 5 writes the second.
    names = "num_experts", "num_local_experts"
    name = next((name for name in names if source.get(name) is not None), names[0])
    num_experts = _size(source, where, name, 128)
    of_token = _size(source, where, "num_experts_per_tok", 8)
    if of_token > num_experts:
        raise UsageError(f"{where}: num_experts_per_tok={of_token} of {name}={num_experts}.")
    return {
        "intermediate_size": _size(source, where, "moe_intermediate_size", 768),
        "num_experts": num_experts,
        "num_experts_per_tok": of_token,
        "norm_topk_prob": _flag(source, where, "norm_topk_prob"),
    }


def _experts_to_hf(config: QwenConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    return {
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _rope_from_hf(source: dict[str, Any], where: str) -> tuple[float, Scaling | None]:
    """Read theta and scaling from transformers 4's `rope_scaling` or 5's `rope_parameters`."""
    # If a file has both, the older field wins, as in transformers.
    rope = source.get("rope_scaling") or source.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UsageError(
            f"{where}: rope scaling {_short(rope)} is not an object such as "
            '{"rope_type": "yarn", "factor": 4.0}.'
        )
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UsageError(
            f"{where}: rope parameters per layer type {_short(nested)} are not supported."
        )
    holder = rope if "rope_theta" in rope else source
    theta = _number(holder, where, "rope_theta", 10000.0)
    if theta <= 1.0 or holder.get("rope_theta", theta) is None:  # no default, as in transformers
        raise UsageError(f"{where}: rope_theta={holder['rope_theta']} is not a number above 1.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    partial = rope.get("partial_rotary_factor", source.get("partial_rotary_factor", 1.0))
    if kind not in ("yarn", "llama3") or "mscale" in rope or partial != 1.0:
        raise UsageError(
            f"{where}: rope scaling {_short(rope)} is not supported. Only none, plain YaRN and "
            "Llama 3's are."
        )
    return theta, (_yarn if kind == "yarn" else _llama3)(rope, source, where)


def _yarn(rope: dict[str, Any], source: dict[str, Any], where: str) -> Yarn:
    if "factor" not in rope:
        raise UsageError(f"{where}: rope scaling {_short(rope)} has no factor.")
    given = {key: rope[key] for key in rope if not (key.startswith("beta_") and rope[key] == 0)}
    number = functools.partial(_number, given, where)
    whole, original = _lengths(rope, source, where)
    factor = number("factor", whole / original)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=max(int(original), 1),
        attention_factor=number(
            "attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        ),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=_flag(rope, where, "truncate", True),
    )


def _llama3(rope: dict[str, Any], source: dict[str, Any], where: str) -> Llama3:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    for name in names:
        if rope.get(name) is None:
            raise UsageError(f"{where}: rope scaling {_short(rope)} has no {name}.")
    factor, low, high = (_number(rope, where, name, 1.0) for name in names)
    if low >= high:
        raise UsageError(
            f"{where}: low_freq_factor={low} is not below high_freq_factor={high} in rope scaling."
        )
    return Llama3(factor, low, high, max(int(_lengths(rope, source, where)[1]), 1))


def _lengths(rope: dict[str, Any], source: dict[str, Any], where: str) -> tuple[float, float]:
    """Return the context of a scaled model, and that before scaling; left out, they are equal."""
    usual = FAMILIES[source["model_type"]].max_position_embeddings
    whole = _number(source, where, "max_position_embeddings", usual)
    return whole, _number(rope, where, "original_max_position_embeddings", whole)


def _short(value: Any) -> str:
    """Return a value for a message: a file may hold megabytes in any place."""
    return reprlib.repr(value)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else _short(value).strip("'")
