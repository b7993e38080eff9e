"""Checkpoints: what was saved is what is read, or the damage is named and nothing goes on."""

from __future__ import annotations

import dataclasses
import errno
import json
import pathlib
import random
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import mesh_of, tiny_config

from jlrm import export
from jlrm.config import OptimizerConfig, RunError, UsageError
from jlrm.data.worlds import toy
from jlrm.model import qwen
from jlrm.runtime import storage
from jlrm.runtime.mesh import training_layout
from jlrm.training import update
from jlrm.training.update import TrainState
from jlrm.weights import digests, file_list, hf_config, reading, steps
from jlrm.weights.checkpoint import Checkpoints

pytestmark = pytest.mark.slow  # what saves and checks steps is compiled

MODEL = tiny_config(vocab_size=toy.VOCAB_SIZE, num_hidden_layers=2)
ONE = training_layout(mesh_of(1, 1, 1))
OPTIMIZER = update.make_optimizer(OptimizerConfig(), 10)
ABSTRACT = update.abstract_state(MODEL, ONE, OPTIMIZER)
META = {"stage": "grpo", "step": 4, "position": 7, "config": {"run": {"resume": ""}}}
NUM_FLIPS = 60


def state_of(seed: int) -> TrainState:
    """A state in which no number is 0, moments included."""
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        values = rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else leaf.shape or 3
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, ABSTRACT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with two steps, the second of which has been evaluated."""
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, 2, 4)
    toy.save_tokenizer(run / "model")
    (run / "model/config.json").write_text(json.dumps(hf_config.config_to_hf(MODEL, "float32")))
    return run


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def opened(run: pathlib.Path, stage: str = "grpo", **options: Any) -> Checkpoints:
    given = {"keep_last": 5, "keep_best": 1, "metric": "agreement", **options}
    return Checkpoints(run, stage, **given)


def save(run: pathlib.Path, *wanted: int, stage: str = "grpo", **options: Any) -> None:
    series = opened(run, stage, **options)
    for step in wanted:
        series.save(step, state_of(step), META, {"agreement": 50.0 + step})
    series.wait()
    series.close()


def restored(run: pathlib.Path, **options: Any) -> tuple[int, TrainState, dict[str, Any]]:
    series = opened(run, **options)
    try:
        return series.restore_newest(ABSTRACT)
    finally:
        series.close()


def step_dir(run: pathlib.Path, step: int = 4) -> pathlib.Path:
    return run / "checkpoints/grpo" / str(step)


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ------------------------------------------------------------------ digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_digest_is_the_same_on_every_mesh_and_on_the_host(dtype):
    values = np.random.default_rng(0).normal(size=(2, 8, 24)).astype(jax.numpy.dtype(dtype))
    found = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(2, 2, 2), mesh_of(1, 8, 1)):
        spec = jax.sharding.PartitionSpec(None, ("data", "fsdp"), "tensor")
        array = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
        held, broken = digests.look({"params": {"layers": {"q": array}, "embed": array}})
        assert not broken
        found.append(held)
    assert found[0] == found[1] == found[2]
    assert digests.is_stored(values, (), found[0]["params.layers.q"])
    assert digests.is_stored(values[1], (1,), found[0]["params.layers.q"])
    assert not digests.is_stored(values[1], (0,), found[0]["params.layers.q"])
    assert digests.is_stored(values, (), found[0]["params.embed"])
    for other in ("float32", "bfloat16"):  # as it may be read elsewhere
        read = values.astype(jax.numpy.dtype(other))
        assert digests.of_array(read) == found[0]["params.embed"][other]


def test_every_bit_of_an_array_and_its_place_counts():
    values = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    whole = digests.of_array(values)
    for place in (0, 65_535, 65_536, 69_999):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert digests.of_array(flipped) != whole
    swapped = values.copy()
    swapped[[3, 66_000]] = swapped[[66_000, 3]]
    assert digests.of_array(swapped) != whole
    assert digests.of_array(-0.0 * values[:2]) != digests.of_array(0.0 * abs(values[:2]))


def test_small_numbers_and_halves_round_as_the_reader_rounds_them():
    """What lies between two bfloat16 numbers, and what a device would flush to zero."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x00000001, 0x80018000, 0x7F7F0000])
    values = bits.astype(np.uint32).view(np.float32)
    found, _ = digests.look({"params": {"x": jax.device_put(values)}})
    half = values.astype(jax.numpy.bfloat16)
    assert digests.of_array(half) == found["params.x"]["bfloat16"]
    assert digests.of_array(values) == found["params.x"]["float32"]


def test_json_is_known_by_what_it_says():
    sealed = digests.sealed({"a": 1, "b": [1.5, "x"]})
    assert digests.is_intact(json.loads(json.dumps(sealed, indent=3)))
    for broken in ({**sealed, "a": 2}, {**sealed, "c": 1}, {"seal": "x"}, [], None):
        assert not digests.is_intact(broken)


# ------------------------------------------------------------------ saved and read


def test_what_was_saved_comes_back_on_any_mesh_and_in_either_precision(run):
    step, state, meta = restored(run)
    assert step == 4 and meta == META
    assert_equal(state, state_of(4))
    many = training_layout(mesh_of(2, 2, 2))
    series = opened(run)
    abstract = update.abstract_state(MODEL, many, OPTIMIZER)
    assert_equal(series.restore_newest(abstract)[1], state_of(4))
    series.close()
    half = dataclasses.replace(MODEL, param_dtype="bfloat16")
    params = reading.restore_params(steps.find(str(run)), qwen.abstract_params(half, many))
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(x.dtype), params)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jax.numpy.bfloat16), state_of(4).params)
    assert_equal(wanted, rounded)


def test_an_old_step_goes_only_after_the_new_one_is_found_whole(run, monkeypatch):
    series = opened(run, keep_last=1, keep_best=0)
    series.save(6, state_of(6), META, None)
    monkeypatch.setattr(steps, "damage", lambda directory: "it is half")
    with pytest.raises(RunError, match=r"grpo/6 was saved and is not whole: it is half"):
        series.wait()
    assert not step_dir(run, 2).is_dir() and step_dir(run, 4).is_dir()
    monkeypatch.undo()
    series.wait()
    assert [path.name for path in step_dir(run).parent.glob("[0-9]*")] == ["6"]
    series.close()


def test_the_best_are_kept_beside_the_last(tmp_path):
    series = opened(tmp_path, keep_last=1, keep_best=1)
    for step, agreement in ((2, 60.0), (4, 50.0), (6, None)):
        metrics = None if agreement is None else {"agreement": agreement}
        series.save(step, state_of(step), META, metrics)
    series.wait()
    series.close()
    assert steps.saved_steps(tmp_path)["grpo"] == [2, 6]


@pytest.mark.parametrize("part", ["params", "moments"])
def test_numbers_that_are_not_finite_are_not_saved(run, part):
    state = state_of(6)
    if part == "params":
        state.params["layers"]["attn"]["q"] = (
            state.params["layers"]["attn"]["q"].at[0, 0].set(np.inf)
        )
    else:
        moments = jax.tree.map(lambda x: x * np.nan if x.ndim == 4 else x, state.opt_state)
        state = state._replace(opt_state=moments)
    series = opened(run)
    with pytest.raises(RunError, match=r"grpo step 6: .*\.q.* NaN or infinite") as told:
        series.save(6, state, META, None)
    series.close()
    assert f"model.path={run}@grpo/4 run.dir=NEW" in str(told.value)
    assert steps.saved_steps(run)["grpo"] == [2, 4]


def test_steps_of_older_programs_are_read_and_said_to_be_unchecked(run, caplog):
    for step in (2, 4):
        shutil.rmtree(step_dir(run, step) / "digests")
        (step_dir(run, step) / file_list.NAME).unlink()
        about = step_dir(run, step) / steps.ABOUT
        described = json.loads(about.read_text())
        del described["item_handlers"]["digests"]
        about.write_text(json.dumps(described))
    assert_equal(restored(run)[1], state_of(4))
    assert "grpo/4 carries no digests" in caplog.text


# ------------------------------------------------------------------ damage


def largest(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def drop(name: str) -> Any:
    return lambda step: shutil.rmtree(step / name)


def cut(step: pathlib.Path) -> None:
    file = largest(step / "params")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(step: pathlib.Path) -> None:
    (step / "params/manifest.ocdbt").write_bytes(b"")


def forget(step: pathlib.Path) -> None:
    shutil.rmtree(step / "params")
    (step / "params").mkdir()


def edit(step: pathlib.Path) -> None:
    (step / "meta/metadata").write_text(json.dumps({**META, "position": 8}))


def tear(step: pathlib.Path) -> None:
    (step / "metrics/metrics").write_text('{"agreem')


DAMAGE = {
    "no params": (drop("params"), "its item 'params' is missing or empty"),
    "no moments": (drop("opt_state"), "its item 'opt_state' is missing or empty"),
    "no digests": (drop("digests"), "its item 'digests' is missing or empty"),
    "no params' files": (forget, "its item 'params' is missing or empty"),
    "cut": (cut, r"params/.* has \d+ bytes, not \d+"),
    "an empty file": (empty, "manifest.ocdbt has 0 bytes, not"),
    "edited": (edit, r"meta/metadata has \d+ bytes|its item 'meta' is not what was saved"),
    "torn": (tear, "metrics/metrics has 8 bytes, not"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_step_is_named_and_skipped(run, kind, caplog):
    harm, said = DAMAGE[kind]
    harm(step_dir(run))
    with pytest.raises(UsageError, match=said) as told:
        opened(run)
    assert f"{step_dir(run)} is damaged" in str(told.value)
    assert "Nothing was trained" in str(told.value)
    assert "newest whole step is 2: run.resume=previous" in str(told.value)
    assert steps.find(str(run)).name == "2" and f"{step_dir(run)} is damaged" in caplog.text
    with pytest.raises(UsageError, match=r"grpo/4 is damaged.*Whole: 2\."):
        steps.find(f"{run}@4")
    if kind == "no moments":
        return
    step, state, _ = restored(run, resume="previous")
    assert step == 2 and (run / "checkpoints/set_aside/grpo-4").is_dir()
    assert_equal(state, state_of(2))
    assert restored(run)[0] == 2  # and so it stays


def test_without_sizes_a_file_without_content_is_noticed_all_the_same(run):
    (step_dir(run) / file_list.NAME).unlink()
    empty(step_dir(run))
    with pytest.raises(UsageError, match=r"params/manifest\.ocdbt is empty"):
        opened(run)


def test_damage_of_an_older_step_stops_nothing(run, caplog):
    (step_dir(run, 2) / "metrics/metrics").write_bytes(b"\xff")
    assert restored(run)[0] == 4
    assert "Step 2 is set aside" in caplog.text


def test_when_no_step_is_whole_nothing_begins_anew(run):
    for step in (2, 4):
        shutil.rmtree(step_dir(run, step) / "params")
    for resume in ("", "previous"):
        with pytest.raises(UsageError, match="No step before it is whole"):
            opened(run, resume=resume)
    with pytest.raises(UsageError, match=r"No checkpoint in .* is whole \(2: its item"):
        steps.find(str(run))


def test_a_save_that_did_not_finish_is_no_step(run, caplog):
    """As in a store, where a save has its final name from its beginning."""
    (step_dir(run) / steps.COMMITTED).unlink()
    assert steps.saved_steps(run) == {"grpo": [2]}
    assert steps.find(str(run)).name == "2"
    with pytest.raises(UsageError, match=r"no checkpoint '4'"):
        steps.find(f"{run}@4")
    assert "it has no commit_success.txt" in steps.damage(steps.absolute(step_dir(run)))
    assert restored(run)[0] == 2 and "its save did not finish" in caplog.text
    save(run, 4)
    assert restored(run)[0] == 4


def test_what_a_store_holds_is_unfinished_without_the_last_file():
    class Store(type(steps.absolute("x"))):
        def __str__(self) -> str:
            return f"gs://bucket{super().__str__()}"

    assert steps.is_unfinished(Store("/nowhere/checkpoints/grpo/4"))
    assert not steps.is_unfinished(steps.absolute("/nowhere/checkpoints/grpo/4"))


def flip_largest(step: pathlib.Path) -> None:
    """Change one bit of a weight without changing anything else that is stored."""
    file = largest(step / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("seen_in", ["the file", "the numbers"])
def test_a_flipped_byte_is_named_and_another_step_taken_only_if_asked_for(run, seen_in):
    flip_largest(step_dir(run))
    if seen_in == "the numbers":  # as where a store is trusted with large files
        (step_dir(run) / file_list.NAME).unlink()
    with pytest.raises(UsageError, match=r"grpo/4 is damaged: its item 'params'") as told:
        restored(run)
    assert "newest whole step is 2" in str(told.value)
    with pytest.raises(UsageError, match=r"grpo/4 is damaged: its item 'params'"):
        reading.restore_params(steps.find(str(run)), ABSTRACT.params)
    with pytest.raises(UsageError, match=r"grpo/4 is damaged: its item 'params'"):
        export.export_to_hf(str(run), run.parent / "out")
    assert not (run.parent / "out").exists()
    step, state, _ = restored(run, resume="previous")
    assert step == 2 and (run / "checkpoints/set_aside/grpo-4").is_dir()
    assert_equal(state, state_of(2))


def test_two_damaged_steps_leave_nothing_to_offer(run):
    for step in (2, 4):
        flip_largest(step_dir(run, step))
    with pytest.raises(UsageError, match=r"grpo/4 is damaged.*No step before it is whole"):
        restored(run)
    with pytest.raises(UsageError, match=r"grpo/2 is damaged.*No step before it is whole"):
        restored(run, resume="previous")


def test_a_step_that_is_asked_for_is_taken_once(run):
    asked = {"resume": "grpo/2"}
    assert restored(run, **asked)[0] == 2
    assert (run / "checkpoints/set_aside/grpo-4").is_dir()
    series = opened(run, **asked)
    series.save(4, state_of(4), {**META, "config": {"run": asked}}, None)
    series.close()
    assert restored(run, **asked)[0] == 4  # the same command again goes on
    assert restored(run, resume="2")[0] == 2
    assert (run / "checkpoints/set_aside/grpo-4-1").is_dir()
    assert restored(run, resume="sft/9")[0] == 2  # of another stage
    with pytest.raises(UsageError, match="has no checkpoint of step 9"):
        opened(run, resume="9")
    for wrong in ("newest", "-1", "grpo/", "ppo/2", "previous/2"):
        with pytest.raises(UsageError, match="is none of: STEP, STAGE/STEP, previous"):
            opened(run, resume=wrong)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["a@b", "a%20b", "a#b?c&d;e", "über uns", "r@2", "100%"])
def test_a_run_may_have_any_name(saved, tmp_path, name):
    run = pathlib.Path(shutil.copytree(saved, tmp_path / name))
    assert restored(run)[0] == 4
    for source in (str(run), f"{run}/", f"{run}@4", f"{run}@grpo/4", f"{run}/@4"):
        assert steps.is_run(source)
        assert pathlib.Path(steps.find(source)) == step_dir(run)
    held = reading.read_tensor(steps.find(str(run)), "embed")
    np.testing.assert_array_equal(held, state_of(4).params["embed"])
    export.export_to_hf(f"{run}@2", tmp_path / "out", "float32")


def test_an_at_sign_names_a_step_where_no_directory_has_that_name(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "r")
    assert steps.split(f"{run}@4") == (str(run), "4")
    with pytest.raises(UsageError, match="names no step"):
        steps.split(f"{run}@")
    assert steps.split(f"{tmp_path}/x@y@4") == (f"{tmp_path}/x@y", "4")
    assert steps.split("org/model") == ("org/model", "")
    other = shutil.copytree(saved, tmp_path / "r@4")
    assert steps.split(f"{run}@4") == (str(other), "")


# ------------------------------------------------------------------ single bits


def flips(run: pathlib.Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Flip single bits of a step, one after the other.

    Yields:
      The file with its place, and what came of it: "named", or else what went wrong.
    """
    step, rng = step_dir(run), random.Random(seed)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    wanted = restored(run)
    for i in range(count):
        # Every file in turn: by their size alone, all would be of the weights.
        file = files[i % len(files)] if i % 2 else rng.choice(files)
        whole = file.read_bytes()
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        file.write_bytes(flipped)
        yield f"{file.relative_to(step)}:{place}.{bit}", came_of(run, wanted)
        file.write_bytes(whole)


def came_of(run: pathlib.Path, wanted: tuple[int, TrainState, dict[str, Any]]) -> str:
    try:
        found = restored(run)
    except UsageError as error:
        is_named = f"{step_dir(run)} is damaged: " in str(error)
        return "named" if is_named and "newest whole step is 2" in str(error) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        assert_equal(found[1], wanted[1])
    except AssertionError:
        return "trained on"
    return "not named" if (found[0], found[2]) == (wanted[0], wanted[2]) else "another meta"


def assert_named(run: pathlib.Path, count: int, seed: int) -> None:
    outcomes = dict(flips(run, count, seed))
    assert len(outcomes) > count / 2
    assert not {place: what for place, what in outcomes.items() if what != "named"}


def test_every_single_bit_that_flips_is_named(run):
    assert_named(run, NUM_FLIPS, seed=0)


@pytest.mark.campaign
def test_every_one_of_a_thousand_single_bits_that_flip_is_named(run):
    assert_named(run, 1_000, seed=1)


# ------------------------------------------------------------------ a disk that fails


def failing(monkeypatch, method: str, times: int) -> list[int]:
    """Let a method of Orbax's manager fail so many times as a full disk does; count its calls."""
    real, calls = getattr(ocp.CheckpointManager, method), []

    def call(self, *args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
        return real(self, *args, **named)

    monkeypatch.setattr(ocp.CheckpointManager, method, call)
    return calls


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_save_is_tried_again_while_the_disk_may_come_back(run, monkeypatch, caplog, method):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    series = opened(run)
    calls = failing(monkeypatch, method, 2)
    series.save(6, state_of(6), META, {"agreement": 1.0})
    series.wait()
    series.close()
    assert len(calls) >= 3 and "No space left on device" in caplog.text
    step, state, _ = restored(run)
    assert step == 6
    assert_equal(state, state_of(6))


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_disk_that_stays_full_ends_the_run_in_a_sentence(run, monkeypatch, method):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    series = opened(run)
    with monkeypatch.context() as patch:
        failing(patch, method, 99)
        with pytest.raises(RunError, match=r"can't be written: No space left on device\. Those"):
            series.save(6, state_of(6), META, {"agreement": 1.0})
            series.wait()
    series.close()
    assert 4 in steps.saved_steps(run)["grpo"]


def test_a_save_whose_arrays_are_gone_is_made_up_for_by_the_next(run, monkeypatch, caplog):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    series, real, lost = opened(run), ocp.CheckpointManager.wait_until_finished, []

    def wait(self: Any) -> None:
        real(self)
        if series._under_way.step in lost:
            raise OSError(errno.ESTALE, "Stale file handle")

    def lose(step: int) -> None:
        """Begin a save of which nothing comes, and give its arrays up to the next step."""
        state = state_of(step)
        series.save(step, state, META, {"agreement": 1.0})
        real(series._manager)
        shutil.rmtree(step_dir(run, step))
        series._manager.reload()
        lost.append(step)
        for leaf in jax.tree.leaves(state):
            leaf.delete()

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
        lose(6)
        lose(8)  # which waits for the one before
        assert "Step 6 is not saved, the next one will be" in caplog.text
        lose(10)
        with pytest.raises(RunError, match="can't be written: Stale file handle"):
            series.save(12, state_of(12), META, {"agreement": 1.0})
    series.close()
    assert restored(run)[0] == 4


def test_an_error_that_is_none_of_storage_is_not_tried_again(run, monkeypatch):
    series = opened(run)

    def wrong(self: Any, *args: Any, **named: Any) -> None:
        raise ValueError("a mistake of ours")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", wrong)
        with pytest.raises(ValueError, match="a mistake of ours"):
            series.save(6, state_of(6), META, {"agreement": 1.0})
    series.close()
