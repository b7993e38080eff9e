"""Llama, Mistral, Qwen3-MoE: the logits and greedy tokens of transformers, the same file back."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tensorstore
from conftest import mesh_of, plain_states
from safetensors.numpy import load_file

from jlrm import export
from jlrm.data.worlds import toy
from jlrm.model import qwen
from jlrm.model.qwen import QwenConfig
from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import rollout_layout, training_layout
from jlrm.sampling import decode, sampler
from jlrm.sampling.stops import stop_tables
from jlrm.weights import checkpoint, hf, hf_config, steps

VOCAB, WIDTH, NUM_NEW = toy.VOCAB_SIZE, 48, 8
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # of rows of up to 56 tokens
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 16},
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": WIDTH + NUM_NEW}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    ),
}


class Pair(NamedTuple):
    """One model, theirs and ours, and the directory that both read."""

    theirs: Any
    config: QwenConfig
    params: Any
    directory: pathlib.Path


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, torch, tmp_path_factory) -> Pair:
    import transformers

    kind, fields = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**SIZES, **fields)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    with torch.no_grad():  # else every norm is 1, and one left out would not show
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(directory)
    config = hf_config.read_config(directory, compute_dtype="float32")
    params = hf.load_params(directory, config, training_layout(mesh_of(1, 1, 1)))
    return Pair(theirs, config, params, directory)


def rows(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and mask of a whole row and two shorter ones, padded on a side."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, WIDTH))
    lengths = np.array([[WIDTH], [31], [5]])
    column = np.arange(WIDTH)[None]
    return tokens, column < lengths if side == "right" else column >= WIDTH - lengths


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_transformers(pair, torch, side):
    config, layout = pair.config, training_layout(mesh_of(1, 1, 1))
    tokens, mask = rows(side)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    states = jax.jit(lambda p: plain_states(config, layout, p, tokens, positions, mask))
    mine = np.asarray(states(pair.params) @ qwen.head(config, pair.params).T)
    with torch.no_grad():
        wanted = pair.theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    assert np.abs(wanted[mask]).max() > 1
    assert np.abs(mine - wanted)[mask].max() < 1e-5


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(pair, torch):
    config, layout = pair.config, rollout_layout(mesh_of(1, 1, 1))
    tokens, mask = rows("right")
    lengths = mask.sum(axis=1).astype(np.int32)
    settings = sampler.SamplerSettings(Distribution(temperature=0.0), NUM_NEW, (), 0)
    keys = sampler.rollout_keys(0, np.int32(0), np.arange(len(tokens)), 1)

    @jax.jit
    def run(params: Any) -> Any:
        weights = decode.decode_params(config, layout, params)
        prompts = decode.Prompts(np.where(mask, tokens, 0).astype(np.int32), lengths)
        stops = stop_tables({}, [], VOCAB)
        return sampler.generate(config, layout, settings, weights, prompts, keys, stops)

    mine = np.asarray(run(pair.params).tokens).reshape(len(tokens), NUM_NEW)
    for row, length, drawn in zip(tokens, lengths, mine, strict=True):
        wanted = pair.theirs.generate(
            torch.tensor(row[None, :length]),
            attention_mask=torch.ones(1, length, dtype=int),
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=VOCAB,  # no id
            pad_token_id=0,
        )
        assert drawn.tolist() == wanted[0, length:].tolist()


@pytest.mark.slow
def test_an_export_is_the_same_model_of_the_same_class(pair, torch, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(checkpoint, "MIN_CHUNK_BYTES", 1)
    toy.save_tokenizer(pair.directory)
    export.import_from_hf(str(pair.directory), tmp_path / "run")
    export.export_to_hf(str(tmp_path / "run"), tmp_path / "out", "float32")
    found, wanted = (load_file(d / hf.WEIGHTS) for d in (tmp_path / "out", pair.directory))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].tobytes() == tensor.tobytes()
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert type(again) is type(pair.theirs)
    assert again.config.architectures == [type(again).__name__]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    if pair.config.num_experts:
        assert written["num_experts"] == written["num_local_experts"] == 6  # of 4, and of 5
        # What is read at once lies together.
        assert chunk(tmp_path / "run", "layers.mlp.experts.gate") == (1, 1, 32, 24)
    assert chunk(tmp_path / "run", "layers.attn.o")[0] == 1
    assert getattr(again.config, "sliding_window", 0) == getattr(
        pair.theirs.config, "sliding_window", 0
    )
    tokens = torch.tensor(rows("right")[0])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, pair.theirs(tokens).logits)


def chunk(run: pathlib.Path, name: str) -> tuple[int, ...]:
    """Return the shape of what is read at once of a parameter of a run."""
    store = {"driver": "file", "path": f"{steps.find(str(run)) / 'params'}/"}
    kvstore = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    opened = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    return opened.chunk_layout.read_chunk.shape


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["llama3"], indirect=True)
@pytest.mark.parametrize("changes", [{"factor": 2.0}, {"low_freq_factor": 2.0}], ids=repr)
def test_scaling_shows_in_rows_of_this_length(pair, changes):
    """So that the comparisons above would fail without it."""
    config, layout = pair.config, training_layout(mesh_of(1, 1, 1))
    other = hf_config.config_from_hf(
        json.loads((pair.directory / "config.json").read_text())
        | {"rope_parameters": LLAMA3 | changes},
        compute_dtype="float32",
    )
    tokens, _ = rows("right")
    positions, mask = np.tile(np.arange(WIDTH), (3, 1)), np.ones((3, WIDTH), bool)
    mine, moved = (
        np.asarray(plain_states(each, layout, pair.params, tokens, positions, mask))
        for each in (config, other)
    )
    assert np.abs(mine - moved).max() > 1e-2


def test_what_a_file_leaves_open_has_the_defaults_of_transformers(torch):
    import transformers

    fields = json.loads(transformers.LlamaConfig().to_json_string())
    least = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept = {name: fields[name] for name in (*least, "num_attention_heads", "model_type")}
    config = hf_config.config_from_hf(kept)
    assert config.num_key_value_heads == fields["num_key_value_heads"]
    assert config.max_position_embeddings == fields["max_position_embeddings"]
    assert config.head_dim == fields["head_dim"]
    assert config.rms_norm_eps == fields["rms_norm_eps"]
    assert not (config.qkv_bias or config.qk_norm or config.tie_word_embeddings)
