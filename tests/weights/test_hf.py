"""The Hugging Face format: bit-exact both ways, sharded or not, and nothing odd read in silence."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import ARCHITECTURES, GOLDEN, mesh_of, tiny_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jlrm.config import UsageError
from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime.mesh import Layout, rollout_layout, training_layout
from jlrm.weights import hf, hf_config
from jlrm.weights.hf import Tensor
from jlrm.weights.presets import PRESETS, preset

NAMES = ("qwen2_untied", "qwen2_tied", "qwen3")


@functools.cache
def layout_of(make: Callable[..., Layout], data: int, fsdp: int, tensor: int) -> Layout:
    return make(mesh_of(data, fsdp, tensor))


def load(
    directory: pathlib.Path, dtype: str = "float32", layout: Layout | None = None
) -> tuple[QwenConfig, Params]:
    config = hf_config.read_config(directory, param_dtype=dtype, compute_dtype="float32")
    layout = layout or layout_of(training_layout, 1, 1, 1)
    return config, hf.load_params(directory, config, layout)


def reader(params: Params) -> Callable[[Tensor], np.ndarray]:
    """Return what `save_tensors` calls to read our array of one tensor."""

    def read(tensor: Tensor) -> np.ndarray:
        leaf = np.asarray(
            functools.reduce(lambda node, key: node[key], tensor.path.split("."), params)
        )
        return leaf[tensor.index]

    return read


def save(
    directory: pathlib.Path, config: QwenConfig, params: Params, dtype: str, **options: int
) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    config_json = json.dumps(hf_config.config_to_hf(config, dtype))
    (directory / "config.json").write_text(config_json)
    return list(hf.save_tensors(reader(params), config, directory, dtype, **options))


def stored(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Return every tensor of a directory, as the library reads it."""
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def rewrite(source: pathlib.Path, target: pathlib.Path, change: Callable[[dict], Any]) -> None:
    """Copy a golden directory with its tensors changed by `change`, in place."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    tensors = stored(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def assert_same_tensors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def assert_same_params(found: Params, wanted: Params) -> None:
    def compare(path: Any, a: jax.Array, b: jax.Array) -> None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, found, wanted)


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", NAMES)
def test_export_after_import_is_bit_exact(name, tmp_path):
    config, params = load(GOLDEN / name)
    save(tmp_path, config, params, "float32")
    assert_same_tensors(stored(tmp_path), stored(GOLDEN / name))


@pytest.mark.parametrize("held_in", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_files_survive_whichever_dtype_holds_them(name, held_in, tmp_path):
    """float32 holds every bfloat16 number; the numbers are random bits, subnormals among them."""

    def to_random_bfloat16(tensors: dict[str, np.ndarray]) -> None:
        random = np.random.default_rng(0)
        for key, value in tensors.items():
            bits = random.integers(0, 2**16, value.shape).astype(np.uint16)
            drawn = bits.view(ml_dtypes.bfloat16)
            finite = np.isfinite(drawn.astype(np.float32))
            tensors[key] = np.where(finite, drawn, ml_dtypes.bfloat16(-0.0))

    rewrite(GOLDEN / name, tmp_path / "in", to_random_bfloat16)
    config, params = load(tmp_path / "in", held_in)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {held_in}
    save(tmp_path / "out", config, params, "bfloat16")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "in"))


@pytest.mark.parametrize("name", NAMES)
def test_import_after_export_is_bit_exact(name, tmp_path):
    """The other way round, from weights that no file held before, through several files."""
    config, params = load(GOLDEN / name)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), params)
    save(tmp_path, config, params, "float32", shard_bytes=20_000)
    assert_same_params(load(tmp_path)[1], params)


def test_rounding_to_bfloat16_is_to_nearest(tmp_path):
    config, params = load(GOLDEN / "qwen3")
    save(tmp_path, config, params, "bfloat16")
    wanted = {k: v.astype(ml_dtypes.bfloat16) for k, v in stored(GOLDEN / "qwen3").items()}
    assert_same_tensors(stored(tmp_path), wanted)


def test_projections_are_transposed_with_heads_unfolded():
    """Head h, channel c of a projection is row h·H + c of the file: the pairing RoPE relies on."""
    config, params = load(GOLDEN / "qwen2_untied")
    files = stored(GOLDEN / "qwen2_untied")
    head_dim = config.head_dim
    attention = {name: np.asarray(leaf) for name, leaf in params["layers"]["attn"].items()}
    for layer, head, channel, width in ((0, 1, 3, 7), (1, 3, 0, 31), (1, 0, 7, 0)):
        prefix = f"model.layers.{layer}.self_attn"
        row = head * head_dim + channel
        assert (
            attention["q"][layer, width, head, channel]
            == files[f"{prefix}.q_proj.weight"][row, width]
        )
        assert attention["q_bias"][layer, head, channel] == files[f"{prefix}.q_proj.bias"][row]
        assert (
            attention["o"][layer, head, channel, width]
            == files[f"{prefix}.o_proj.weight"][width, row]
        )
    np.testing.assert_array_equal(params["embed"], files["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], files["lm_head.weight"])


# ------------------------------------------------------------------ files


def test_every_tensor_is_named_once_as_it_is_written(tmp_path):
    config, params = load(GOLDEN / "qwen2_untied")
    names = save(tmp_path, config, params, "float32")
    assert sorted(names) == sorted(stored(GOLDEN / "qwen2_untied"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_indexed_and_none_is_larger_than_asked(dtype, tmp_path):
    config, params = load(GOLDEN / "qwen2_untied")
    limit = 9000
    names = save(tmp_path, config, params, dtype, shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    count = len(files)
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {key: file for file, held in tensors.items() for key in held}
    assert sorted(index["weight_map"]) == sorted(names)
    sizes = {file: sum(v.nbytes for v in held.values()) for file, held in tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    largest = max(v.nbytes for held in tensors.values() for v in held.values())
    assert largest > limit / 2  # else no shard would be closed early
    for file, held in tensors.items():
        assert sizes[file] <= limit or len(held) == 1


def test_files_open_with_the_library_and_are_aligned(tmp_path):
    """The header's length is a multiple of eight, as the format asks, and the format is named."""
    config, params = load(GOLDEN / "qwen3")
    save(tmp_path, config, params, "bfloat16")
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_file_form_of_a_tensor_is_contiguous():
    """A transposed view has the right shape and the wrong memory, which is what writers write."""
    for tensor in hf.tensors(tiny_config("qwen2_untied")):
        value = np.arange(math.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)
        written = tensor.to_hf(value)
        assert written.shape == tensor.hf_shape
        assert written.flags.c_contiguous, tensor.name
        raw = np.frombuffer(memoryview(written), np.float32).reshape(tensor.hf_shape)
        folded = value.reshape(tensor.hf_shape[::-1]).T if tensor.num_inputs else value
        np.testing.assert_array_equal(raw, folded.reshape(tensor.hf_shape))


def deep_model() -> QwenConfig:
    """Return a model whose largest tensor is a small part of it."""
    return tiny_config(
        "qwen2_tied",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=16,
    )


def test_export_holds_one_tensor_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def read(tensor: Tensor) -> np.ndarray:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        value = np.ones(tensor.shape, np.float32)
        alive.append(weakref.ref(value))
        return value

    for _ in hf.save_tensors(read, deep_model(), tmp_path, "float32"):
        pass
    assert len(alive) > 200
    assert most == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_needs_memory_for_a_few_tensors_not_for_the_model(dtype, tmp_path):
    config = deep_model()
    sizes = [4 * math.prod(tensor.shape) for tensor in hf.tensors(config)]
    constant = 2**20
    assert sum(sizes) > 4 * (5 * max(sizes) + constant)
    tracemalloc.start()
    for _ in hf.save_tensors(lambda t: np.ones(t.shape, np.float32), config, tmp_path, dtype):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * max(sizes) + constant


# ------------------------------------------------------------------ onto devices


@pytest.mark.slow
@pytest.mark.parametrize("make", [training_layout, rollout_layout])
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loading_onto_eight_devices_gives_the_values_of_one(name, mesh, make):
    layout = layout_of(make, *mesh)
    config, params = load(GOLDEN / name, layout=layout)
    abstract = qwen.abstract_params(config, layout)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))
    assert_same_params(params, load(GOLDEN / name)[1])


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_copy_of_the_weights_reads_every_element_once(name, mesh, monkeypatch):
    """Each device reads its part alone: on a slice with one copy, a byte is one host's to read."""
    num_read = dict.fromkeys(("cut", "replicated"), 0)
    layout, read_slice = layout_of(training_layout, *mesh), hf._read_slice

    def counted(files: Any, tensor: Tensor, bounds: list[slice], dtype: Any) -> np.ndarray:
        found = read_slice(files, tensor, bounds, dtype)
        num_read["cut" if len(tensor.hf_shape) > 1 else "replicated"] += found.size
        return found

    monkeypatch.setattr(hf, "_read_slice", counted)
    config, _ = load(GOLDEN / name, layout=layout)
    shapes = [tensor.hf_shape for tensor in hf.tensors(config)]
    in_matrices = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    assert num_read["cut"] <= mesh[0] * in_matrices
    assert num_read["replicated"] <= 8 * sum(math.prod(s) for s in shapes if len(s) == 1)


def test_several_files_load_as_one(tmp_path):
    config, params = load(GOLDEN / "qwen2_untied")
    save(tmp_path, config, params, "float32", shard_bytes=9000)
    layout = layout_of(training_layout, 2, 2, 2)
    assert_same_params(load(tmp_path, layout=layout)[1], params)


# ------------------------------------------------------------------ transformers reads it


@pytest.mark.slow
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 9000])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_an_export_and_computes_the_same(name, shard_bytes, tmp_path, torch):
    from transformers import AutoModelForCausalLM

    config, params = load(GOLDEN / name)
    save(tmp_path, config, params, "float32", shard_bytes=shard_bytes)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert {key: len(found) for key, found in report.items()} == dict.fromkeys(report, 0)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    source = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, source(input_ids=tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_those_of_transformers_for_every_preset(name, torch):
    """Two layers of each, on the meta device: nothing is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dataclasses.replace(preset(name), num_hidden_layers=2)
    fields = hf_config.config_to_hf(config, "bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    wanted = {}
    for key, value in model.state_dict().items():
        wanted |= dict(in_files(key, tuple(value.shape)))
    if config.tie_word_embeddings:
        assert wanted.pop("lm_head.weight") == wanted["model.embed_tokens.weight"]
    assert {tensor.name: tensor.hf_shape for tensor in hf.tensors(config)} == wanted


def in_files(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return a tensor of transformers 5 as files have it, where each expert is apart."""
    layer, dot, name = key.partition(".experts.")
    if not dot:
        yield key, shape
        return
    number, outputs, inputs = shape
    for i in range(number):
        if name == "down_proj":
            yield f"{layer}.experts.{i}.down_proj.weight", (outputs, inputs)
        else:
            assert name == "gate_up_proj"
            for half in ("gate", "up"):
                yield f"{layer}.experts.{i}.{half}_proj.weight", (outputs // 2, inputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_its_tensors(architecture):
    """One a part of a stacked array, of the shape of that part; none is left over."""
    config = tiny_config(architecture, num_hidden_layers=3)
    abstract = qwen.abstract_params(config, layout_of(training_layout, 1, 1, 1))
    wanted = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = ".".join(key.key for key in path)
        depth = name.startswith("layers.") + name.startswith("layers.mlp.experts.")
        wanted |= {(name, index): leaf.shape[depth:] for index in np.ndindex(leaf.shape[:depth])}
    assert {(tensor.path, tensor.index): tensor.shape for tensor in hf.tensors(config)} == wanted


# ------------------------------------------------------------------ what is refused


def refused(directory: pathlib.Path) -> str:
    with pytest.raises(UsageError) as error:
        load(directory)
    return str(error.value)


def test_a_missing_tensor_is_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(GOLDEN / "qwen3", tmp_path, lambda tensors: tensors.pop(name))
    assert f"missing: {name}" in refused(tmp_path)


def test_an_untied_model_needs_its_head(tmp_path):
    rewrite(GOLDEN / "qwen2_untied", tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing: lm_head.weight" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "lm_head.bias"])
def test_an_unknown_tensor_is_named(name, tmp_path):
    """Biases on a model without them: dropping them changes it."""
    rewrite(GOLDEN / "qwen3", tmp_path, lambda ts: ts.update({name: np.zeros(64, np.float32)}))
    assert f"unknown: {name}" in refused(tmp_path)


def test_a_layer_too_many_is_unknown_and_one_too_few_is_missing(tmp_path):
    for layers, word in ((1, "unknown"), (3, "missing")):
        rewrite(GOLDEN / "qwen3", tmp_path, lambda tensors: None)
        fields = json.loads((tmp_path / "config.json").read_text())
        fields |= {"num_hidden_layers": layers, "layer_types": None}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        message = refused(tmp_path)
        assert f"{word}: model.layers.{min(layers, 2)}." in message
        assert "and 6 more" in message  # eleven tensors a layer, of which five are named


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (32, 64)),  # transposed: as many numbers
        ("model.embed_tokens.weight", (95, 32)),
        ("model.norm.weight", (32, 1)),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name, shape, tmp_path):
    rewrite(
        GOLDEN / "qwen2_tied", tmp_path, lambda ts: ts.update({name: np.ones(shape, np.float32)})
    )
    message = refused(tmp_path)
    wanted = list(stored(GOLDEN / "qwen2_tied")[name].shape)
    assert f"{name} {list(shape)} (wanted {wanted})" in message


def test_all_problems_are_told_at_once(tmp_path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.0.mlp.gate_proj.weight"]
        tensors["extra"] = np.zeros(1, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    rewrite(GOLDEN / "qwen3", tmp_path, spoil)
    message = refused(tmp_path)
    for name in ("model.layers.0.mlp.gate_proj.weight", "extra", "model.norm.weight [31]"):
        assert name in message


def test_pickled_weights_are_not_read(tmp_path):
    shutil.copyfile(GOLDEN / "qwen3" / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "holds no model.safetensors" in refused(tmp_path)


def test_a_file_the_index_names_and_that_is_not_there_is_named(tmp_path):
    config, params = load(GOLDEN / "qwen3")
    save(tmp_path, config, params, "float32", shard_bytes=9000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"holds no {gone.name}" in refused(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:-100],
        lambda raw: raw[:200],
        lambda raw: b"",
        lambda raw: b"\x80\x04" + raw,
        lambda raw: raw[:8] + b"{" + raw[9:20] + b"}" + raw[21:],
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 942\n",
    ],
    ids=["tail cut", "header cut", "empty", "shifted", "header spoilt", "LFS pointer"],
)
def test_a_damaged_file_is_named(spoil, tmp_path):
    rewrite(GOLDEN / "qwen3", tmp_path, lambda tensors: None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    message = refused(tmp_path)
    assert f"{file} is not a readable safetensors file" in message
    assert ("git lfs pull" in message) == file.read_bytes().startswith(b"version")


@pytest.mark.parametrize("text", ["", '{"metadata": {}', "{}", "[]"])
def test_a_damaged_index_is_named(text, tmp_path):
    rewrite(GOLDEN / "qwen3", tmp_path, lambda tensors: None)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(tmp_path)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
def test_a_second_copy_of_a_tied_head_is_accepted(name, tmp_path):
    """Qwen3-0.6B ships one."""

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(GOLDEN / name, tmp_path, add)
    config, params = load(tmp_path)
    assert config.tie_word_embeddings and "head" not in params
    assert_same_params(params, load(GOLDEN / name)[1])


def test_a_tied_head_that_differs_is_refused(tmp_path):
    """transformers 5 then unties the model, with a warning: ours would compute something else."""

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]

    rewrite(GOLDEN / "qwen3", tmp_path, add)
    assert "lm_head.weight" in refused(tmp_path)


# ------------------------------------------------------------------ directories


def test_resolve_returns_a_directory_as_it_is(tmp_path, monkeypatch):
    assert hf.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hf.resolve("org/model").samefile(tmp_path / "org" / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hf.resolve("~/org").samefile(tmp_path / "org")


@pytest.mark.parametrize(
    "source", ["/no/model", "./model", "../model", "~/model", "model", "a/b/c"]
)
def test_resolve_refuses_a_path_that_is_not_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError) as error:
        hf.resolve(source)
    assert source in str(error.value)


def test_resolve_refuses_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UsageError, match="is a file; name the directory"):
        hf.resolve(str(file))


def test_resolve_refuses_an_id_that_the_hub_does_not_give(tmp_path, monkeypatch):
    """Offline, so every id is one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no-such/model is no local directory, and the hub"):
        hf.resolve("no-such/model")


def test_a_second_copy_of_the_weights_is_not_downloaded(tmp_path, monkeypatch):
    """Mistral publishes its weights twice in one repository."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    listed = [*shards, hf.INDEX, "consolidated.safetensors", "config.json", "params.json"]
    chosen = []

    def download(source: str, **patterns: Any) -> str:
        chosen.extend(filter_repo_objects(listed, **patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.resolve("mistralai/Mistral-7B-v0.3") == tmp_path
    assert chosen == [*shards, hf.INDEX, "config.json"]


@pytest.mark.parametrize("source", ["runs/my--model", "runs/my model", "runs/"])
def test_resolve_refuses_a_relative_path_that_can_be_no_id(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        hf.resolve(source)
    assert source in str(error.value)


def side_files(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_side_files_are_copied_byte_for_byte_and_weights_are_not(tmp_path):
    """Odd bytes, as a round trip through a parser would not keep them."""
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.mkdir()
    names = (*hf.TOKENIZER_FILES, *hf.MODEL_FILES)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(names)
    for i, name in enumerate(names):
        (source / name).write_bytes(b'{ "b":1,\r\n "a":1.50e0 } \xff\xfe\x00' + bytes([i]))
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "README.md").write_bytes(b"card")
    hf.copy_side_files(source, target)
    wanted = side_files(source)
    del wanted["model.safetensors"], wanted["README.md"]
    assert side_files(target) == wanted


def test_no_file_of_an_earlier_tokenizer_stays_beside_the_new_one(tmp_path):
    """A stale chat template or vocabulary would be read with the new tokenizer."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in hf.TOKENIZER_FILES:
        (target / name).write_bytes(b"old")
    (target / "config.json").write_bytes(b"kept")
    (source / "tokenizer.json").write_bytes(b"new")
    hf.copy_tokenizer(source, target)
    assert side_files(target) == {"tokenizer.json": b"new", "config.json": b"kept"}


def test_copying_a_directory_onto_itself_loses_nothing(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"only copy")
    (tmp_path / "config.json").write_bytes(b"{}")
    before = side_files(tmp_path)
    hf.copy_side_files(tmp_path, tmp_path)
    assert side_files(tmp_path) == before
