"""Adapters of a run are PEFT's: what either writes, the other reads, and both compute the same."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, plain_states, required, tiny_config
from safetensors.numpy import load_file, save_file

from jlrm import export
from jlrm.config import (
    Config,
    DataConfig,
    LoRAConfig,
    ModelSource,
    RunConfig,
    SFTConfig,
    UsageError,
)
from jlrm.data.worlds import toy
from jlrm.model import lora, qwen
from jlrm.runtime import commands
from jlrm.runtime.mesh import training_layout
from jlrm.runtime.settings import to_dict
from jlrm.weights import adapters, checkpoint, hf, hf_config
from jlrm.weights.source import as_computed, fingerprint, read_params

pytestmark = pytest.mark.slow  # whole models are written and read

KINDS = {
    "lora": LoRAConfig(rank=3, alpha=5.0),
    "some": LoRAConfig(rank=2, alpha=3.0, targets=["q", "o", "down"], rank_stabilised=True),
    "dora": LoRAConfig(rank=3, alpha=5.0, magnitude=True),
}
ATTENTION = ["q", "k", "v", "o"]
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


@pytest.fixture
def peft(torch):
    try:
        import peft
    except ImportError:
        required("JLRM_REQUIRE_PEFT", "peft is not installed")
    return peft


def layout() -> Any:
    return training_layout(mesh_of(1, 1, 1))


def randomised(tree: Any, seed: int) -> Any:
    """Return weights of which none is zero or one any more."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + (0.2 * rng.normal(size=x.shape)).astype(np.float32), tree)


def write_base(directory: pathlib.Path, architecture: str) -> pathlib.Path:
    model = tiny_config(architecture)
    params = randomised(qwen.init(model, layout(), 0), 1)
    toy.save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(hf_config.config_to_hf(model, "float32")))

    def read(tensor: hf.Tensor) -> np.ndarray:
        leaf: Any = params
        for name in tensor.path.split("."):
            leaf = leaf[name]
        return np.asarray(leaf[tensor.index])

    list(hf.save_tensors(read, model, directory, "float32"))
    return directory


def config_of(run: pathlib.Path, base: pathlib.Path, settings: LoRAConfig, **more: Any) -> Config:
    source = ModelSource(path=str(base), compute_dtype="float32", **more)
    data, sft = DataConfig(train="toy", prompt="toy"), SFTConfig(steps=1)
    return Config(RunConfig(dir=str(run)), data, source, settings, sft=sft)


def write_run(
    tmp_path: pathlib.Path, kind: str, architecture: str = "qwen2_tied", scores: int = 0
) -> pathlib.Path:
    """Write a run of adapters as training leaves it, with adapters that change everything."""
    base, run = write_base(tmp_path / "base", architecture), tmp_path / "run"
    config = config_of(run, base, KINDS[kind])
    hf.copy_side_files(base, run / "model")
    model = as_computed(config, hf_config.read_config(base), "float32")
    plain = read_params(str(base), dataclasses.replace(model, lora=None), layout())
    born = qwen.adapters_program(model, layout())(jax.random.key(0), plain)
    stage = "reward_model" if scores else "sft"
    meta = {"stage": stage, "step": 0, "config": to_dict(config), "evaluation": {}}
    if scores:
        born["score"] = jnp.zeros((model.hidden_size, scores), jnp.float32)
    meta["made_from"] = {"base": fingerprint(str(base))}
    checkpoint.save_params(run, stage, randomised(born, 2), meta)
    return run


def our_logits(source: pathlib.Path, side: pathlib.Path) -> np.ndarray:
    model = hf_config.read_config(side, compute_dtype="float32")
    return logits(model, read_params(str(source), model, layout()))


def logits(model: qwen.QwenConfig, params: Any) -> np.ndarray:
    tokens = jnp.asarray(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states = plain_states(model, layout(), params, tokens, positions, positions >= 0)
    return np.asarray(states @ qwen.head(model, params).T)


def their_logits(torch: Any, model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen2_untied", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_exports_say_what_the_run_says(torch, peft, tmp_path, kind, architecture):
    from transformers import AutoModelForCausalLM

    run = write_run(tmp_path, kind, architecture)
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "whole"), "--dtype", "float32"])
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "adapter"), "--adapter"])
    wanted = our_logits(run, run / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    unmoved = their_logits(torch, base)
    moved = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(their_logits(torch, whole), wanted, atol=1e-5 * scale)
    np.testing.assert_allclose(their_logits(torch, moved), wanted, atol=1e-5 * scale)
    np.testing.assert_allclose(our_logits(tmp_path / "whole", run / "model"), wanted, atol=1e-4)
    assert np.max(np.abs(unmoved - wanted)) > 0.1 * scale, "the adapters do nothing"


def test_a_reward_model_of_adapters_scores_alike_in_peft(torch, peft, tmp_path):
    from transformers import AutoModelForSequenceClassification

    run = write_run(tmp_path, "dora", scores=1)
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "whole"), "--dtype", "float32"])
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "adapter"), "--adapter"])
    model = hf_config.read_config(run / "model", compute_dtype="float32")
    model = dataclasses.replace(model, num_labels=1)
    params = read_params(str(run), model, layout())
    tokens = jnp.asarray(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states = plain_states(model, layout(), params, tokens, positions, positions >= 0)
    wanted = np.asarray(qwen.scores(params, states[:, -1:]))[:, 0]
    read = AutoModelForSequenceClassification.from_pretrained
    base = read(tmp_path / "base", num_labels=1, dtype=torch.float32)
    moved = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for each in (moved, read(tmp_path / "whole", dtype=torch.float32)):
        each.config.pad_token_id = -1  # no token of these texts
        found = their_logits(torch, each)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.max(np.abs(wanted)))


@pytest.mark.parametrize(
    ("base", "architecture"),
    [("int8", "qwen2_tied"), ("nf4", "qwen2_tied"), ("nf4", "qwen3_moe")],
)
def test_a_quantised_base_is_exported_as_what_it_stands_for(
    tmp_path, base, architecture, monkeypatch
):
    targets = ATTENTION if architecture == "qwen3_moe" else KINDS["dora"].targets
    narrow = dataclasses.replace(KINDS["dora"], base=base, targets=targets)
    monkeypatch.setitem(KINDS, "narrow", narrow)
    run = write_run(tmp_path, "narrow", architecture)
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "whole"), "--dtype", "float32"])
    wanted = our_logits(run, run / "model")
    found = our_logits(tmp_path / "whole", run / "model")
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_peft_writes_is_a_start(torch, peft, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    base, settings = write_base(tmp_path / "base", "qwen3"), KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    names |= {"o": "self_attn.o_proj"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    asked = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rank_stabilised,
        use_dora=settings.magnitude,
        target_modules=[names[target] for target in settings.targets],
        task_type="CAUSAL_LM",
    )
    moved = peft.get_peft_model(model, asked)
    torch.manual_seed(0)
    for name, parameter in moved.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    moved.save_pretrained(tmp_path / "adapter")
    wanted = their_logits(torch, moved)
    more = {"adapter": str(tmp_path / "adapter")}
    for rank in (settings.rank, 0):  # to go on from, and merged
        config = config_of(tmp_path / "r", base, dataclasses.replace(settings, rank=rank), **more)
        model = as_computed(config, hf_config.read_config(base), "float32")
        params = adapters.read_start(config, model, layout())
        if rank:
            plain = dataclasses.replace(model, lora=None)
            params = lora.join(read_params(str(base), plain, layout()), params)
        found = logits(model, params)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.max(np.abs(wanted)))


def test_adapters_of_experts_are_refused_by_name(tmp_path, monkeypatch):
    settings = dataclasses.replace(KINDS["lora"], targets=ATTENTION)
    monkeypatch.setitem(KINDS, "attention", settings)
    run = write_run(tmp_path, "attention", "qwen3_moe")
    export.export_adapter(str(run), tmp_path / "adapter")
    config = config_of(tmp_path / "r", tmp_path / "base", settings, adapter=f"{tmp_path}/adapter")
    model = as_computed(config, hf_config.read_config(tmp_path / "base"), "float32")
    assert adapters.read_start(config, model, layout())  # of attention alone
    held = load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    name = f"{adapters.PREFIX}model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"
    save_file({**held, name: held[sorted(held)[0]]}, tmp_path / "adapter" / adapters.WEIGHTS)
    with pytest.raises(UsageError, match=r"experts\.0\.gate_proj\.lora_A\.weight is unknown"):
        adapters.read_start(config, model, layout())


def test_an_adapter_of_another_kind_is_refused_by_name(tmp_path, capsys):
    run = write_run(tmp_path, "lora")
    export.export_adapter(str(run), tmp_path / "adapter")
    model = hf_config.read_config(tmp_path / "base")
    held = load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    fields = json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())

    def refused(settings: LoRAConfig = KINDS["lora"], change: Any = None, **told: Any) -> str:
        changed = dict(held)
        if change:
            change(changed)
        save_file(changed, tmp_path / "adapter" / adapters.WEIGHTS)
        (tmp_path / "adapter" / adapters.CONFIG).write_text(json.dumps({**fields, **told}))
        more = {"adapter": str(tmp_path / "adapter")}
        config = config_of(tmp_path / "r", tmp_path / "base", settings, **more)
        with pytest.raises(UsageError) as error:
            adapters.read_start(config, as_computed(config, model, "float32"), layout())
        return str(error.value)

    first = sorted(held)[0]
    assert "rank=3" in refused(KINDS["some"]) and "rank=2" in refused(KINDS["some"])
    assert "rank_pattern" in refused(rank_pattern={"q_proj": 4})
    assert "IA3" in refused(peft_type="IA3")
    assert f"{first} is missing" in refused(change=lambda each: each.pop(first))
    assert "other is unknown" in refused(change=lambda each: each.update(other=held[first]))
    broken = {first: np.full_like(held[first], np.nan)}
    assert "NaN" in refused(change=lambda each: each.update(broken))
    cut = {first: held[first][:2]}
    assert "does not fit" in refused(change=lambda each: each.update(cut))
    (tmp_path / "adapter" / adapters.WEIGHTS).write_bytes(b"nothing")
    config = config_of(tmp_path / "r", tmp_path / "base", KINDS["lora"])
    with pytest.raises(UsageError, match="can't be read as an adapter"):
        adapters.read(tmp_path / "adapter", as_computed(config, model, "float32"), layout())

    with pytest.raises(UsageError, match=r"model\.adapter=.* is no directory of PEFT"):
        adapters.digest(tmp_path / "nowhere")

    checkpoint.save_params(tmp_path / "full", "sft", {"layers": {}, "x": jnp.ones(2)}, {})
    argv = ["--checkpoint", str(tmp_path / "full"), "--out", str(tmp_path / "o"), "--adapter"]
    assert commands.run(lambda: export.main(argv)) == 2
    assert "has no adapters" in capsys.readouterr().err
