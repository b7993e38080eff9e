"""The benchmark: its arithmetic against hand counts, masks and programs, and the command itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_config

from jlrm import bench
from jlrm.bench import Times
from jlrm.config import UsageError
from jlrm.model import qwen
from jlrm.planning import costs
from jlrm.planning.costs import BatchSizes, Cost
from jlrm.planning.figures import BenchResult
from jlrm.reports import contracts
from jlrm.runtime import commands
from jlrm.runtime.mesh import rollout_layout
from jlrm.runtime.settings import load
from jlrm.sampling import decode
from jlrm.training import packing
from jlrm.training.packing import Group
from jlrm.weights import hf_config
from jlrm.weights.presets import preset

MODEL = tiny_config(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)
# By hand: q 4x4, k and v 4x2, o 4x4, three of 4x8; the head 10x4.
LAYER, HEAD = 16 + 2 * 8 + 16 + 3 * 32, 40
BATCH = BatchSizes(prompts=(3, 5), rollouts=4, new_tokens=6)
SETTINGS = {
    "model": {"preset": "toy", "tokenizer": "toy", "compute_dtype": "float32"},
    "data": {"train": "nowhere.jsonl", "max_prompt_tokens": 16},
    "sampling": {"max_new_tokens": 6, "slots": 2},
    "grpo": {"steps": 1, "prompts": 4, "rollouts": 4, "minibatches": 2, "epochs": 2},
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text(json.dumps({"run": {"dir": str(tmp_path / "run")}, **SETTINGS}))
    return str(path)


def write_model(directory, model):
    """Write what there is of a Hugging Face directory that bench reads."""
    directory.mkdir()
    fields = hf_config.config_to_hf(model, "float32")
    (directory / "config.json").write_text(json.dumps(fields))


def test_forward_flops_by_hand():
    assert costs.layer_weights(MODEL) == LAYER == 144
    assert costs.forward_flops(MODEL, 1, 0, 0) == 3 * 2 * LAYER
    assert costs.forward_flops(MODEL, 0, 1, 0) == 3 * 2 * (2 * 2 + 2 * 2)  # 2 heads: q·k, w·v
    assert costs.forward_flops(MODEL, 0, 0, 1) == 2 * HEAD
    assert costs.forward_flops(MODEL, 5, 15, 2) == 3 * (1440 + 240) + 160


def test_of_experts_those_count_that_tokens_choose():
    experts = dataclasses.replace(MODEL, num_experts=8, num_experts_per_tok=2)
    attention, expert, router = 16 + 2 * 8 + 16, 3 * 32, 4 * 8
    assert costs.layer_weights(experts) == attention + 8 * expert + router
    assert costs.forward_flops(experts, 5, 0, 0) == 3 * 2 * 5 * (attention + 2 * expert + router)
    # Two tokens choose 2 + 2 x 6/8 experts on average, and many choose all: weights to be read.
    assert costs.layer_weights(experts, 2) == attention + 3.5 * expert + router
    assert costs.layer_weights(experts, 300) == attention + 8 * expert + router
    prefill, step = costs.rollout_costs(experts, BatchSizes((3,), 1, 2))
    size = costs.layer_weights(experts, 3) * 3 + HEAD
    assert prefill.bytes == 4 * size
    assert step.bytes == 4 * (3 * costs.layer_weights(experts, 1) + HEAD) + 48 * (3 + 1)


def test_tokens_and_pairs_are_those_that_packed_rows_run_and_see():
    """Rows of several groups, so that prompts stand apart from their completions."""
    rng = np.random.default_rng(0)
    completions = rng.integers(0, 9, (BATCH.rollouts, BATCH.new_tokens)).tolist()
    groups = [Group(rng.integers(0, 9, n).tolist(), completions) for n in BATCH.prompts]
    packed = packing.pack(groups, [128], 1)
    group, start, prefix = (np.asarray(x)[0, 0] for x in packed.rows.packing)
    slots = np.arange(len(group))
    sees = (group[:, None] == group) & (group > 0)[:, None] & (slots <= slots[:, None])
    sees &= (slots < prefix) | (slots >= start[:, None])
    counts = int((group > 0).sum()), int(sees.sum()), int(packed.is_target.sum())
    assert costs.batch_flops(MODEL, BATCH) == costs.forward_flops(MODEL, *counts)


def test_tokens_of_both_layouts():
    assert BATCH.num_completion_tokens == 2 * 4 * 6
    assert BATCH.num_tokens == 8 + 48
    assert BATCH.num_plain_tokens == 4 * 8 + 48
    parts = BATCH.split(2)
    assert [part.prompts for part in parts] == [(3,), (5,)]
    assert sum(costs.batch_flops(MODEL, part) for part in parts) == costs.batch_flops(MODEL, BATCH)


@pytest.mark.parametrize("num_slots", [0, 4, 3, 1])
def test_a_rollout_computes_what_a_forward_pass_does_however_many_run_at_once(num_slots):
    found = costs.rollout_costs(MODEL, BATCH, num_slots)
    assert sum(cost.flops for cost in found) == costs.batch_flops(MODEL, BATCH)
    waves = math.ceil(4 / (num_slots or 4))
    assert len(found) == 1 + waves * (BATCH.new_tokens - 1)


def test_bytes_of_a_rollout_by_hand():
    """Of prefill the weights; of step i besides them the prompts once, and i tokens a rollout."""
    weights = 4 * (3 * LAYER + HEAD)
    token = 4 * 3 * 2 * 1 * 2  # float32, layers, keys and values, heads, width
    found = [cost.bytes for cost in costs.rollout_costs(MODEL, BATCH)]
    assert found == [weights, *(weights + token * (8 + 8 * i) for i in range(1, 6))]
    halved = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    assert [cost.bytes for cost in costs.rollout_costs(halved, BATCH)] == [x / 2 for x in found]


def test_bytes_of_an_update_by_hand():
    weights = 3 * LAYER + HEAD
    gradient, optimizer = costs.update_costs(MODEL, BATCH, moment_bytes=8)
    assert gradient == Cost(3 * costs.batch_flops(MODEL, BATCH), 3 * 4 * weights)
    assert optimizer == Cost(0, (4 + 2 * (4 + 8)) * weights)
    untied = dataclasses.replace(MODEL, tie_word_embeddings=False)
    assert costs.logprobs_costs(untied, BATCH)[0].bytes == 4 * (weights + HEAD)


def test_each_piece_takes_the_longer_of_its_two_times():
    pieces = [Cost(flops=100, bytes=10), Cost(flops=10, bytes=100)]
    assert costs.least_seconds(pieces, flops_rate=10, bytes_rate=100) == 10 + 1
    assert costs.least_seconds(pieces, flops_rate=100, bytes_rate=10) == 1 + 10


def product_flops(jaxpr) -> int:
    """Sum 2 x outputs x contracted over the matrix products of a program without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen3"])
def test_flops_are_those_of_the_products_in_the_program(architecture):
    """Prefill is unrolled. It computes masked pairs too; a gradient has two products for one."""
    model = tiny_config(architecture)
    layout = rollout_layout(mesh_of(1, 1, 1))
    params = jax.eval_shape(
        lambda: decode.decode_params(model, layout, qwen.init(model, layout, 0))
    )

    def loss(params, tokens):
        return jnp.sum(decode.prefill(model, layout, params, tokens)[0])

    tokens = jnp.zeros((2, 24), jnp.int32)
    wanted = costs.forward_flops(model, 2 * 24, 2 * 24 * 24, 0)
    assert product_flops(jax.make_jaxpr(loss)(params, tokens).jaxpr) == wanted
    assert product_flops(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr) == 3 * wanted


def test_figures_are_of_the_median():
    times = {phase: Times(9.0, [2.0, 1.0, 4.0], 7) for phase in (*bench.PHASES, bench.PREFILL)}
    times[bench.PREFILL].seconds = [0.5]
    phase_costs = {phase: [Cost(100, 10), Cost(0, 50)] for phase in bench.PHASES}
    counts = {phase: {"tokens": 6} for phase in bench.PHASES}
    limits = {"matmul_flops_per_second": 200.0, "read_bytes_per_second": 50.0}
    made = bench.figures(times, phase_costs, counts, limits)["rollout"]
    assert contracts.encode(made) == {
        "seconds": 2.0,
        "min_seconds": 1.0,
        "spread": 1.5,
        "tokens": 6,
        "tokens_per_second": 3.0,
        "flops": 100,
        "mfu": 0.25,
        "roofline_share": (0.5 + 1.0) / 2.0,
        "peak_bytes": 7,
        "compile_s": 7.0,
        "prefill_share": 0.25,
    }


def test_ratios_are_of_runs_that_followed_each_other():
    """Both took the same time in each pair but the last, whatever the machine did between."""
    one, other = (
        {phase: Times(0.0, seconds) for phase in bench.PHASES}
        for seconds in ([1.0, 10.0, 2.0], [1.0, 10.0, 1.0])
    )
    wanted = {"median": 1.0, "min": 1.0, "max": 2.0}
    assert contracts.encode(bench.ratios(one, other)) == dict.fromkeys(bench.PHASES, wanted)


def test_prompts_fill_half_to_all_of_the_width(config_file):
    for seed in range(5):
        settings = load(config_file, ["grpo.prompts=32", f"run.seed={seed}"])
        lengths = bench.draw_batch(settings).prompts
        assert max(lengths) == 16 and min(lengths) >= 8 and len(set(lengths)) > 4
        assert lengths == bench.draw_batch(settings).prompts


def numbers(part):
    for value in part.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif not isinstance(value, str):
            yield value


@pytest.mark.slow
def test_the_command_measures_and_compares(config_file, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    changed = {
        **SETTINGS,
        "grpo": {"steps": 1, "prompts": 4, "rollouts": 2, "loss": {"kl_weight": 0.0}},
    }
    other.write_text(json.dumps({"run": {"dir": str(tmp_path / "other")}, **changed}))
    one_layer = dataclasses.replace(preset("toy"), num_hidden_layers=1)
    write_model(tmp_path / "model", one_layer)
    small = ["model.preset=", f"model.path={tmp_path}/model", "sampling.max_new_tokens=5"]
    bench.main(["--config", config_file, "--compare", str(other), "--repeats=2", "--json", *small])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["rollout", "logprobs", "update", "machine", "compare", "version"]
    assert list(result["compare"]) == ["rollout", "logprobs", "update", "machine", "ratio"]
    assert all(0 <= x < math.inf for x in numbers(result))
    for part, phase in itertools.product((result, result["compare"]), bench.PHASES):
        found = part[phase]
        for name in ("seconds", "tokens_per_second", "flops", "peak_bytes", "compile_s"):
            assert found[name] > 0, (phase, name)
        assert 0 < found["mfu"] <= 1.5 and 0 < found["roofline_share"] <= 1.5
        assert found["mfu"] <= found["roofline_share"] * (1 + 1e-9)
    rollouts = [part["rollout"]["tokens"] for part in (result, result["compare"])]
    assert rollouts == [4 * 4 * 5, 4 * 2 * 5]
    for phase, epochs in (("logprobs", 1), ("update", 2)):
        found = result[phase]
        assert found["plain_tokens"] - found["tokens"] > 0 < found["padding"] < 1
        assert found["tokens"] == epochs * result["logprobs"]["tokens"]
    assert result["machine"]["num_devices"] == 8 and result["machine"]["platform"] == "cpu"
    for ratio in result["compare"]["ratio"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    read = contracts.decode(BenchResult, result, "bench.json")
    assert contracts.encode(read) == result
    text = bench.describe(read, [config_file, str(other)])
    assert f"Time of {other} over that of {config_file}" in text
    assert text.count("rollout") == 3 and "no data-sheet values" in text
    assert not (tmp_path / "run").exists()  # nothing is written


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["grpo.steps=0", "sft.steps=1"], "has grpo.steps=0"),
        (["--repeats", "0"], "--repeats 0"),
        (["mesh.fsdp=3"], "does not fit 8 devices"),
        (["mesh.tensor=8", "mesh.fsdp=1"], "does not divide the model's num_attention_heads=4"),
        (["model.preset=", "model.path=some/model"], "model.preset=qwen2.5-3b"),
        (["model.preset=toi"], "Did you mean 'toy'?"),
        (["grpo.rolouts=2"], "Did you mean 'rollouts'?"),
        (["--compare", "missing.yaml"], "missing.yaml"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(config_file, capsys, arguments, wanted):
    code = commands.run(lambda: bench.main(["--config", config_file, *arguments]))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and wanted in captured.err
    assert captured.err.count("\n") == 1


def test_help_tells_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config", "--compare", "--repeats", "--json", "section.key=value"):
        assert flag in text


def test_the_architecture_needs_no_network(config_file, tmp_path):
    def read(path: str):
        settings = load(config_file, ["model.preset=", f"model.path={path}", "model.remat=dots"])
        return bench.read_model(settings)

    numerics = {"compute_dtype": "float32", "remat": "dots"}
    hub = dataclasses.replace(preset("qwen2.5-3b"), **numerics)
    assert read("Qwen/Qwen2.5-3B-Instruct") == hub
    for path in ("meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"):
        shape = preset(path.partition("/")[2].lower().replace("-instruct", ""))
        assert read(path) == dataclasses.replace(shape, **numerics)
    write_model(tmp_path / "model", preset("toy"))
    assert read(str(tmp_path / "model")) == dataclasses.replace(preset("toy"), **numerics)
    with pytest.raises(UsageError, match="nothing is downloaded"):
        read("else/Qwen2.5-3B-Instruct")
