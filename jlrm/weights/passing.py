"""Weights that one host alone has, passed on to the others over the devices' own network.

A model of the hub is downloaded by one host of a run. That host reads its files tensor by tensor.
Each tensor goes to all hosts in pieces of one of few sizes, so few programs are compiled, and each
host keeps the parts that its devices need. A host holds one tensor at a time beside its part of the
array that is being filled. Where every host has the files, each reads its own part instead (hf.py).
"""

from __future__ import annotations

import contextlib
import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import Array

from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime import hosts
from jlrm.runtime.mesh import Layout
from jlrm.weights import hf
from jlrm.weights.hf_files import open_tensors

PIECE = 2**24  # words of four bytes that travel together at most: each device holds as much
LEAST = 2**12  # and at least


def load_params(directory: pathlib.Path, config: QwenConfig, layout: Layout, reader: int) -> Params:
    """Read a checkpoint in one process onto the devices of all; each calls this.

    Args:
      directory: of the checkpoint, in process `reader`. No other process opens it.

    Raises:
      UsageError: in the reader, as `hf.load_params` does; the others then end with its message.
    """
    tensors = hf.tensors(config)
    wanted = {tensor.name: tensor.hf_shape for tensor in tensors}
    with contextlib.ExitStack() as stack:
        files = None
        if hosts.index() == reader:
            files = open_tensors(directory, wanted, stack, is_tied=config.tie_word_embeddings)
        by_path: dict[str, list[hf.Tensor]] = {}
        for tensor in tensors:
            by_path.setdefault(tensor.path, []).append(tensor)

        def fill(path: tuple[Any, ...], leaf: Any) -> Array:
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            # Devices that hold the same part share its memory here.
            parts = {
                part: np.empty([end - begin for begin, end in part], leaf.dtype)
                for part in {_bounds(index, leaf.shape) for index in indices}
            }
            for tensor in by_path[".".join(path)]:
                value = hf.read_whole(files, tensor, leaf.dtype) if files is not None else None
                value = pass_on(value, tensor.shape, leaf.dtype)
                for part, into in parts.items():
                    _keep(value, tensor.index, part, into)
            whole = jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: parts[_bounds(index, leaf.shape)]
            )
            return jax.block_until_ready(whole)  # then its memory here is free

        return dict(traverse_util.path_aware_map(fill, qwen.abstract_params(config, layout)))


def pass_on(value: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Give every process the array that one of them has (`value` is None in the others).

    Bits travel as whole numbers: sums of floats would lose the sign of a zero.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    words = np.zeros(-(-num_bytes // 4), np.uint32)
    if value is not None:
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        words.view(np.uint8)[:num_bytes] = flat
    for begin in range(0, words.size, PIECE):
        piece = words[begin : begin + PIECE]
        size = max(LEAST, 1 << (piece.size - 1).bit_length())  # a power of two
        padded = np.zeros(size, np.uint32)
        padded[: piece.size] = piece
        padded = multihost_utils.broadcast_one_to_all(padded, is_source=value is not None)
        piece[:] = np.asarray(padded)[: piece.size]
    return words.view(np.uint8)[:num_bytes].view(dtype).reshape(shape)


Bounds = tuple[tuple[int, int], ...]


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    assert index is not None
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _keep(value: np.ndarray, index: tuple[int, ...], part: Bounds, into: np.ndarray) -> None:
    """Copy what a part of an array needs of one of its tensors."""
    stacked, inner = part[: len(index)], part[len(index) :]
    if all(start <= i < end for i, (start, end) in zip(index, stacked, strict=True)):
        where = tuple(i - start for i, (start, _) in zip(index, stacked, strict=True))
        into[where] = value[tuple(slice(*bound) for bound in inner)]
