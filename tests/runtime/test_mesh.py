"""The mesh, the tables of letters, and values that go onto eight devices and come back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import AxisType

from jlrm.config import MeshConfig, UsageError
from jlrm.runtime.mesh import (
    ALPHABET,
    AXES,
    Layout,
    create_mesh,
    global_array,
    host_array,
    rollout_layout,
    training_layout,
)

LAYOUTS = {"training": training_layout, "rollout": rollout_layout}


def shard_shape(sharding: jax.sharding.Sharding, *shape: int) -> tuple[int, ...]:
    return sharding.shard_shape(shape)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, -1, 2), (2, 2, 2)),
        ((2, 4, -1), (2, 4, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
    ],
)
def test_the_mesh_has_the_sizes_asked_for_and_minus_one_takes_the_rest(sizes, wanted):
    mesh = create_mesh(MeshConfig(*sizes))
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == wanted
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_the_default_config_shards_over_every_device():
    assert create_mesh(MeshConfig()).devices.shape == (1, len(jax.devices()), 1)


def test_the_mesh_uses_the_devices_it_is_given():
    chosen = jax.devices()[2:6]
    mesh = create_mesh(MeshConfig(data=2, fsdp=-1, tensor=1), chosen)
    assert mesh.devices.shape == (2, 2, 1)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in chosen}


@pytest.mark.parametrize(
    "sizes",
    [
        (-1, -1, 1),  # two of them are the rest
        (0, -1, 1),
        (1, -2, 1),
        (1, 1, 1),  # one device of eight
        (2, 2, 4),  # sixteen
        (3, -1, 1),  # does not divide eight
        (1, 16, -1),  # more than there are
    ],
)
def test_sizes_that_fit_no_mesh_are_refused_by_name(sizes):
    with pytest.raises(UsageError) as error:
        create_mesh(MeshConfig(*sizes))
    for axis, size in zip(AXES, sizes, strict=True):
        assert f"mesh.{axis}={size}" in str(error.value)


def test_the_refusal_of_one_device_says_what_would_fit():
    with pytest.raises(UsageError, match="does not fit 1 device: the product of the three sizes"):
        create_mesh(MeshConfig(1, -1, 3), jax.devices()[:1])


def test_training_cuts_parameters_along_their_first_letters_and_the_batch_over_everything():
    layout = training_layout(mesh_of(2, 2, 2))
    assert shard_shape(layout.param(("V", "D")), 96, 32) == (24, 32)
    assert shard_shape(layout.param(("L", "D", "N", "H")), 3, 32, 4, 8) == (3, 8, 4, 8)
    assert shard_shape(layout.param(("L", "D", "K", "H")), 3, 32, 2, 8) == (3, 8, 2, 8)
    assert shard_shape(layout.param(("L", "N", "H", "D")), 3, 4, 8, 32) == (3, 2, 4, 32)
    assert shard_shape(layout.param(("L", "F", "D")), 3, 64, 32) == (3, 16, 32)
    assert layout.param_axes(("L", "F", "D")) == [(), ("fsdp", "tensor"), ()]
    assert shard_shape(layout.activation("B T D"), 8, 5, 32) == (1, 5, 32)
    assert shard_shape(layout.activation("B T V"), 8, 5, 96) == (1, 5, 96)
    assert layout.num_shards("B") == 8


def test_a_rollout_spreads_heads_mlp_and_vocabulary_and_moves_no_weight():
    layout = rollout_layout(mesh_of(2, 2, 2))
    assert shard_shape(layout.param(("V", "D")), 96, 32) == (24, 32)
    assert shard_shape(layout.param(("D", "N", "H")), 32, 4, 8) == (32, 2, 8)
    assert shard_shape(layout.param(("F", "D")), 64, 32) == (16, 32)
    assert shard_shape(layout.activation("P R K S H"), 8, 3, 2, 5, 8) == (2, 3, 1, 5, 8)
    assert shard_shape(layout.activation("M V"), 8, 96) == (4, 24)
    assert shard_shape(layout.activation("M T F"), 8, 5, 64) == (4, 5, 16)
    assert shard_shape(layout.activation("B T D"), 8, 5, 32) == (2, 5, 32)
    assert layout.num_shards("V") == 4 and layout.num_shards("T") == 1
    assert layout.num_shards("B") == 4


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_tables_name_letters_of_the_alphabet_and_axes_of_the_mesh(make):
    """A stale letter would shard nothing, silently."""
    layout = make(mesh_of(2, 2, 2))
    for table in (layout.params, layout.activations):
        assert table.keys() <= ALPHABET
        assert all(set(axes) <= set(AXES) for axes in table.values())


def test_a_dimension_outside_the_alphabet_lies_whole_on_every_device():
    layout = training_layout(mesh_of(2, 2, 2))
    assert shard_shape(layout.activation("- -"), 96, 32) == (96, 32)
    assert shard_shape(layout.param((None, "D")), 96, 32) == (96, 8)
    assert shard_shape(layout.replicated(), 96, 32) == (96, 32)


def test_shard_puts_the_array_where_the_letters_say_and_changes_no_value():
    layout = rollout_layout(mesh_of(2, 2, 2))
    x = np.arange(8 * 2 * 5 * 4, dtype=np.float32).reshape(8, 2, 5, 4)
    y = jax.jit(lambda x: layout.shard(x, "B K S H"))(x)
    assert y.sharding.is_equivalent_to(layout.activation("B K S H"), y.ndim)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 1, 5, 4)}
    np.testing.assert_array_equal(np.asarray(y), x)


@pytest.mark.parametrize("letters", ["B T", "B T D D", "", "BTD"])
def test_shard_refuses_another_number_of_letters_than_dimensions(letters):
    layout = training_layout(mesh_of(1, 1, 1))
    with pytest.raises(ValueError, match=r"names \d dimensions, but the array has 3"):
        layout.shard(jnp.zeros((2, 3, 4)), letters)


@pytest.mark.parametrize("use", [Layout.shard, Layout.activation, Layout.param])
def test_unknown_letters_are_refused(use):
    layout = training_layout(mesh_of(1, 1, 1))
    letters: Any = ("B", "Q", "D") if use is Layout.param else "B Q D"
    arguments = (jnp.zeros((2, 3, 4)), letters) if use is Layout.shard else (letters,)
    with pytest.raises(ValueError, match=r"Unknown letters \['Q'\]"):
        use(layout, *arguments)


def test_layouts_are_static_arguments_of_jit():
    """Hashable by identity: two meshes never share a compiled function."""
    first, second = training_layout(mesh_of(1, 1, 1)), training_layout(mesh_of(1, 1, 1))
    assert len({first, second, first}) == 2
    assert jax.jit(lambda layout, x: layout.shard(x, "D"), static_argnums=0)(
        first, jnp.ones(3)
    ).shape == (3,)


@pytest.mark.parametrize("letters", ["B T D", "- - D", "B - -", "- - -"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_values_survive_the_way_onto_eight_devices_and_back(letters, dtype):
    layout = training_layout(mesh_of(2, 2, 2))
    value = np.random.default_rng(0).integers(0, 9, (8, 3, 4)).astype(jnp.dtype(dtype))
    x = global_array(value, layout.activation(letters))
    assert x.dtype == value.dtype and x.shape == value.shape
    assert x.sharding == layout.activation(letters)
    assert len(x.addressable_shards) == 8
    back = host_array(x)
    assert isinstance(back, np.ndarray) and back.dtype == value.dtype
    np.testing.assert_array_equal(back, value)


def test_each_device_takes_its_own_part():
    layout = training_layout(mesh_of(2, 2, 2))
    value = np.arange(8 * 3).reshape(8, 3)
    x = global_array(value, layout.activation("B -"))
    assert sorted(int(shard.data[0, 0]) for shard in x.addressable_shards) == [*range(0, 24, 3)]
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])


def test_scalars_and_lists_become_global_arrays_too():
    layout = training_layout(mesh_of(1, 8, 1))
    assert host_array(global_array(np.float32(2.5), layout.replicated())) == np.float32(2.5)
    listed: Any = [1, 2, 3]
    np.testing.assert_array_equal(host_array(global_array(listed, layout.replicated())), listed)


class Chip:
    """As much of a device as its placing looks at."""

    platform = device_kind = "cpu"

    def __init__(self, number: int, slice_index: int) -> None:
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index


def test_slices_are_told_apart_by_data():
    chips = [Chip(number, number // 4) for number in range(8)]
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2), chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert (slices[0] == 0).all() and (slices[1] == 1).all()
    with pytest.raises(UsageError, match=r"mesh\.data=1 on 2 slices.*mesh\.data=2"):
        create_mesh(MeshConfig(data=1, fsdp=4, tensor=2), chips)


def test_what_other_hosts_hold_is_not_fetched():
    class Elsewhere:
        is_fully_addressable = is_fully_replicated = False
        shape, sharding = (4,), "there"

    with pytest.raises(ValueError, match="other hosts"):
        host_array(Elsewhere())  # pyright: ignore[reportArgumentType]
