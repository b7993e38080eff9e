"""The Hugging Face format, read and written by one table.

Each row of `TABLE` gives the Hugging Face name of a tensor, its path in our tree, and its letters.
Letters before `|` are inputs: Hugging Face stores a projection as `[outputs, inputs]`, and we store
`[inputs, outputs]` with heads unfolded. So the same row serves reading and writing. A row with
`layers` stands for one tensor per layer in the files, and for one stacked array here; one with
`experts`, for one per layer and expert.

No model is ever whole in host memory. Import reads only the part of each tensor that a device
needs. Export writes safetensors shards as a stream, one tensor at a time. Only safetensors are
read, since pickled weights can run code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from jlrm.config import UsageError
from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime import hosts
from jlrm.runtime.mesh import Layout
from jlrm.runtime.storage import first_line
from jlrm.weights.hf_files import INDEX, WEIGHTS, Stored, open_tensors

TABLE = (
    ("model.embed_tokens.weight", "embed", "V D"),
    ("model.layers.{}.input_layernorm.weight", "layers.attn_norm.scale", "D"),
    ("model.layers.{}.self_attn.q_proj.weight", "layers.attn.q", "D | N H"),
    ("model.layers.{}.self_attn.k_proj.weight", "layers.attn.k", "D | K H"),
    ("model.layers.{}.self_attn.v_proj.weight", "layers.attn.v", "D | K H"),
    ("model.layers.{}.self_attn.q_proj.bias", "layers.attn.q_bias", "N H"),
    ("model.layers.{}.self_attn.k_proj.bias", "layers.attn.k_bias", "K H"),
    ("model.layers.{}.self_attn.v_proj.bias", "layers.attn.v_bias", "K H"),
    ("model.layers.{}.self_attn.q_norm.weight", "layers.attn.q_norm.scale", "H"),
    ("model.layers.{}.self_attn.k_norm.weight", "layers.attn.k_norm.scale", "H"),
    ("model.layers.{}.self_attn.o_proj.weight", "layers.attn.o", "N H | D"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale", "D"),
    ("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate", "D | F"),
    ("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up", "D | F"),
    ("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down", "F | D"),
    ("model.layers.{}.mlp.gate.weight", "layers.mlp.router", "D | E"),
    ("model.layers.{}.mlp.experts.{}.gate_proj.weight", "layers.mlp.experts.gate", "D | F"),
    ("model.layers.{}.mlp.experts.{}.up_proj.weight", "layers.mlp.experts.up", "D | F"),
    ("model.layers.{}.mlp.experts.{}.down_proj.weight", "layers.mlp.experts.down", "F | D"),
    ("model.norm.weight", "final_norm.scale", "D"),
    ("lm_head.weight", "head", "V D"),
    ("score.weight", "score", "D | C"),
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = ("generation_config.json", "config.json")
SHARDS = "*.safetensors"
SECOND = "consolidated*"  # the same weights under other names, beside Mistral's shards
ALL_FILES = (*MODEL_FILES, *TOKENIZER_FILES, "adapter_config.json", SHARDS, INDEX)
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and its place in our tree."""

    name: str
    path: str
    index: tuple[int, ...]  # into the stacked array: layer, expert; empty: it is whole
    shape: tuple[int, ...]  # ours, at that index
    num_inputs: int  # leading dimensions that are inputs; 0: the file has the same order

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in the file: heads folded, a projection as [outputs, inputs]."""
        if self.num_inputs:
            inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
            return math.prod(outputs), math.prod(inputs)
        return self.shape if self.path in ("embed", "head") else (math.prod(self.shape),)

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """Return our array of a tensor as in the file; contiguous, since raw memory is written."""
        if self.num_inputs:
            value = value.reshape(self.hf_shape[::-1]).T
        return np.ascontiguousarray(value.reshape(self.hf_shape))


def tensors(config: QwenConfig) -> list[Tensor]:
    """List every tensor in a checkpoint of this architecture, with names and shapes."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "C": config.num_labels,
        "E": config.num_experts,
    }
    has_experts = config.num_experts > 0
    stacked = {"layers": range(config.num_hidden_layers), "experts": range(config.num_experts)}
    absent = {  # by a part of the path
        "head": config.tie_word_embeddings or config.num_labels > 0,
        "score": not config.num_labels,
        "q_bias": not config.qkv_bias,
        "k_bias": not config.qkv_bias,
        "v_bias": not config.qkv_bias,
        "q_norm": not config.qk_norm,
        "k_norm": not config.qk_norm,
        "mlp.router": not has_experts,
        "mlp.experts": not has_experts,
        **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.down"), has_experts),
    }
    listed = []
    for name, path, letters in TABLE:
        if any(f".{part}." in f".{path}." for part, is_absent in absent.items() if is_absent):
            continue
        inputs, bar, outputs = letters.partition("|")
        shape = tuple(sizes[letter] for letter in (inputs + outputs).split())
        num_inputs = len(inputs.split()) if bar else 0
        axes = [stacked[part] for part in path.split(".") if part in stacked]
        indices = itertools.product(*axes)
        listed += [Tensor(name.format(*i), path, i, shape, num_inputs) for i in indices]
    return listed


def resolve(source: str, files: Sequence[str] = ALL_FILES) -> pathlib.Path:
    """Return the local directory of a Hugging Face model; a hub id is downloaded.

    Of several processes one downloads the weights; the others' directories hold the rest
    (passing.py).

    Args:
      source: a directory or a hub id.
      files: names and patterns of the files that are needed.

    Raises:
      UsageError: `source` is neither a directory nor an id that the hub knows.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UsageError(f"{source} is a file; name the directory that it is in.")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UsageError(
            f"No model directory at {source} (and it is no hub id such as Qwen/Qwen3-0.6B)."
        )
    from huggingface_hub import snapshot_download

    wanted = [file for file in files if hosts.is_main() or file != SHARDS]
    try:
        return pathlib.Path(
            snapshot_download(source, allow_patterns=wanted, ignore_patterns=SECOND)
        )
    except Exception as error:  # the client raises anything
        raise UsageError(
            f"{source} is no local directory, and the hub did not give it: {first_line(error)}."
        ) from error


def load_params(directory: pathlib.Path, config: QwenConfig, layout: Layout) -> Params:
    """Read a checkpoint onto the devices; each device takes its part of every tensor.

    Raises:
      UsageError: there are no safetensors, tensors are missing, unknown or of another shape, or one
        holds NaN or infinity.
    """
    wanted = tensors(config)
    shapes = {tensor.name: tensor.hf_shape for tensor in wanted}
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, shapes, stack, is_tied=config.tie_word_embeddings)
        abstract = qwen.abstract_params(config, layout)
        by_path: dict[str, list[Tensor]] = {}
        for tensor in wanted:
            by_path.setdefault(tensor.path, []).append(tensor)

        def read(path: tuple[Any, ...], leaf: Any) -> Array:
            group = by_path[".".join(path)]
            part = functools.partial(_read_part, files, group, leaf.shape, leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        return jax.block_until_ready(traverse_util.path_aware_map(read, abstract))


def save_tensors(
    read: Callable[[Tensor], np.ndarray],
    config: QwenConfig,
    directory: pathlib.Path,
    dtype: str,
    shard_bytes: int = 5 * 10**9,
) -> Iterator[str]:
    """Write safetensors shards and their index; yield the name of each tensor once it is written.

    `read` returns our array for one tensor (a part of a stacked array). It is dropped before the
    next one is read.
    """
    width = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors(config):
        size = math.prod(tensor.shape) * width
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    weight_map = {}
    for i, shard in enumerate(shards):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with open(directory / name, "wb") as file:
            yield from _write_safetensors(file, shard, read, dtype, width)
    if len(shards) > 1:
        total = sum(math.prod(t.shape) * width for shard in shards for t in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2))


def copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy configuration, tokenizer and chat template byte for byte, never rewritten."""
    copy_tokenizer(source, target)
    for name in MODEL_FILES:
        if (source / name).is_file() and not source.samefile(target):
            shutil.copyfile(source / name, target / name)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy the tokenizer and its chat template alone, leaving no file of an earlier one."""
    target.mkdir(parents=True, exist_ok=True)
    if source.samefile(target):
        return
    for name in TOKENIZER_FILES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _read_part(
    files: dict[str, Stored],
    group: list[Tensor],
    shape: tuple[int, ...],
    dtype: Any,
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """Return the part `index` of one of our arrays; no other part of the files is read."""
    assert index is not None
    bounds = [slice(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    depth = len(group[0].index)
    if not depth:
        return _read_slice(files, group[0], bounds, dtype)
    out = np.empty([part.stop - part.start for part in bounds], dtype)
    for tensor in group:
        places = [range(*part.indices(part.stop)) for part in bounds[:depth]]
        if all(i in place for i, place in zip(tensor.index, places, strict=True)):
            into = tuple(map(range.index, places, tensor.index))
            out[into] = _read_slice(files, tensor, bounds[depth:], dtype)
    return out


def read_whole(files: Mapping[str, Stored], tensor: Tensor, dtype: Any) -> np.ndarray:
    """Return one tensor in our shape."""
    return _read_slice(files, tensor, [slice(0, size) for size in tensor.shape], dtype)


def _read_slice(
    files: Mapping[str, Stored], tensor: Tensor, bounds: list[slice], dtype: Any
) -> np.ndarray:
    stored = files[tensor.name]
    if tensor.num_inputs:
        inputs, shape_in, cut_in = _fold(
            bounds[: tensor.num_inputs], tensor.shape[: tensor.num_inputs]
        )
        outputs, shape_out, cut_out = _fold(
            bounds[tensor.num_inputs :], tensor.shape[tensor.num_inputs :]
        )
        return stored.read((outputs, inputs), dtype).T.reshape(shape_in + shape_out)[
            cut_in + cut_out
        ]
    if len(tensor.hf_shape) == 1:
        folded, shape, cut = _fold(bounds, tensor.shape)
        return stored.read(folded, dtype).reshape(shape)[cut]
    return stored.read(tuple(bounds), dtype)


def _fold(
    bounds: list[slice], shape: tuple[int, ...]
) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """Return the range to read of a folded dimension, its unfolded shape, and the part to keep.

    Only a cut of the first unfolded dimension is a single range in the file. Other cuts are made
    after reading.
    """
    inner = math.prod(shape[1:])
    first = bounds[0]
    num_read = first.stop - first.start
    folded = slice(first.start * inner, first.stop * inner)
    return folded, (num_read, *shape[1:]), (slice(num_read), *bounds[1:])


def _write_safetensors(
    file: BinaryIO,
    shard: list[Tensor],
    read: Callable[[Tensor], np.ndarray],
    dtype: str,
    width: int,
) -> Iterator[str]:
    """Write one file as a stream; the library's own writer needs all of its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + math.prod(tensor.shape) * width
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": tensor.hf_shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
        value = tensor.to_hf(read(tensor)).astype(getattr(ml_dtypes, dtype, dtype))
        file.write(value.reshape(-1).view(np.uint8).data)
        yield tensor.name
    file.flush()
    os.fsync(file.fileno())
