"""A Llama decoder is a Qwen2 decoder without biases: the same logits, and the same file back."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from conftest import mesh_of, plain_states, tiny_config

from jlrm.model import qwen
from jlrm.runtime.mesh import training_layout
from jlrm.weights import hf, hf_config


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_and_files_are_those_of_transformers(torch, tmp_path, is_tied):
    import transformers

    ours = tiny_config(qkv_bias=False, tie_word_embeddings=is_tied, rms_norm_eps=1e-5)
    described = hf_config.config_to_hf(ours, "float32")
    assert described["architectures"] == ["LlamaForCausalLM"]
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**described, initializer_range=0.1)
    model = transformers.LlamaForCausalLM(settings).eval()
    model.save_pretrained(tmp_path)
    config = hf_config.read_config(tmp_path, compute_dtype="float32")
    layout = training_layout(mesh_of(1, 1, 1))
    params = hf.load_params(tmp_path, config, layout)

    ids = np.random.default_rng(0).integers(0, 96, (2, 17))
    positions, mask = np.tile(np.arange(17), (2, 1)), np.ones((2, 17), bool)
    hidden = jax.jit(lambda p: plain_states(config, layout, p, ids, positions, mask))(params)
    mine = np.asarray(hidden @ qwen.head(config, params).T)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)).logits.numpy()
    assert np.abs(mine - wanted).max() < 1e-5

    assert config == ours
    names = {tensor.name for tensor in hf.tensors(config)}
    lacking = {name for name in model.state_dict() if name not in names}
    assert lacking == ({"lm_head.weight"} if is_tied else set())


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
