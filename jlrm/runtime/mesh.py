"""The device mesh, and tables that map each letter of a shape to mesh axes.

The alphabet is the same in einsums, annotations, parameter declarations and tables:

    B sequences = P·R   T query positions   S cache positions   V vocabulary   L layers
    P prompts           R rollouts/prompt   D width             F MLP width
    N query heads       K key/value heads   H head width        U rank of an adapter
    E experts
    A the sequences again, where their heads attend
    M the sequences again, inside products whose F, V or E is spread

A `Layout` is a mesh with two such tables, one for parameters and one for activations. There are two
layouts:

* Training spreads parameters over `fsdp` and `tensor`, and the batch over all axes. Weights are
  gathered layer by layer.
* In a rollout weights stay in place and activations move, because these are small there. Heads lie
  on `tensor` and the batch on the other axes. MLP, experts and vocabulary lie on `fsdp` and
  `tensor`, so inside them (letter M) the batch lies on `data` only. In a decoding step it does so
  everywhere but in attention (`step_layout`).

Whatever shards takes the layout as an argument. So no constraint is lost because a context is
missing, and constraints act on fake CPU devices as on a slice.

Mesh axes are of type Auto: constraints guide the compiler, which places the collectives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlrm.config import MeshConfig, UsageError
from jlrm.runtime import devices

ALPHABET = frozenset("ABMPRTSVDFNKHLUE")
AXES = ("data", "fsdp", "tensor")
Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Layout:
    """A mesh, and the mesh axes of each letter; hashable by identity."""

    mesh: Mesh
    params: Table
    activations: Table

    def shard(self, x: Array, letters: str) -> Array:
        """Constrain an activation, e.g. `shard(x, "B T D")`; `-` stands for any other dimension.

        Raises:
          ValueError: an unknown letter, or not one letter for each dimension.
        """
        names = letters.split()
        if len(names) != x.ndim:
            raise ValueError(
                f"'{letters}' names {len(names)} dimensions, but the array has {x.ndim}: {x.shape}."
            )
        return jax.lax.with_sharding_constraint(x, self.activation(letters))

    def activation(self, letters: str) -> NamedSharding:
        """Return the sharding of an activation with these letters."""
        return self._sharding(letters.split(), self.activations)

    def param(self, letters: Sequence[str | None]) -> NamedSharding:
        """Return the sharding of a parameter declared with these letters."""
        return self._sharding(letters, self.params)

    def replicated(self) -> NamedSharding:
        """Return the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def platform(self) -> str:
        """The platform of the devices, which need not be this host's: "tpu", "cpu", "gpu"."""
        return self.mesh.devices.flat[0].platform

    def num_shards(self, letter: str) -> int:
        """Return the number of devices that this letter of an activation is spread over."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(letter))

    def axes(self, letter: str) -> tuple[str, ...]:
        """Return the mesh axes that this letter of an activation is spread over."""
        return self.activations.get(letter, ())

    def param_axes(self, letters: Sequence[str | None]) -> list[tuple[str, ...]]:
        """Return the mesh axes that each dimension of a parameter lies on."""
        return self._axes(letters, self.params)

    def _sharding(self, letters: Sequence[str | None], table: Table) -> NamedSharding:
        axes = [here or None for here in self._axes(letters, table)]
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _axes(self, letters: Sequence[str | None], table: Table) -> list[tuple[str, ...]]:
        unknown = set(letters) - ALPHABET - {"-", None}
        if unknown:
            raise ValueError(
                f"Unknown letters {sorted(map(str, unknown))} in {letters} (runtime/mesh.py)."
            )
        axes: list[tuple[str, ...]] = []
        # A mesh axis can cut only one dimension of an array: that of the first letter in need.
        for letter in letters:
            taken = {axis for of_letter in axes for axis in of_letter}
            axes.append(tuple(axis for axis in table.get(letter or "", ()) if axis not in taken))
        return axes


@dataclass(frozen=True)
class Local:
    """The layout of code that runs on each device by itself, inside `shard_map`."""

    platform: str = ""

    def shard(self, x: Array, letters: str) -> Array:
        """Return the array unchanged: it is local to this device."""
        return x


LOCAL = Local()


def training_layout(mesh: Mesh) -> Layout:
    """Return the layout of log-probabilities and updates: fully sharded data parallelism."""
    # No parameter is cut along its last dimension. That one lies across the lanes of a TPU, and for
    # a reduction along it the compiler falls back to all-reducing whole gradients.
    return Layout(
        mesh,
        params=MappingProxyType(
            {**dict.fromkeys("DVFE", ("fsdp", "tensor")), "N": ("tensor",), "H": ("fsdp",)}
        ),
        activations=MappingProxyType({"A": AXES, "B": AXES, "M": AXES}),
    )


def compiler_options(mesh: Mesh, is_exact: bool = False) -> dict[str, str]:
    """Return compiler options of programs in the training layout; if exact, of all programs."""
    if is_exact:  # nothing fused into products, which then sum in the same order in all programs
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    # TPU: otherwise XLA turns each product with a sharded contraction into a loop of small slices
    # and sends, which costs far more than gathering the weight (2.5 times the estimated time).
    # CPU: XLA's library for fused loops is limited to matrix products. Its sums made an update take
    # 1.5 times as long (measured).
    return {
        "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
        "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"},
    }.get(mesh.devices.flat[0].platform, {})


def rollout_layout(mesh: Mesh) -> Layout:
    """Return the layout of prefill and decoding: every matrix is spread, and none moves."""
    split = {**dict.fromkeys("NK", ("tensor",)), **dict.fromkeys("FVE", ("fsdp", "tensor"))}
    batch = {**dict.fromkeys("ABP", ("data", "fsdp")), "M": ("data",)}
    return Layout(
        mesh,
        params=MappingProxyType(split),
        activations=MappingProxyType({**batch, **split}),
    )


def step_layout(rollout: Layout) -> Layout:
    """Return the layout of one decoding step: between attentions all devices hold all rows.

    A step has one token a row, so what a layer adds is small: it is summed over all devices at
    once, after attention and after the MLP, where rows that stay spread would take four transfers.
    """
    return replace(rollout, activations={**rollout.activations, "B": rollout.activations["M"]})


def open_mesh(config: MeshConfig, url: str = "", apart: bool = False) -> Mesh:
    """Return a mesh of all devices, for a command that computes there.

    Args:
      url: of the run directory, if that is in a store; see `devices.ready`.
      apart: of this host's devices alone.

    Raises:
      UsageError: as of `create_mesh`; or a TPU is here, and JAX has only found the CPU.
    """
    devices.ready(url)
    return create_mesh(config, jax.local_devices() if apart else None)


def create_mesh(config: MeshConfig, chosen: Sequence[Any] | None = None) -> Mesh:
    """Arrange all devices, or the chosen ones, as `data x fsdp x tensor`.

    One size may be -1: all remaining devices.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    chips = list(jax.devices() if chosen is None else chosen)
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UsageError(
            f"{wanted}: sizes must be at least 1. One of them may be -1 (all remaining devices)."
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if len(chips) % fixed or (-1 not in sizes and fixed != len(chips)):
        count = f"{len(chips)} devices" if len(chips) > 1 else "1 device"
        raise UsageError(
            f"{wanted} does not fit {count}: the product of the three sizes must be the number of "
            "devices, where one size may be -1 (all remaining devices)."
        )
    sizes = [len(chips) // fixed if size == -1 else size for size in sizes]
    return Mesh(_arranged(sizes, chips), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes: list[int], chips: list[Any]) -> np.ndarray:
    """Place devices so that neighbours on a mesh axis are neighbours on the network.

    Between slices there is only the data-centre network. So `data` runs over them, the axis that is
    summed over once a step. If the network of a slice does not have the wanted shape, its chips are
    taken in the order of their numbers.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in chips})
    data, *rest = sizes
    if data % num_slices:
        raise UsageError(
            f"mesh.data={data} on {num_slices} slices: every slice must hold complete copies of "
            f"the weights. Set mesh.data={num_slices}, or a multiple of it."
        )
    try:
        if num_slices > 1:
            shape = (data // num_slices, *rest)
            return mesh_utils.create_hybrid_device_mesh(shape, (num_slices, 1, 1), chips)
        return mesh_utils.create_device_mesh(sizes, chips)
    except NotImplementedError:
        ordered = sorted(chips, key=lambda each: (getattr(each, "slice_index", 0), each.id))
        return np.array(ordered).reshape(sizes)


def global_array(value: np.ndarray, sharding: NamedSharding) -> Array:
    """Make a global array from a value that every process holds; each device takes its part."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def host_array(value: Array) -> np.ndarray:
    """Return the value of a global array on this host.

    Raises:
      ValueError: other processes hold parts of it; `replicate` it on the devices first.
    """
    if not (value.is_fully_addressable or value.is_fully_replicated):
        raise ValueError(
            f"Array {value.shape} lies partly on other hosts: `replicate` it. ({value.sharding})"
        )
    return np.asarray(value)


def replicate(layout: Layout, tree: Any) -> Any:
    """Begin to replicate arrays on all devices, if several processes hold parts of them."""
    if jax.process_count() == 1:
        return tree
    return _gather(layout)(tree)


@functools.cache
def _gather(layout: Layout) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=layout.replicated())
