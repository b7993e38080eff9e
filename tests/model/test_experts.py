"""Experts: the same sums and gradients as every expert run on every token, on any mesh."""

from __future__ import annotations

import functools
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, mesh_of, tiny_config

from jlrm import train
from jlrm.config import UsageError
from jlrm.model import experts, qwen
from jlrm.model.experts import Matrices
from jlrm.runtime import commands
from jlrm.runtime.mesh import LOCAL, Local, rollout_layout, training_layout
from jlrm.runtime.settings import from_dict
from jlrm.sampling import decode
from jlrm.weights import source

ROWS, TOKENS, WIDTH, INNER, EXPERTS, CHOSEN = 4, 6, 16, 8, 8, 3


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray, Matrices]:
    """Return tokens, a router and experts."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    matrices = Matrices(
        normal(EXPERTS, WIDTH, INNER), normal(EXPERTS, WIDTH, INNER), normal(EXPERTS, INNER, WIDTH)
    )
    return 3 * normal(ROWS, TOKENS, WIDTH), 3 * normal(WIDTH, EXPERTS), matrices


def plain(x: Any, chosen: Any, shares: Any, matrices: Matrices) -> Any:
    """Run every expert on every token; weigh those that were not chosen with 0."""
    every = jnp.einsum("BTD,EDF->BTEF", x, matrices.gate, precision="highest")
    every = jax.nn.silu(every) * jnp.einsum("BTD,EDF->BTEF", x, matrices.up, precision="highest")
    every = jnp.einsum("BTEF,EFD->BTED", every, matrices.down, precision="highest")
    is_chosen = jax.nn.one_hot(chosen, EXPERTS) * shares[..., None]
    return jnp.einsum("BTED,BTCE->BTD", every, is_chosen, precision="highest")


def layer(
    mix: Any, x: Any, router: Any, matrices: Matrices, *, is_normed: bool = True
) -> jax.Array:
    return mix(x, *experts.choose(x, router, CHOSEN, is_normed), matrices)


def test_shares_are_the_highest_of_a_softmax_and_sum_to_one_if_wanted():
    x, router, _ = made()
    logits = x @ router
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    wanted = np.argsort(-softmax, axis=-1)[..., :CHOSEN]
    chosen, shares = experts.choose(x, router, CHOSEN, is_normed=False)
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(shares, np.take_along_axis(softmax, wanted, axis=-1), rtol=1e-5)
    _, normed = experts.choose(x, router, CHOSEN, is_normed=True)
    np.testing.assert_allclose(np.sum(normed, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        normed / shares, (normed / shares)[..., :1].repeat(CHOSEN, -1), rtol=1e-5
    )


@pytest.mark.parametrize("is_normed", [True, False])
def test_values_and_gradients_are_those_of_all_experts_run_on_all_tokens(is_normed):
    arguments, weights = made(), made(1)[0]

    def loss(mix: Any, *arguments: Any) -> jax.Array:
        return jnp.sum(weights * layer(mix, *arguments, is_normed=is_normed))

    mine, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, mix), argnums=(0, 1, 2)))(*arguments)
        for mix in (functools.partial(experts.mix, LOCAL), plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), mine, wanted)


@pytest.mark.slow
def test_the_kernels_of_tpus_give_the_same_product_and_gradients():
    """In tiles that do not divide its sides, with an expert that nobody chose."""
    draw = np.random.default_rng(0)
    rows, weights = (draw.normal(size=shape).astype(np.float32) for shape in ((96, 40), (96, 24)))
    matrices = draw.normal(size=(5, 40, 24)).astype(np.float32)
    sizes = np.array([30, 0, 1, 33, 32], np.int32)

    def loss(product: Any, rows: Any, matrices: Any) -> tuple[jax.Array, jax.Array]:
        out = product(rows, matrices, sizes)
        return jnp.sum(out * weights), out

    kernels = functools.partial(experts.grouped_product, interpret=True)
    (mine, wanted) = (
        jax.value_and_grad(functools.partial(loss, product), argnums=(0, 1), has_aux=True)(
            rows, matrices
        )
        for product in (kernels, jax.lax.ragged_dot)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), mine, wanted)


def test_no_token_is_dropped_where_all_choose_the_same_experts():
    x, _, matrices = made()
    chosen = np.broadcast_to(np.array([5, 0, 2]), (ROWS, TOKENS, CHOSEN))
    shares = np.full(chosen.shape, 0.25, np.float32)
    found = experts.run(x, chosen, shares, matrices)
    np.testing.assert_allclose(found, plain(x, chosen, shares, matrices), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_tpus_gives_the_same_values_and_gradients(dtype, monkeypatch):
    x, router, matrices = jax.tree.map(lambda each: jnp.asarray(each, dtype), made())
    kernels = functools.partial(experts.grouped_product, interpret=True)
    monkeypatch.setattr(experts, "grouped_product", kernels)

    def loss(platform: str, *arguments: Any) -> jax.Array:
        out = layer(functools.partial(experts.mix, Local(platform)), *arguments)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    mine, wanted = (
        jax.value_and_grad(functools.partial(loss, platform), argnums=(0, 1, 2))(
            x, router, matrices
        )
        for platform in ("tpu", "cpu")
    )
    bound = 1e-4 if dtype == "float32" else 0.03
    for found, expected in zip(jax.tree.leaves(mine), jax.tree.leaves(wanted), strict=True):
        wide = np.asarray(expected, np.float32)
        assert np.abs(np.asarray(found, np.float32) - wide).max() < bound * np.abs(wide).max()


@pytest.mark.parametrize("num_rows", [ROWS, 1], ids=["rows divide", "one row"])
@pytest.mark.parametrize("most", [2**15, 2 * TOKENS * CHOSEN, 5 * CHOSEN], ids=str)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_experts_that_stay_where_they_are_give_the_same_sums(mesh, most, num_rows, monkeypatch):
    """Run whole, and part by part."""
    monkeypatch.setattr(experts, "MOST_ROWS", most)
    x, router, matrices = made()
    layout = rollout_layout(mesh_of(*mesh))
    placed = jax.device_put(matrices, layout.param(("E", None, None)))
    assert len({str(shard.index) for shard in placed.gate.addressable_shards}) == mesh[1] * mesh[2]
    found = jax.jit(functools.partial(layer, functools.partial(experts.mix, layout)))(
        x[:num_rows], router, placed
    )
    np.testing.assert_allclose(
        found, layer(plain, x, router, matrices)[:num_rows], rtol=1e-4, atol=1e-5
    )


def test_int8_experts_are_rounded_by_outputs_of_their_own():
    config, layout = tiny_config("qwen3_moe"), training_layout(mesh_of(1, 1, 1))
    params = qwen.init(config, layout, seed=0)
    params["layers"]["mlp"]["experts"]["up"] *= jnp.arange(1.0, 9.0)[None, :, None, None] ** 3
    full, narrow = (
        decode.decode_params(config, layout, params, kind)["layers"][1]["mlp"]
        for kind in ("full", "int8")
    )
    assert isinstance(narrow["experts"]["up"], decode.Int8)
    for name, matrix in full["experts"].items():
        scale = np.abs(matrix).max(axis=-2, keepdims=True)
        assert narrow["experts"][name].scale.shape == scale.shape
        error = np.abs(decode.dequantise(config, narrow["experts"])[name] - matrix) / scale
        assert 1e-4 < error.max() < 0.5 / 127 + 1e-6
    assert narrow["router"].dtype == full["router"].dtype == jnp.float32  # who is chosen stays


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora": {"rank": 2}},
            r"lora\.targets has gate, up, down, .* Set lora\.targets=\[q,k,v,o\]",
        ),
        ({"sampling": {"exact": True}}, "does not hold for models with experts"),
        (
            {
                "sampling": {"weights": "int8"},
                "grpo": {"steps": 1, "loss": {"importance_cap": 2.0}},
            },
            "each step would widen all experts",
        ),
    ],
    ids=["adapters", "exact", "int8"],
)
def test_what_experts_know_nothing_of_is_refused(settings, message):
    model = {"preset": "qwen3-30b-a3b", "tokenizer": "toy"}
    config = from_dict(
        {
            "model": model,
            "run": {"dir": "x"},
            "data": {"train": "x"},
            "grpo": {"steps": 1},
            **settings,
        }
    )
    with pytest.raises(UsageError, match=message):
        source.read_model(config)


def test_a_model_of_the_hub_is_refused_before_its_weights_are_downloaded(
    tmp_path, monkeypatch, capsys
):
    asked = list[list[str]]()

    def download(source: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(GOLDEN / "qwen3_moe")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    words = ["model.preset=", "model.tokenizer=", "model.path=some/moe", "lora.rank=2"]
    words = ["--config", "configs/quickstart.yaml", f"run.dir={tmp_path / 'run'}", *words]
    assert commands.run(lambda: train.main(words)) == 2
    assert "Set lora.targets=[q,k,v,o]" in capsys.readouterr().err
    assert asked and all(set(each) <= {"config.json", "adapter_config.json"} for each in asked)
