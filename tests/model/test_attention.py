"""Attention over packed rows equals dense attention under an explicit mask, on every device."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import dense_attention, mesh_of, tpu_mesh
from jax._src.cudnn import fused_attention_stablehlo

from jlrm.model.attention import MASKED, attend_packed
from jlrm.model.cudnn import cudnn
from jlrm.model.splash import splash
from jlrm.model.visibility import Packing, prefix_align, visible_blocks
from jlrm.runtime.mesh import training_layout

# A row is a list of groups: the length of a prompt and those of its completions.
PACKINGS = {
    "one group": (128, [[(40, [20, 30, 25])]]),
    "one completion each": (256, [[(50, [40]), (30, [100])]]),
    "single tokens": (128, [[(1, [1, 1, 1]), (3, [1]), (1, [2, 1])]]),
    "many groups": (640, [[(5, [3, 4])] * 40]),
    "tiles": (512, [[(64, [64, 64]), (64, [128, 64])]]),
    "a full row of prompts": (128, [[(100, []), (28, [])]]),
    "rows of padding": (384, [[], [(150, [60, 70]), (10, [11])], [], [(1, [1])]]),
    "ragged": (384, [[(100, [30, 40, 50]), (37, [61])], [(9, [200]), (77, [9, 10])]]),
}
RATIOS = [(2, 2), (6, 2), (4, 1)]  # query and key/value heads


def packed(num_slots: int, rows) -> Packing:
    group = np.zeros((len(rows), num_slots), np.int32)
    start = np.zeros_like(group)
    prefix = np.zeros(len(rows), np.int32)

    def fill(row, slot, length, number):
        group[row, slot : slot + length] = number + 1
        start[row, slot : slot + length] = slot
        return slot + length

    for row, groups in enumerate(rows):
        slot, align = 0, prefix_align(num_slots)
        for number, (prompt, _) in enumerate(groups):
            slot = fill(row, slot, prompt, number)
        slot = prefix[row] = -(-slot // align) * align
        for number, (_, completions) in enumerate(groups):
            for completion in completions:
                slot = fill(row, slot, completion, number)
        assert slot <= num_slots
    return Packing(jnp.asarray(group), jnp.asarray(start), jnp.asarray(prefix))


def visible(packing: Packing) -> np.ndarray:
    """The contract, pair by pair."""
    group, start, prefix = map(np.asarray, packing)
    q = np.arange(group.shape[1])[None, :, None]
    k = q.swapaxes(1, 2)
    same = (group[:, :, None] == group[:, None]) & (group[:, :, None] != 0)
    return same & (k <= q) & ((k < prefix[:, None, None]) | (k >= start[:, :, None]))


def dense(q, k, v, packing: Packing):
    out = dense_attention(q, k, v, jnp.asarray(visible(packing)))
    return jnp.where((packing.group > 0)[..., None, None], out, 0)


def oracle(q, k, v, mask: np.ndarray) -> np.ndarray:
    """Attention in float64, for queries that see something."""
    num_groups = q.shape[2] // k.shape[1]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, num_groups, axis=1) for x in (k, v))
    scores = np.einsum("btnh,bnsh->bnts", q, k) / math.sqrt(q.shape[3])
    scores = np.where(mask[:, None], scores, MASKED)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bnsh->btnh", weights / weights.sum(-1, keepdims=True), v)


def random_inputs(packing: Packing, num_heads=4, num_kv_heads=2, width=16, seed=0):
    num_rows, num_slots = packing.group.shape
    q, k, v, d_out = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 4),
            [(num_rows, num_slots, num_heads, width)]
            + [(num_rows, num_kv_heads, num_slots, width)] * 2
            + [(num_rows, num_slots, num_heads, width)],
            strict=True,
        )
    )
    return q, k, v, d_out


def output_and_gradients(function, q, k, v, d_out):
    out, pull = jax.vjp(function, q, k, v)
    return (out, *pull(d_out))


def assert_equal(mine, wanted, bound=1e-5):
    for got, want in zip(mine, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)


def attend_rows(q, k, v, packing, layout):
    """Attend on each device to its own rows."""
    tokens, cells, rows = (layout.activation(letters).spec for letters in ("B - - -", "B -", "B"))
    return jax.shard_map(
        partial(attend_packed, platform=layout.platform),
        mesh=layout.mesh,
        in_specs=(tokens, tokens, tokens, Packing(cells, cells, rows)),
        out_specs=tokens,
        check_vma=False,
    )(q, k, v, packing)


@pytest.fixture
def layout(mesh):
    return training_layout(mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "heads"), [(name, RATIOS[i % 3]) for i, name in enumerate(PACKINGS)]
)
def test_packed_equals_dense(layout, name, heads):
    packing = packed(*PACKINGS[name])
    inputs = random_inputs(packing, *heads)
    run = jax.jit(
        partial(output_and_gradients, partial(attend_rows, packing=packing, layout=layout))
    )
    mine = run(*inputs)
    assert_equal(
        mine, jax.jit(partial(output_and_gradients, partial(dense, packing=packing)))(*inputs)
    )
    is_token = np.asarray(packing.group > 0)
    exact = oracle(*inputs[:3], visible(packing))
    np.testing.assert_allclose(np.asarray(mine[0])[is_token], exact[is_token], rtol=1e-5, atol=1e-5)
    # Padding is 0 to the bit, and moves nothing.
    for array in (mine[0], mine[1], *(x.swapaxes(1, 2) for x in mine[2:])):
        assert not np.asarray(array)[~is_token].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ragged", "rows of padding"])
def test_padding_changes_nothing(layout, name):
    packing = packed(*PACKINGS[name])
    q, k, v, d_out = random_inputs(packing)
    is_padding = (packing.group == 0)[..., None, None]
    by_head = is_padding.swapaxes(1, 2)
    garbage = (
        jnp.where(is_padding, 1e4, q),
        jnp.where(by_head, -1e4, k),
        jnp.where(by_head, 1e4, v),
        jnp.where(is_padding, 1e4, d_out),
    )
    run = jax.jit(
        partial(output_and_gradients, partial(attend_rows, packing=packing, layout=layout))
    )
    for got, want in zip(run(*garbage), run(q, k, v, d_out), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_eight_devices_equal_one(layout):
    rows = [[(20 + i, [10 + i, 5, 3 * i]), (7, [i + 1])] for i in range(8)]
    packing = packed(128, rows)
    inputs = random_inputs(packing)

    def run(layout):
        @jax.jit
        def step(packing, *inputs):
            attention = partial(attend_rows, packing=packing, layout=layout)
            return output_and_gradients(attention, *inputs)

        return step(packing, *inputs)

    assert_equal(run(training_layout(mesh_of(2, 2, 2))), run(layout), 1e-6)


@pytest.mark.slow
def test_bfloat16(layout):
    packing = packed(*PACKINGS["ragged"])
    inputs = random_inputs(packing)
    half = [x.astype(jnp.bfloat16) for x in inputs]
    run = partial(output_and_gradients, partial(attend_rows, packing=packing, layout=layout))
    mine = jax.jit(run)(*half)
    assert all(x.dtype == jnp.bfloat16 for x in mine)
    wanted = jax.jit(run)(*(x.astype(jnp.float32) for x in half))
    for got, want in zip(mine, wanted, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03, rtol=0.03)


@pytest.mark.slow
def test_no_array_of_all_pairs(layout):
    num_slots, num_heads = 2048, 4
    packing = packed(num_slots, [[(300, [200, 200]), (100, [300, 400, 200])]])
    inputs = random_inputs(packing, num_heads)
    step = partial(output_and_gradients, partial(attend_rows, packing=packing, layout=layout))
    text = jax.jit(step).lower(*inputs).compile().as_text()
    shapes = re.findall(r"(?:f32|s32|pred)\[([0-9,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest <= num_slots * num_heads * 16


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKINGS)
def test_skipped_blocks_hold_nothing_visible(name):
    packing = packed(*PACKINGS[name])
    mask = visible(packing)
    num_rows, num_slots, _ = mask.shape
    for query_block, key_block in ((64, 64), (128, 64), (64, 128)):
        blocks = mask.reshape(
            num_rows, num_slots // query_block, query_block, num_slots // key_block, key_block
        )
        needed = blocks.any((2, 4))
        computed = np.asarray(visible_blocks(packing, query_block, key_block))
        assert not (needed & ~computed).any()
        # A block of two groups may see a block of one of them before the other's start, no more.
        assert computed.sum() <= 1.25 * needed.sum()


@pytest.mark.slow
def test_number_of_slots_is_checked(layout):
    packing = Packing(
        jnp.ones((1, 96), jnp.int32), jnp.zeros((1, 96), jnp.int32), jnp.zeros(1, int)
    )
    q, k, v, _ = random_inputs(packing)
    with pytest.raises(ValueError, match="Packed rows have 96 slots"):
        attend_packed(q, k, v, packing, layout)


def test_prefix_align():
    wanted = {128: 1, 1024: 1, 2048: 2, 3072: 16, 4096: 16, 5120: 128, 8192: 128, 16384: 1024}
    assert {num_slots: prefix_align(num_slots) for num_slots in wanted} == wanted
    with pytest.raises(ValueError, match="The most is 32768"):
        prefix_align(2**15 + 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many groups", "rows of padding", "ragged"])
def test_splash_equals_dense(name):
    packing = packed(*PACKINGS[name])
    inputs = random_inputs(packing, 6, 2, 64)
    kernel = partial(splash, packing=packing, interpret=True)
    mine = jax.jit(partial(output_and_gradients, kernel))(*inputs)
    assert_equal(
        mine, jax.jit(partial(output_and_gradients, partial(dense, packing=packing)))(*inputs)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many groups", "rows of padding", "ragged"])
def test_mask_for_cudnn(name):
    packing = packed(*PACKINGS[name])
    inputs = random_inputs(packing, 6, 2, 64)
    attend = partial(cudnn, packing=packing, implementation="xla")
    mine = jax.jit(partial(output_and_gradients, attend))(*inputs)
    assert_equal(
        mine, jax.jit(partial(output_and_gradients, partial(dense, packing=packing)))(*inputs)
    )


def test_cudnn_is_lowered_for_gpus(monkeypatch):
    """No GPU is here: what is checked is that JAX takes the shapes, and calls the fused kernels."""
    for name, answer in (
        ("check_cudnn_version", 91000),
        ("check_compute_capability", True),
        ("is_cuda_compute_capability_equal", False),
    ):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)
    packing = packed(*PACKINGS["ragged"])
    inputs = [x.astype(jnp.bfloat16) for x in random_inputs(packing, 6, 2, 64)]
    step = partial(output_and_gradients, partial(attend_packed, packing=packing, platform="gpu"))
    kernels = [f"__cudnn$fmhaScaleBiasSoftmax{which}" for which in ("", "Backward")]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    lowered = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=allowed)(*inputs)
    assert set(re.findall(r"__cudnn\$\w+", lowered.mlir_module())) == set(kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "groups", [[(1536, [100]), (1536, [924])], [(1000, []), (3096, [])]], ids=["some", "all"]
)
def test_splash_reads_long_slots(groups):
    """Slots and prefixes that fill their bits, and one of all slots, in a row of 2**12 slots."""
    packing = packed(4096, [groups])
    q, k, v, _ = random_inputs(packing, 1, 1, 128)
    mine = jax.jit(partial(splash, packing=packing, interpret=True))(q, k, v)
    assert_equal((mine,), (dense(q, k, v, packing),))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "width", "num_rows"), [((28, 4), 128, 4), ((14, 2), 64, 8)])
def test_splash_compiles_for_tpus(heads, width, num_rows):
    grid = tpu_mesh("v5e:2x2", 1, 4, 1)
    layout, num_slots = training_layout(grid), 5120

    def shaped(letters, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.activation(letters))

    queries = shaped("B - - -", num_rows, num_slots, heads[0], width)
    keys = shaped("B - - -", num_rows, heads[1], num_slots, width)
    cells = shaped("B -", num_rows, num_slots, dtype=jnp.int32)
    packing = Packing(cells, cells, shaped("B", num_rows, dtype=jnp.int32))

    @jax.jit
    def step(q, k, v, d_out, packing):
        attention = partial(attend_rows, packing=packing, layout=layout)
        return output_and_gradients(attention, q, k, v, d_out)

    compiled = step.lower(queries, keys, keys, queries, packing).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 3
    assert "all-gather" not in text and "all-reduce" not in text
    # Less than the scores of one head, let alone of all.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * num_slots**2 * 2
