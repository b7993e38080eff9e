"""Devices as a mesh, and tables that say which letter of a shape lies on which mesh axis.

The alphabet, the same in einsums, annotations, parameter declarations and tables:

    B sequences = P·R   T query positions   S cache positions   V vocabulary   L layers
    P prompts           R rollouts/prompt   D width             F MLP width
    N query heads       K key/value heads   H head width

A `Layout` is a mesh with two such tables, one for parameters and one for activations. There are two
layouts: training spreads parameters over `fsdp` and `tensor` both and the batch over everything
(weights are gathered layer by layer); a rollout spreads heads, MLP and vocabulary over `tensor` and
the batch over the rest (weights stay where they are, nothing is gathered per token). The layout is
an explicit argument of whatever shards, so a constraint can't be lost for want of a context, and it
is just as real on fake CPU devices as on a slice.

Mesh axes are of type Auto: constraints guide the compiler, which places the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlrm.config import MeshConfig, UsageError

ALPHABET = frozenset("BPRTSVDFNKHL")
AXES = ("data", "fsdp", "tensor")
Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Layout:
    """A mesh and where each letter of a shape lies on it; hashable by identity."""

    mesh: Mesh
    params: Table
    activations: Table

    def shard(self, x: Array, letters: str) -> Array:
        """Constrain an activation, e.g. `shard(x, "B T D")`; `-` stands for any other dimension.

        Raises:
          ValueError: an unknown letter, or another number of letters than dimensions.
        """
        names = letters.split()
        if len(names) != x.ndim:
            raise ValueError(
                f"'{letters}' names {len(names)} dimensions, the array has {x.ndim}: {x.shape}."
            )
        return jax.lax.with_sharding_constraint(x, self.activation(letters))

    def activation(self, letters: str) -> NamedSharding:
        """Return the sharding of an activation with these letters."""
        return self._sharding(letters.split(), self.activations)

    def param(self, letters: Sequence[str | None]) -> NamedSharding:
        """Return the sharding of a parameter declared with these letters."""
        return self._sharding(
            ["-" if letter is None else letter for letter in letters], self.params
        )

    def replicated(self) -> NamedSharding:
        """Return the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def num_batch_shards(self) -> int:
        """Return over how many devices the sequences of a batch are spread."""
        return math.prod(self.mesh.shape[axis] for axis in self.activations["B"])

    def _sharding(self, letters: Sequence[str], table: Table) -> NamedSharding:
        unknown = set(letters) - ALPHABET - {"-"}
        if unknown:
            raise ValueError(
                f"Unknown letter {sorted(unknown)} in {letters}: see the alphabet in mesh.py."
            )
        return NamedSharding(self.mesh, PartitionSpec(*(table.get(letter) for letter in letters)))


def training_layout(mesh: Mesh) -> Layout:
    """Return the layout of log-probabilities and updates: fully sharded data parallelism."""
    return Layout(
        mesh,
        params=MappingProxyType(
            {"D": ("fsdp",), "V": ("tensor",), "F": ("tensor",), "N": ("tensor",), "K": ("tensor",)}
        ),
        activations=MappingProxyType({"B": AXES}),
    )


def rollout_layout(mesh: Mesh) -> Layout:
    """Return the layout of prefill and decoding: tensor parallelism, no weight moves."""
    split = {letter: ("tensor",) for letter in "NKFV"}
    return Layout(
        mesh,
        params=MappingProxyType(split),
        activations=MappingProxyType({"B": ("data", "fsdp"), **split}),
    )


def create_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices as `data x fsdp x tensor`; one size may be -1, the rest of the devices.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UsageError(
            f"{wanted}: sizes are at least 1, and at most one of them is -1 (the rest)."
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UsageError(f"{wanted} does not fit {len(devices)} devices. Leave one size at -1.")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def global_array(value: np.ndarray, sharding: NamedSharding) -> Array:
    """Make a global array of a host value that every process holds; each device takes its part."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def host_array(value: Array) -> np.ndarray:
    """Return a global array's value on every host, whichever devices hold it."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
