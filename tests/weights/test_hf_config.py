"""config.json: what is in it is computed, filled in as `transformers` does, or refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from conftest import ARCHITECTURES, GOLDEN, mesh_of, plain_states, tiny_config
from safetensors.numpy import load_file, save_file

from jlrm.config import UsageError
from jlrm.model import families, qwen
from jlrm.model.qwen import QwenConfig
from jlrm.model.rope import Llama3, Yarn
from jlrm.runtime.mesh import Layout, training_layout
from jlrm.sampling.policy import check_positions
from jlrm.weights import hf, hf_config
from jlrm.weights.hf_config import config_from_hf, config_to_hf
from jlrm.weights.presets import PRESETS

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3 = QWEN2 | {"model_type": "qwen3"}
LLAMA, MISTRAL = QWEN2 | {"model_type": "llama"}, QWEN2 | {"model_type": "mistral"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WIDTH = 80  # beyond the original context of the YaRN model
MISSING = object()


def edited(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a config.json with fields set, or left out where the change is MISSING."""
    return {key: value for key, value in (source | changes).items() if value is not MISSING}


# ------------------------------------------------------------------ dialects


@pytest.mark.parametrize("source", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("theta", [1e6, 1000000, 50000.0])
def test_theta_is_read_in_both_dialects(source, theta):
    old = config_from_hf(source | {"rope_theta": theta, "rope_scaling": None})
    new = config_from_hf(
        source | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    )
    assert old == new
    assert old.rope_theta == theta and old.rope_scaling is None


@pytest.mark.parametrize("source", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("extra", [{}, {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}])
def test_yarn_is_read_in_three_dialects(source, extra):
    """`type` before transformers 4.45, `rope_type` since, `rope_parameters` from 5 on."""
    rest = {"factor": 4.0, "original_max_position_embeddings": 32768, **extra}
    oldest, old, new = (
        config_from_hf(source | fields)
        for fields in (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **rest}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **rest}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **rest}},
        )
    )
    assert oldest == old == new
    assert old.rope_scaling == Yarn(
        factor=4.0,
        original_max_position_embeddings=32768,
        attention_factor=extra.get("attention_factor", 0.1 * math.log(4.0) + 1.0),
        beta_fast=extra.get("beta_fast", 32.0),
        beta_slow=extra.get("beta_slow", 1.0),
    )


def test_fields_without_meaning_here_change_nothing():
    wanted = config_from_hf(QWEN2)
    for fields in (
        {"torch_dtype": "bfloat16"},
        {"dtype": "float16"},
        {"use_cache": False, "transformers_version": "4.37.0", "initializer_range": 0.5},
        {"sliding_window": 4096, "max_window_layers": 1, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
        {"hidden_act": "swish"},
        {"quantization_config": None, "rope_scaling": None, "rope_parameters": {}},
        {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None},
    ):
        assert config_from_hf(QWEN2 | fields) == wanted


def test_numerics_are_those_asked_for():
    config = config_from_hf(
        QWEN2 | {"dtype": "float16"}, param_dtype="bfloat16", compute_dtype="float32", remat="dots"
    )
    assert (config.param_dtype, config.compute_dtype, config.remat) == (
        "bfloat16",
        "float32",
        "dots",
    )


# ------------------------------------------------------------------ defaults


@pytest.mark.parametrize(
    "source", [QWEN2, QWEN3, LLAMA, MISTRAL], ids=["qwen2", "qwen3", "llama", "mistral"]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": None},
        {"num_attention_heads": 64, "num_key_value_heads": None},
        {"num_attention_heads": 16},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 1e6},
        {"rope_scaling": YARN},
        {"rope_parameters": YARN},
        {"max_position_embeddings": 4096, "rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 4096},
        ({"num_attention_heads": 64, "num_key_value_heads": MISSING}),
        {"head_dim": None},
        {"head_dim": 24},
        {"max_position_embeddings": 64, "rope_scaling": LLAMA3},
        {"max_position_embeddings": 64, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"sliding_window": None},
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(source, fields):
    field = {"mistral": "num_key_value_heads", "qwen3": "head_dim"}.get(source["model_type"], "")
    if fields.get(field, 0) is None:
        pytest.skip(f"transformers 5 refuses null for {field}")
    source = edited(source, **fields)
    ours = config_from_hf(json.loads(json.dumps(source)))
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(source)))
    rope = theirs.rope_parameters
    heads = theirs.num_attention_heads
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    window = theirs.sliding_window if source["model_type"] == "mistral" else None
    assert ours.max_position_embeddings == min(theirs.max_position_embeddings, window or 2**30)
    assert ours.rope_theta == rope["rope_theta"]
    scaling = ours.rope_scaling
    assert (scaling.rope_type if scaling else "default") == rope["rope_type"]
    if scaling is not None:
        original = rope["original_max_position_embeddings"]
        assert scaling.factor == rope["factor"]
        assert scaling.original_max_position_embeddings == original


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
)
def test_a_shape_without_a_size_is_refused_by_name(field):
    """transformers would fill in those of a 7B model."""
    with pytest.raises(UsageError, match=f"no field '{field}'"):
        config_from_hf(edited(QWEN3, head_dim=16, **{field: MISSING}))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "model_type=mixtral (its experts are others"),
        ({"model_type": ["llama"]}, "model_type=['llama']"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=true"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=true"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers=[1]"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok=8 of num_experts=4"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": 1}, "norm_topk_prob=1 is neither"),
        # With experts transformers gives all layers the window, whatever these two fields say.
        (
            {"model_type": "qwen3_moe", "use_sliding_window": True, "max_window_layers": 48},
            "use_sliding_window",
        ),
        (
            {"model_type": "qwen3_moe", "use_sliding_window": True}
            | {"layer_types": ["full_attention"] * 2},
            "use_sliding_window",
        ),
        ({"model_type": "qwen2_vl"}, "model_type=qwen2_vl"),
        ({"model_type": MISSING}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
            "use_sliding_window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": []}, "layer_types has 0 entries"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor=1.0 is not below"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor=0"),
        ({"rope_scaling": LLAMA3, "partial_rotary_factor": 0.5}, "Llama 3's are"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": YARN, "partial_rotary_factor": 0.5}, "yarn"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "full_attention",
        ),
        (
            {
                "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64},
                "max_position_embeddings": MISSING,
            },
            "factor",
        ),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(changes, named):
    source = edited(QWEN3, **changes)
    with pytest.raises(UsageError) as error:
        config_from_hf(source, "there/config.json")
    assert "there/config.json" in str(error.value)
    assert named in str(error.value)


def test_qwen2_has_biases_whatever_attention_bias_says():
    """transformers' Qwen2 has no such field, nor has Mistral; some files carry it."""
    for value in (True, False):
        assert config_from_hf(QWEN2 | {"attention_bias": value}) == config_from_hf(QWEN2)
        assert config_from_hf(MISTRAL | {"attention_bias": value}) == config_from_hf(MISTRAL)


@pytest.mark.parametrize("window", [32, 64, 4096, None])
def test_a_model_of_windows_has_as_many_positions_as_its_window(window):
    """Within it every token sees all others before it, as with full attention."""
    config = config_from_hf(MISTRAL | {"max_position_embeddings": 64, "sliding_window": window})
    assert config.max_position_embeddings == min(window or 64, 64)
    whole = dataclasses.replace(config, max_position_embeddings=64)
    assert whole == config_from_hf(LLAMA | {"max_position_embeddings": 64})
    check_positions(config, min(window or 64, 64), "settings")
    with pytest.raises(UsageError, match="Lower settings"):
        check_positions(config, min(window or 64, 64) + 1, "settings")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UsageError) as error:
        hf_config.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2",')
    with pytest.raises(UsageError, match="not valid JSON"):
        hf_config.read_config(tmp_path)


# ------------------------------------------------------------------ every field has its effect


@functools.cache
def layout() -> Layout:
    return training_layout(mesh_of(1, 1, 1))


# Compiling is what takes time here, and the code need not be fast.
hidden_states = jax.jit(plain_states, static_argnums=(0, 1))
TOKENS = np.random.default_rng(0).integers(0, 96, (2, WIDTH))


def our_logits(directory: pathlib.Path) -> np.ndarray:
    config = hf_config.read_config(directory, compute_dtype="float32")
    params = hf.load_params(directory, config, layout())
    positions = np.broadcast_to(np.arange(WIDTH), TOKENS.shape)
    mask = np.ones_like(TOKENS, bool)
    hidden = hidden_states(config, layout(), params, TOKENS, positions, mask)
    return np.asarray(hidden @ qwen.head(config, params).T)


@functools.cache
def unchanged_logits(name: str) -> np.ndarray:
    return our_logits(GOLDEN / name)


def with_config(name: str, directory: pathlib.Path, changes: dict[str, Any]) -> None:
    """Write a golden model with a changed config.json; of `rope_parameters`, with single ones."""
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    rope = changes.get("rope_parameters")
    if isinstance(rope, dict):
        changes = changes | {"rope_parameters": edited(fields["rope_parameters"], **rope)}
    (directory / "config.json").write_text(json.dumps(edited(fields, **changes)))
    shutil.copyfile(GOLDEN / name / "model.safetensors", directory / "model.safetensors")


def their_logits(directory: pathlib.Path, torch: Any) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_untied", {"rms_norm_eps": 1e-4}),
        ("qwen2_untied", {"rms_norm_eps": MISSING}),
        ("qwen2_untied", {"rope_parameters": {"rope_theta": 1e3}}),
        ("qwen2_tied", {"rope_parameters": MISSING, "rope_theta": 1e3}),
        ("qwen2_tied", {"rope_parameters": MISSING}),
        ("qwen2_tied", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen3", {"rms_norm_eps": 1e-2}),
        ("qwen3", {"rope_parameters": YARN}),
        ("qwen3_rope", {"rope_parameters": {"factor": 8.0}}),
        ("qwen3_rope", {"rope_parameters": {"factor": 0.5}}),
        ("qwen3_rope", {"rope_parameters": {"rope_theta": 1e3}}),
        ("qwen3_rope", {"rope_parameters": {"original_max_position_embeddings": 16}}),
        ("qwen3_rope", {"rope_parameters": {"original_max_position_embeddings": MISSING}}),
        ("qwen3_rope", {"rope_parameters": {"attention_factor": 1.5}}),
        ("qwen3_rope", {"rope_parameters": {"beta_fast": 2.0}}),
        ("qwen3_rope", {"rope_parameters": {"beta_slow": 0.1}}),
        ("qwen3_rope", {"rope_parameters": {"truncate": False}}),
    ],
)
def test_a_changed_field_changes_logits_as_in_transformers(name, changes, tmp_path, torch):
    with_config(name, tmp_path, changes)
    wanted = their_logits(tmp_path, torch)
    assert np.abs(wanted - unchanged_logits(name)).max() > 1e-2
    np.testing.assert_allclose(our_logits(tmp_path), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_tying_makes_the_embedding_the_head_as_in_transformers(tmp_path, torch):
    with_config("qwen2_untied", tmp_path, {"tie_word_embeddings": True})
    tensors = load_file(GOLDEN / "qwen2_untied" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = our_logits(tmp_path)
    assert np.abs(ours - unchanged_logits("qwen2_untied")).max() > 1e-2
    np.testing.assert_allclose(ours, their_logits(tmp_path, torch), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"is_causal": False}),
        ("qwen3_rope", {"original_max_position_embeddings": 16}),
        ("qwen3_rope", {"rope_scaling": YARN | {"factor": 8.0}, "rope_theta": 5e4}),
        ("qwen3", {"rope_scaling": YARN, "rope_theta": 5e4}),
    ],
)
def test_odd_fields_are_refused_or_computed_as_in_transformers(name, changes, tmp_path, torch):
    with_config(name, tmp_path, changes)
    wanted = their_logits(tmp_path, torch)
    assert np.abs(wanted - unchanged_logits(name)).max() > 1e-2
    try:
        ours = our_logits(tmp_path)
    except UsageError:
        return
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("field", ["factor", "original_max_position_embeddings"])
def test_yarn_without_factor_stretches_to_the_whole_context(field):
    """factor = max_position_embeddings / original; the original defaults to the whole context."""
    source = QWEN3 | {"max_position_embeddings": 256, "rope_parameters": YARN | {field: None}}
    yarn = config_from_hf(source).rope_scaling
    assert yarn is not None
    assert yarn.factor == 4.0
    assert yarn.original_max_position_embeddings == (64 if field == "factor" else 256)


# ------------------------------------------------------------------ written by us


@pytest.mark.parametrize("config", [*PRESETS.values(), *map(tiny_config, ARCHITECTURES)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_back_what_we_write_gives_the_same_model(config, dtype):
    config = dataclasses.replace(config, compute_dtype="bfloat16", rms_norm_eps=3e-6)
    written = json.loads(json.dumps(config_to_hf(config, dtype)))
    assert config_from_hf(written) == config
    for dialect in ("rope_theta", "rope_parameters"):  # either is enough
        assert config_from_hf(edited(written, **{dialect: MISSING})) == config
    assert written["dtype"] == written["torch_dtype"] == dtype


@pytest.mark.parametrize("scaling", [Yarn(4.0, 64, 1.2), Llama3(8.0, 1.0, 4.0, 64)], ids=repr)
def test_scaled_positions_are_written_for_both_versions_of_transformers(scaling):
    config = tiny_config("qwen3", rope_scaling=scaling, compute_dtype="bfloat16")
    written = config_to_hf(config, "float32")
    assert config_from_hf(written) == config
    assert config_from_hf(edited(written, rope_parameters=MISSING)) == config
    assert config_from_hf(edited(written, rope_scaling=MISSING, rope_theta=MISSING)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_we_write(name, tmp_path):
    config = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == [families.FAMILIES[theirs.model_type].architecture]
    family = config.model_type or ("Qwen3" if config.qk_norm else "Qwen2")
    family = family.capitalize() + "Moe" * (config.num_experts > 0)
    assert isinstance(theirs, getattr(transformers, f"{family}Config"))
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    assert theirs.rope_parameters == rope
    assert set(getattr(theirs, "layer_types", ["full_attention"])) == {"full_attention"}
    assert getattr(theirs, "sliding_window", None) is None
    assert str(theirs.dtype).endswith("bfloat16")
    shared = {field.name for field in dataclasses.fields(QwenConfig)} & vars(theirs).keys()
    assert shared >= {"hidden_size", "head_dim", "num_key_value_heads", "tie_word_embeddings"}
    for field in shared - {"model_type"}:
        assert getattr(theirs, field) == getattr(config, field), field


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "Cannot read .*config.json: No such file"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("read", [hf_config.read_config, hf_config.stored_dtype])
def test_a_config_that_cannot_be_read_is_said(tmp_path, read, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read(tmp_path)
