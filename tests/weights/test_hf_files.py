"""Directories in the field hold more and less than a model: they are read as transformers does."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from conftest import GOLDEN, mesh_of
from safetensors.numpy import load_file, save_file

from jlrm.config import UsageError
from jlrm.runtime.mesh import training_layout
from jlrm.weights import hf, hf_config, hf_files
from jlrm.weights.hf_files import EMBED, HEAD, INDEX, WEIGHTS, is_finite

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def say_again():
    """What is said once in a process is said once in a test."""
    hf_files._warn.cache_clear()


def write(
    directory: pathlib.Path, name: str, change: Callable[[Tensors], Any], **fields: Any
) -> pathlib.Path:
    """Write a golden model with its tensors changed by `change`, in place or to what it returns."""
    described = json.loads((GOLDEN / name / "config.json").read_text())
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(described | fields))
    tensors = load_file(GOLDEN / name / WEIGHTS)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, directory / WEIGHTS, {"format": "pt"})
    return directory


def load(directory: pathlib.Path, dtype: str = "float32") -> Any:
    config = hf_config.read_config(directory, param_dtype=dtype, compute_dtype="float32")
    return hf.load_params(directory, config, training_layout(mesh_of(1, 1, 1)))


def assert_reads_as(directory: pathlib.Path, name: str) -> None:
    """Check that a directory loads as a golden model does, here and in transformers."""
    ours, wanted = load(directory), load(GOLDEN / name)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    theirs, right = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (directory, GOLDEN / name)
    )
    assert theirs.keys() == right.keys()
    for key, value in right.items():
        assert (theirs[key] == value).all(), key


def refused(directory: pathlib.Path) -> str:
    with pytest.raises(UsageError) as error:
        load(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def head_only(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


def with_extras(tensors: Tensors) -> None:
    tensors["v_head.summary.weight"] = np.ones((1, 32), np.float32)
    tensors["v_head.summary.bias"] = np.ones(1, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)


# ------------------------------------------------------------------ which files


@pytest.mark.slow
def test_a_single_file_wins_over_a_stale_index_and_its_shards(tmp_path, caplog, torch):
    directory = write(tmp_path, "qwen3", lambda tensors: None)
    stale = {key: 2 * value for key, value in load_file(directory / WEIGHTS).items()}
    save_file(stale, directory / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))
    assert_reads_as(directory, "qwen3")
    load(directory)
    said = [record for record in caplog.records if "shards are left out" in record.message]
    assert len(said) == 1  # once, however often it is read
    (directory / WEIGHTS).unlink()
    np.testing.assert_array_equal(load(directory)["embed"], stale[EMBED])


@pytest.mark.parametrize("text", ["", "\udcff", '{"weight_map": {"a": 3}}', "[" * 10**5])
def test_an_index_that_is_none_is_named_and_beside_a_single_file_not_read(text, tmp_path):
    directory = write(tmp_path, "qwen3", lambda tensors: None)
    (directory / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    load(directory)
    (directory / WEIGHTS).unlink()
    assert f"{directory / INDEX} is no" in refused(directory)  # no JSON, or no index


# ------------------------------------------------------------------ which tensors


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_tied", "qwen3"])
def test_names_without_prefix_are_read(name, tmp_path, torch):
    assert_reads_as(write(tmp_path, name, without_prefix), name)


def test_a_prefix_of_head_and_all_is_one_too_many(tmp_path, torch):
    def change(tensors: Tensors) -> Tensors:
        return {f"model.{name}": value for name, value in tensors.items()}

    assert_reads_as(write(tmp_path, "qwen2_untied", change), "qwen2_untied")


def test_a_tensor_under_two_names_or_in_two_shards_is_refused(tmp_path):
    """One of them is of another save, and which one would be read is chance."""
    name = "model.norm.weight"

    def add(tensors: Tensors) -> None:
        tensors["norm.weight"] = 2 * tensors[name]

    message = refused(write(tmp_path, "qwen3", add))
    assert f"holds {name} twice" in message and f"norm.weight in {WEIGHTS}" in message
    tensors = load_file(GOLDEN / "qwen3" / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({name: 2 * tensors[name]}, tmp_path / "b.safetensors")
    weight_map = {key: "b.safetensors" if key == name else "a.safetensors" for key in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert f"{name} in a.safetensors and {name} in b.safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    ("held", "advice"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model-Q4_K_M.gguf", "not GGUF"),
        ("model-00001-of-00002.safetensors", f"the shards that {INDEX} names"),
        ("model.fp16.safetensors", f"its weights are {WEIGHTS}"),
        ("README.md", "Only safetensors weights are read."),
    ],
)
def test_weights_in_another_form_say_what_to_do(held, advice, tmp_path):
    (write(tmp_path, "qwen3", dict) / WEIGHTS).rename(tmp_path / held)
    message = refused(tmp_path)
    assert f"holds no {WEIGHTS}. " in message and advice in message


def test_a_base_model_of_an_untied_one_lacks_its_head(tmp_path):
    """transformers would draw one at random."""

    def of_base(tensors: Tensors) -> Tensors:
        del tensors[HEAD]
        return without_prefix(tensors)

    assert "missing: lm_head.weight" in refused(write(tmp_path, "qwen2_untied", of_base))


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
def test_a_tied_model_may_hold_its_head_alone(name, tmp_path, torch):
    assert_reads_as(write(tmp_path, name, head_only), name)


def test_a_tied_model_may_hold_its_head_alone_and_no_prefix(tmp_path):
    def change(tensors: Tensors) -> Tensors:
        head_only(tensors)
        return without_prefix(tensors)

    found = load(write(tmp_path, "qwen3", change))
    jax.tree.map(np.testing.assert_array_equal, found, load(GOLDEN / "qwen3"))


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3"])
def test_what_a_language_model_does_not_use_is_left_out_and_said_once(
    name, tmp_path, caplog, torch
):
    directory = write(tmp_path, name, with_extras)
    assert_reads_as(directory, name)
    load(directory)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1
    assert "v_head.summary.weight" in said[0] and "model.rotary_emb.inv_freq" in said[0]


@pytest.mark.parametrize(
    "extra", ["score.weight", "qa_outputs.bias", "rm_head.weight", "visual.conv.weight", "extra"]
)
def test_what_stands_beside_a_language_model_is_left_out_and_said(extra, tmp_path, caplog, torch):
    def change(tensors: Tensors) -> None:
        tensors[extra] = np.ones(32, np.float32)

    assert_reads_as(write(tmp_path, "qwen2_untied", change), "qwen2_untied")
    assert f"left out {extra}, which a language model does not use" in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.down_proj.weight_scale",
        "lm_head.bias",
    ],
)
def test_what_would_change_the_model_is_refused(extra, tmp_path):
    def change(tensors: Tensors) -> None:
        tensors[extra] = np.ones(32, np.float32)

    assert f"unknown: {extra}" in refused(write(tmp_path, "qwen3", change))


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "transformer."])
def test_the_names_of_a_wrapper_say_what_to_save(prefix, tmp_path):
    """transformers would begin such a model at random, and warn of it."""

    def change(tensors: Tensors) -> Tensors:
        return {prefix + name: value for name, value in tensors.items()}

    message = refused(write(tmp_path, "qwen3", change))
    assert f"names that begin with {prefix}, so a wrapper of the model was saved" in message


def test_a_head_that_a_config_does_not_tell_of_says_how_to_tell(tmp_path):
    message = refused(write(tmp_path / "tied", "qwen2_tied", dict, tie_word_embeddings=False))
    assert f"missing: {HEAD}." in message and '"tie_word_embeddings": true' in message
    message = refused(write(tmp_path / "untied", "qwen2_untied", dict, tie_word_embeddings=True))
    assert f"other than {EMBED}, though config.json ties them: {HEAD}." in message
    assert '"tie_word_embeddings": false' in message


def test_an_adapters_tensors_say_how_to_merge(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = np.ones((4, 32), np.float32)

    message = refused(write(tmp_path, "qwen3", change))
    assert name in message and "merge_and_unload" in message


def test_numbers_that_are_not_floats_are_refused(tmp_path):
    """As int8 weights are stored that some library would scale."""

    def change(tensors: Tensors) -> None:
        tensors[EMBED] = tensors[EMBED].astype(np.int8)

    assert f"{EMBED} I8" in refused(write(tmp_path, "qwen3", change))


# ------------------------------------------------------------------ NaN and infinity


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_seen_wherever_it_stands(dtype, value):
    for shape in ((1,), (7, 3), (2, hf_files.CHUNK // 2 + 5)):
        array = np.full(shape, -1.5, dtype)
        assert is_finite(array)
        array[-1, ...] = value if array.ndim == 1 else array[-1]
        array.reshape(-1)[-1] = value
        assert not is_finite(array)
        assert not is_finite(array.T)
    largest = ml_dtypes.finfo(dtype).max
    assert is_finite(np.array([0.0, -0.0, largest, -largest], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "name", [EMBED, "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
)
def test_a_tensor_with_nan_is_named(name, dtype, tmp_path):
    def change(tensors: Tensors) -> None:
        for key, value in tensors.items():
            tensors[key] = value.astype(dtype)
        tensors[name].reshape(-1)[3] = np.nan

    message = refused(write(tmp_path, "qwen2_untied", change))
    assert f"the tensor {name} holds NaN or infinite numbers" in message


def test_a_number_beyond_the_dtype_it_is_read_in_is_named(tmp_path):
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = np.full(32, 3.4e38, np.float32)

    load(write(tmp_path, "qwen3", change), "float32")
    with pytest.raises(UsageError, match=r"model\.norm\.weight holds .* than bfloat16 has"):
        load(tmp_path, "bfloat16")


def test_a_tied_head_with_nan_in_both_copies_is_named_for_it(tmp_path):
    def change(tensors: Tensors) -> None:
        tensors[EMBED][2, 3] = np.nan
        tensors[HEAD] = tensors[EMBED].copy()

    assert f"{EMBED} holds NaN" in refused(write(tmp_path, "qwen3", change))


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("content", [b'{"base_model_name_or_path": "org/base"}', b"{", b"\xff"])
def test_a_peft_directory_is_said_what_it_is_and_how_to_merge(content, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    message = refused(tmp_path)
    assert "is a PEFT adapter of" in message and "merge_and_unload" in message
    assert ("org/base" in message) == (b"org/base" in content)
    shutil.copyfile(GOLDEN / "qwen3" / "config.json", tmp_path / "config.json")
    assert "is a PEFT adapter of" in refused(tmp_path)
    shutil.copyfile(GOLDEN / "qwen3" / WEIGHTS, tmp_path / WEIGHTS)
    assert "If its weights are merged already, remove adapter_config.json" in refused(tmp_path)


def test_nothing_is_said_of_a_plain_directory(caplog):
    with caplog.at_level(logging.INFO):
        for name in ("qwen2_untied", "qwen2_tied", "qwen3"):
            load(GOLDEN / name)
    assert not [record for record in caplog.records if record.name.startswith("jlrm")]
