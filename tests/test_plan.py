"""The planner: counts against programs of known cost, memory against what is known to be held."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, tpu_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jlrm import plan
from jlrm.config import UsageError
from jlrm.model import qwen
from jlrm.planning import counting, duration, figures, memory, page, phases, slice_plan, slices
from jlrm.planning.slices import GIB, Compiled
from jlrm.reports import charts, contracts
from jlrm.rl.distribution import Distribution
from jlrm.runtime import commands
from jlrm.runtime.mesh import create_mesh, training_layout
from jlrm.runtime.settings import from_dict
from jlrm.sampling.sampler import SamplerSettings
from jlrm.weights import hf_config

SETTINGS = {
    "model": {"preset": "toy", "tokenizer": "toy"},
    "data": {"train": "nowhere.jsonl", "max_prompt_tokens": 16},
    "sampling": {"max_new_tokens": 8, "eval_batch_size": 4},
    "grpo": {"steps": 1, "prompts": 4, "rollouts": 2, "loss": {"kl_weight": 0.001}},
}


@pytest.fixture
def mesh():
    """Four chips that are not here."""
    return tpu_mesh("v5e:2x2", 1, 2, 2)


def counts(mesh, function, *arguments, slice_devices=0, **assumed):
    compiled = jax.jit(function).lower(*arguments).compile()
    return counting.analyse(compiled.as_text(), assumed, slice_devices)


def array(mesh, spec, *shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def settings(run_dir, **sections):
    tree = {"run": {"dir": str(run_dir)}, **SETTINGS}
    return {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}


# --- Counting ---


@pytest.mark.slow
def test_loops_count_as_often_as_they_run(mesh):
    """Five turns in each of three: products of 256 rows on a chip, 512 x 512."""

    def nested(x, weights):
        def outer(x, w):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0], None

        return jax.lax.scan(outer, x, weights)[0]

    x = array(mesh, P(("fsdp", "tensor")), 1024, 512)
    found = counts(mesh, nested, x, array(mesh, P(), 3, 512, 512)).total
    assert found.flops == 3 * 5 * 2 * 256 * 512 * 512
    assert found.unknown_loops == 0
    # Each weight is read from HBM as a slice of the stack, and never the whole stack at a time.
    weights = 3 * 512 * 512 * 2
    assert weights <= found.bytes < 3 * weights


def test_a_loop_that_data_end_runs_as_often_as_is_assumed(mesh):
    def repeated(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

    arguments = array(mesh, P(), 512, 512), array(mesh, P(), dtype=jnp.int32)
    one = 2 * 512**3
    found = counts(mesh, repeated, *arguments, **{"/while": [7]})
    assert found.total.flops == 7 * one and found.total.unknown_loops == 0
    assert [turns for turns, _ in found.loops] == [7] and found.loops[0][1].flops == one
    found = counts(mesh, repeated, *arguments)
    assert found.total.flops == one and found.total.unknown_loops == 1 and not found.loops


def test_a_batch_of_products(mesh):
    """Which a TPU runs as a convolution along a dilated dimension."""

    def batched(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    x = array(mesh, P(), 8, 256, 384)
    assert counts(mesh, batched, x, array(mesh, P(), 8, 384, 128)).total.flops == (
        8 * 2 * 256 * 384 * 128
    )


def test_collectives_by_kind_and_bytes(mesh):
    def exchange(x):
        gathered = jax.lax.all_gather(x, ("fsdp", "tensor"), axis=0, tiled=True)
        summed = jax.lax.psum(x * 2, ("fsdp", "tensor"))
        return gathered, summed

    axes = P(("fsdp", "tensor"))
    both = jax.shard_map(exchange, mesh=mesh, in_specs=axes, out_specs=(P(), P()), check_vma=False)
    found = counts(mesh, both, array(mesh, axes, 1024, 512)).total.collectives
    assert found["all-gather"] == {"count": 1, "ici_bytes": 1024 * 512 * 2, "dcn_bytes": 0}
    assert found["all-reduce"]["ici_bytes"] == 256 * 512 * 2


def test_what_goes_between_slices_is_dcn():
    tpu_mesh("v5e:2x2", 1, 2, 2)  # skips where there is no libtpu
    devices = np.array(slices.devices("v5e:2x2", 2)).reshape(2, 4)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    total = jax.shard_map(
        lambda x: (jax.lax.psum(x, "data"), jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)),
        mesh=mesh,
        in_specs=P(("data", "fsdp")),
        out_specs=(P("fsdp"), P("data")),
        check_vma=False,
    )
    x = array(mesh, P(("data", "fsdp")), 2048, 512)
    found = counts(mesh, total, x, slice_devices=4).total.collectives
    assert found["all-reduce"] == {"count": 1, "ici_bytes": 0, "dcn_bytes": 256 * 512 * 2}
    assert found["all-gather"]["ici_bytes"] == 1024 * 512 * 2
    assert found["all-gather"]["dcn_bytes"] == 0


# --- Running out of memory ---


@pytest.mark.parametrize("generation", list(slices.GENERATIONS))
def test_limits_are_the_compilers(generation):
    tpu_mesh("v5e:2x2", 1, 2, 2)
    names = slices.GENERATIONS[generation].slices
    topology = f"{generation}:{next(iter(names))}"
    devices = slices.devices(topology)
    assert len(devices) == names[topology.partition(":")[2]]
    mesh = Mesh(np.array(devices), ("x",))
    x = array(mesh, P("x"), len(devices) * 400, 2**14, 2**14, dtype=jnp.float32)
    program = jax.jit(lambda x: x + 1)
    found = slices.compile_program(program, (x,), {})
    assert found.needed == found.peak == 800 * GIB
    limit = slices.GENERATIONS[generation].hbm_gib
    # Versions of the compiler differ in the last digit; the least of them is ours.
    assert any(f"({size:.2f}G)" in found.note for size in (limit, limit + 0.01))


# --- Phases ---


def make_phases(mesh, tmp_path, **grpo):
    config = from_dict(settings(tmp_path, grpo=grpo))
    model = tiny_config(compute_dtype="bfloat16", vocab_size=128, head_dim=8)
    return phases.plan(config, model, mesh), slices.shard_bytes(
        qwen.abstract_params(model, training_layout(mesh))
    )


def beside(planned, phase, program):
    return next(p.beside for p in planned.phases[phase] if p.program == program)


@pytest.mark.slow
def test_what_is_held_beside_each_program(mesh, tmp_path):
    planned, weights = make_phases(mesh, tmp_path, ahead="none")
    assert planned.programs["update"].kinds[memory.WEIGHTS] == weights
    moments = planned.programs["update"].kinds[memory.MOMENTS]
    assert 2 * weights <= moments < 2 * weights + 64  # and a count of steps
    during = beside(planned, "rollout", "rollout")
    assert during[memory.WEIGHTS] == weights and during[memory.MOMENTS] == moments
    # Weights in half the precision, norm scales as they are.
    assert 0.5 * weights <= during[memory.REFERENCE] < 0.6 * weights
    assert beside(planned, "update", "update").keys() == {memory.REFERENCE, memory.BATCH}
    resumed = [p.beside for p in planned.phases["load"] if p.program == "freeze"]
    assert resumed[1] == {memory.WEIGHTS: weights, memory.MOMENTS: moments}


@pytest.mark.slow
def test_the_reference_counts_only_with_a_kl_weight(mesh, tmp_path):
    planned, _ = make_phases(mesh, tmp_path, loss={"kl_weight": 0.0})
    assert not {"freeze", "logprobs_reference"} & planned.programs.keys()
    for points in planned.phases.values():
        assert all(memory.REFERENCE not in point.beside for point in points)
    with_it, _ = make_phases(mesh, tmp_path)
    difference = with_it.resident - planned.resident
    assert difference == beside(with_it, "update", "update")[memory.REFERENCE] > 0


@pytest.mark.slow
def test_what_is_sent_off_ahead_is_held_too(mesh, tmp_path):
    by_ahead = {}
    for ahead, more in (("none", {}), ("next", {}), ("stale", {"loss": {"importance_cap": 2.0}})):
        planned, _ = make_phases(mesh, tmp_path, ahead=ahead, **more)
        by_ahead[ahead] = planned
        held = beside(planned, "rollout", "rollout")
        assert (memory.LAID_OUT in held) == (ahead != "none")
        assert (memory.BATCH in held) == (ahead == "stale")
        assert (memory.LAID_OUT in beside(planned, "update", "update")) == (ahead == "next")
    assert "logprobs_policy" in by_ahead["stale"].programs
    assert "logprobs_policy" not in by_ahead["next"].programs


def test_turns_of_decoding():
    settings = SamplerSettings(Distribution(), 2048, (), 0)
    assert memory.decode_turns(settings, 8) == [512, 512, 1023]
    waves = dataclasses.replace(settings, max_new_tokens=100, num_slots=2)
    assert memory.decode_turns(waves, 8) == [399]


# --- The command ---


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan of everything that a run with GRPO alone compiles, of one layer."""
    tpu_mesh("v5e:2x2", 1, 2, 2)
    directory = tmp_path_factory.mktemp("plan")
    model = tiny_config(compute_dtype="bfloat16", vocab_size=128, num_hidden_layers=1)
    (directory / "model").mkdir()
    fields = hf_config.config_to_hf(model, "float32")
    (directory / "model" / "config.json").write_text(json.dumps(fields))
    source = {"preset": "", "path": str(directory / "model"), "tokenizer": ""}
    tree = settings(directory, model=source, mesh={"fsdp": 2, "tensor": 2})
    (directory / "plan.yaml").write_text(json.dumps(tree))
    return directory


@pytest.mark.slow
def test_the_command(planned, capsys):
    arguments = ["--config", str(planned / "plan.yaml"), "--topology", "v5e:2x2", "--json"]
    code = commands.run(lambda: plan.main([*arguments, "--out", str(planned / "out")]))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads(printed.out)
    assert found["fits"] is True and found["topology"] == "v5e:2x2"
    assert found["limit_gib"] == 15.75
    assert found["peak_gib"] == max(phase["peak_gib"] for phase in found["phases"].values())
    assert found["usable_gib"] == pytest.approx(0.92 * 15.75)
    assert found["versions"] == slices.versions(is_tpu=True)
    assert found["host"]["chips"] == 4 and found["host"]["limit_gib"] == pytest.approx(178.8, 1e-3)
    names = ["init_optimizer", "freeze", "lay_out", "rollout", "logprobs_reference", "update"]
    assert [*found["programs"]] == [*names, "evaluation"] and not found["not_compiled"]
    keys = {"argument_gib", "temp_gib", "peak_gib", "flops", "bytes", "collectives", "compile_s"}
    for name, program in found["programs"].items():
        assert keys <= program.keys(), name
        assert program["unknown_loops"] == 0, name
        assert f"{name}: compiling" in printed.err
    phase, update = found["phases"]["update"], found["programs"]["update"]
    assert phase["peak_gib"] > update["peak_gib"]  # by what is held beside it
    assert phase["peak_gib"] == pytest.approx(sum(phase["kinds_gib"].values()))
    code = sum(program["code_gib"] for program in found["programs"].values())
    assert code == pytest.approx(phase["kinds_gib"]["programs"]) and code > 0
    held = phase["kinds_gib"]["master weights"] + phase["kinds_gib"]["optimiser"]
    assert found["host"]["phases_gib"]["checkpoint"] == pytest.approx(4 * held)
    rollout = found["programs"]["rollout"]
    assert rollout["decode_step"]["steps"] == 7  # the first of 8 tokens comes of the prompt
    whole = rollout["prefill"]["flops"] + 7 * rollout["decode_step"]["flops"]
    assert rollout["flops"] == pytest.approx(whole)
    assert {path.name for path in (planned / "out").iterdir()} == {
        "plan.json",
        "plan.md",
        "plan.png",
        "plan.html",
    }
    assert json.loads((planned / "out" / "plan.json").read_text()) == found
    assert "| update |" in (planned / "out" / "plan.md").read_text()
    read = figures.read_plan(planned / "out" / "plan.json")
    assert contracts.encode(read) == found and found["version"] == 1
    assert "Fits: " in page.describe(read)
    text = (planned / "out" / "plan.html").read_text()
    assert page.verdict(read) in text and "https://" not in text
    assert f"update: {phase['peak_gib']:.2f}" in text  # told to those who can't see the chart
    cells = "".join(f"<td>{charts.short(phase[n])}</td>" for n in ("resident_gib", "peak_gib"))
    assert f'<th scope="row">update</th>{cells}' in text


def run(capsys, *arguments):
    code = commands.run(lambda: plan.main(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.slow
def test_what_does_not_fit_ends_with_1(mesh, tmp_path, capsys):
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(settings(tmp_path, model={"preset": "qwen2.5-7b"})))
    code, out, error = run(capsys, "--config", str(file), "--topology", "v5e:2x2", "--json")
    found = json.loads(out)
    assert code == 1 and not found["fits"] and found["peak_gib"] > found["limit_gib"]
    assert "update" in found["not_compiled"]
    by = found["peak_gib"] - found["usable_gib"]
    assert f"Does not fit, by {by:.2f} GiB" in error


@pytest.mark.slow
def test_a_refused_program_does_not_fit(mesh, tmp_path):
    made, _ = make_phases(mesh, tmp_path, ahead="none")
    refused = Compiled(0, 0, 0, 0, 0, 20 * GIB, None, 1.0, None)
    point = made.phases["update"][0]
    program, kinds, own = slice_plan._moment(point, made, {"update": refused}, {memory.CODE: GIB})
    assert program == "update"
    assert sum(kinds.values()) == 21 * GIB + sum(point.beside.values())
    assert own < 20 * GIB


@pytest.mark.slow
def test_the_headroom_decides_what_fits(planned, capsys):
    """The same plan, with all but a sliver of the memory to stay free."""
    arguments = ["--config", str(planned / "plan.yaml"), "--topology", "v5e:2x2"]
    code, out, error = run(capsys, *arguments, "--headroom", "0.9999")
    assert code == 1 and "Does not fit" in error and "(0 % of 15.75)" in out


@pytest.mark.slow
def test_the_machine_at_hand(planned, capsys):
    """Its CPU devices share its memory; nothing is counted in programs for a CPU."""
    arguments = ["--config", str(planned / "plan.yaml"), "--topology", "here", "mesh.data=2"]
    code, out, error = run(capsys, *arguments, "--json")
    assert code == 0, error
    found = json.loads(out)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert found["limit_gib"] == pytest.approx(total / 8, 0.05)
    assert found["devices"] == 8 and found["versions"] == {"jax": jax.__version__}
    assert "host" not in found and "duration" not in found
    update = found["programs"]["update"]
    assert update["flops"] is None and update["temp_gib"] > 0


def test_a_run_that_can_not_fit_is_doubted_at_its_start(tmp_path, monkeypatch):
    config = from_dict(settings(tmp_path))
    model = tiny_config(vocab_size=128, head_dim=8)
    mesh = create_mesh(config.mesh, jax.devices()[:1])
    assert slice_plan.doubt(config, model, mesh) == ""
    planned = phases.plan(config, model, mesh)
    state = planned.programs["update"].kinds
    needed = state[memory.WEIGHTS] * 2 + state[memory.MOMENTS]
    monkeypatch.setattr(slice_plan.machine, "device_free", lambda device: needed // 2)
    said = slice_plan.doubt(config, model, mesh)
    assert "it is going to run out of memory" in said and "jlrm plan --topology here" in said
    monkeypatch.setattr(slice_plan.machine, "device_free", lambda device: 2 * needed)
    assert slice_plan.doubt(config, model, mesh) == ""


def test_another_libtpu_than_jax_runs_with_is_said(monkeypatch, capsys):
    monkeypatch.setattr(slices, "pinned", lambda: "0.0.1")
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    slices.prepare()
    assert "this JAX runs with libtpu 0.0.1" in capsys.readouterr().err


# --- How long, how much ---


def counted(seconds):
    """A program whose lower bound is so many seconds."""
    numbers = dict.fromkeys(("argument_gib", "temp_gib", "output_gib", "peak_gib"), 0.0)
    bounds = {"flops": seconds, "bytes": seconds / 2}
    return figures.ProgramPlan(
        **numbers,
        flops=0.0,
        bytes=0.0,
        collectives={},
        compile_s=0.0,
        assumed="",
        note="",
        lower_bound_s=bounds,
    )


def test_the_estimate_adds_up(tmp_path):
    tree = settings(
        tmp_path,
        grpo={"steps": 100, "epochs": 2, "minibatches": 2, "prompts": 4},
        data={"train": "nowhere.jsonl", "eval_rows": 10},
    )
    config = from_dict({**tree, "run": {**tree["run"], "eval_every": 25}})
    names = ("lay_out", "rollout", "logprobs_reference", "logprobs_policy", "update", "evaluation")
    programs = {name: counted(10.0**i) for i, name in enumerate(names)}
    found = duration.estimate(config, programs, 10, 8, 50, 1.5)
    least, most = duration.BOUNDS
    step = 1 + 10 + 2 * 100 + 2 * 1000 + 4 * 1e4  # minibatches, and epochs of them
    assert found.steps == {"grpo": 50}
    assert found.step_s["grpo"] == pytest.approx((step * least, step * most))
    judging = 1 + 5 * 1e5  # 20 games in batches of 4, after 25 steps and after 50
    hours = (50 * step + 2 * judging) / 3600
    assert found.hours == pytest.approx((hours * least, hours * most))
    assert found.dollars == pytest.approx([8 * 1.5 * each for each in found.hours])
    uncounted = {**programs, "update": dataclasses.replace(counted(1.0), lower_bound_s=None)}
    assert duration.estimate(config, uncounted, 10, 8) is None


def test_a_step_of_decoding_takes_longer_by_its_layers(tmp_path):
    config = from_dict(settings(tmp_path, grpo={"steps": 1}))
    programs = {name: counted(0.0) for name in ("lay_out", "update", "evaluation")}
    work = {"flops": 0.0, "bytes": 0.0, "collectives": {}, "compiler_estimate_cycles": 0.0}
    programs["rollout"] = dataclasses.replace(
        counted(5.0),
        prefill=figures.Work(**work, lower_bound_s={"flops": 1.0}),
        decode_step=figures.DecodeStep(**work, lower_bound_s={"flops": 0.1}, steps=30),
    )
    found = duration.estimate(config, programs, 10, 8)
    layers = 30 * 10 * duration.LAYER_S[0]
    assert found.step_s["grpo"][0] == pytest.approx(1.0 * duration.BOUNDS[0] + 4.0 + layers)
    assert found.dollars is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v5e:4x5"], "Did you mean 'v5e:4x8'?"),
        (["--topology", "v5e:2x2", "--slices", "0"], "at least 1"),
        ([], "Name a slice"),
        (["--search", "v9"], "name one of v4, v5e"),
        (["--topology", "v5e:2x2", "mesh.fsdp=1", "mesh.tensor=4"], "does not divide"),
    ],
)
def test_mistakes_end_with_2(mesh, planned, capsys, arguments, says):
    code, _, error = run(capsys, "--config", str(planned / "plan.yaml"), *arguments)
    assert code == 2 and says in error


@pytest.mark.parametrize(("flag", "value"), [("--headroom", "1"), ("--steps", "0")])
def test_numbers_out_of_range_end_with_2(planned, capsys, flag, value):
    arguments = ["--config", str(planned / "plan.yaml"), "--topology", "v5e:2x2", flag, value]
    with pytest.raises(SystemExit) as ended:
        plan.main(arguments)
    assert ended.value.code == 2 and f"{value} must be at least" in capsys.readouterr().err


def test_a_search_tries_meshes_near_a_square_first(mesh, tmp_path):
    config = from_dict(settings(tmp_path, model={"preset": "qwen2.5-7b"}))
    tried = list(plan._settings(config, "v5e:4x4", 1))
    assert tried[0] == ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=4"]
    assert tried[1] == ["mesh.data=1", "mesh.fsdp=8", "mesh.tensor=2"]
    with pytest.raises(UsageError):
        slices.find("v5e:5x5")
