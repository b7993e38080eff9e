"""A quantised matrix is the nearest that its levels allow, on a device and on the host alike."""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlrm.model.quantised import BLOCK, NF4, quantise, widen

KINDS = {"int8": np.arange(-127, 128) / 127, "nf4": np.array(NF4)}


def matrix(shape: tuple[int, ...] = (3, 5, 2 * BLOCK)) -> np.ndarray:
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=(*shape[:-1], 1)))
    return (scale * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2 * BLOCK, 48, 8])
def test_every_number_goes_to_the_nearest_level_of_its_block(kind, size):
    x = matrix((3, 5, size))
    blocks = x.reshape(*x.shape[:-1], -1, np.gcd(BLOCK, size))
    largest = np.abs(blocks).max(-1, keepdims=True)
    distance = np.abs((blocks / largest)[..., None] - KINDS[kind].astype(np.float32))
    wanted = (KINDS[kind][distance.argmin(-1)] * largest).reshape(x.shape)
    np.testing.assert_allclose(widen(quantise(x, kind)), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_and_a_device_store_the_same(kind):
    x = matrix()
    host, device = quantise(x, kind), jax.jit(quantise, static_argnums=1)(jnp.asarray(x), kind)
    assert isinstance(host.values, np.ndarray)
    for one, other in zip(host, device, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(widen(host), jax.jit(widen)(device), rtol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_how_many_bits_a_number_takes(kind, bits):
    x = matrix()
    held = sum(leaf.nbytes for leaf in quantise(x, kind))
    assert held * 8 / x.size == bits


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_what_was_stored_is_stored_again(kind):
    np.testing.assert_array_equal(widen(quantise(np.zeros((2, BLOCK), np.float32), kind)), 0)
    once = widen(quantise(matrix(), kind))
    np.testing.assert_allclose(widen(quantise(once, kind)), once, rtol=1e-6)


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """Evenly spaced in probability on either side of zero, as the paper derives them."""
    offset, normal = 0.9677083, NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(levels, NF4, atol=1e-6)
