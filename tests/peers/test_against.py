"""Other libraries beside ours: fakes that agree, differ, crash, hang and cheat, and a real one."""

from __future__ import annotations

import json
import os
import pathlib
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from conftest import COMPILE_FASTEST

from jlrm import bench
from jlrm.config import RunError
from jlrm.peers import against, measure, processes, workload
from jlrm.peers.measure import AgainstResult, CheckedPeer, PeerFigures, Side, Spread
from jlrm.peers.processes import OURS, FailedLibrary, Library, Process, Site
from jlrm.peers.worker import Given
from jlrm.peers.workload import Size
from jlrm.reports import contracts
from jlrm.runtime import commands
from jlrm.weights import hf_config

ROWS, TOKENS = workload.PROMPTS * workload.ROLLOUTS, 4
SIZE = Size(workload._qwen2(64, 96, 1, 2, 64), prompt_tokens=8, new_tokens=TOKENS)
# A library: what it does wrong stands among its flags.
FAKE = """
import os, signal, time
import numpy as np
PACKAGES = ("numpy",)

def device_peak():
    return None

def check(work):
    print("a library that prints")
    if "dies at once" in work.flags:
        raise MemoryError("no room for the model")
    if "hangs at once" in work.flags:
        time.sleep(600)
    if "other shape" in work.flags:
        return np.zeros((2, 2)), 1.0
    logps = np.zeros_like(work.batch["old_logps"])
    logps[-1, -1] += 3e-4 * ("one token" in work.flags)
    loss = 1.0 + 3e-5 * ("loss" in work.flags)
    return logps, float("nan") if "nan" in work.flags else loss

def rollout(work, turns):
    for number in turns:
        rng = np.random.default_rng(number)
        shape = len(work.prompts) * work.rollouts, work.new_tokens
        turns.tokens = rng.integers(0, 60, shape)
        if "greedy" in work.flags:
            turns.tokens[:] = 7
        if "short" in work.flags:
            turns.tokens = turns.tokens[:, 1:]

def update(work, turns):
    for number in turns:
        if number == 3 and "is killed" in work.flags:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 3 and "hangs" in work.flags:
            time.sleep(600)
        time.sleep(0.02 if "slow" in work.flags else 0.001)

iteration = sft = dpo = update

def losses(work, stage):
    rising = "rises" in work.flags and stage == "dpo"
    return [0.7 + 3e-4 * rising * step for step in range(work.check_steps)]
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Return a function that names what each library does wrong; ours is a fake that is right."""
    adapter = tmp_path / "fake.py"
    adapter.write_text(FAKE)
    monkeypatch.setitem(workload.SIZES, "tiny", SIZE)
    monkeypatch.setattr(measure, "mallocs", lambda device: ["as it is"])

    def put(**flags):
        for name in (OURS, *flags):
            wrong = flags.get(name, ())
            monkeypatch.setitem(processes.LIBRARIES, name, Library("", adapter, wrong))

    put()
    return put


@pytest.fixture
def site(tmp_path):
    """A workload of the smallest size, and no Pythons of libraries."""
    folder = tmp_path / "workload"
    folder.mkdir()
    workload.write(folder, SIZE)
    return Site(folder, tmp_path / "peers", patience=60)


def run(*words):
    return commands.run(lambda: bench.main(["--against", *words]))


def test_every_library_gets_the_same_files(site):
    assert hf_config.read_config(site.workload / "model", compute_dtype="bfloat16") == SIZE.model
    tokenizer = tokenizers.Tokenizer.from_file(str(site.workload / "model/tokenizer.json"))
    assert tokenizer.encode("t5 t63 t1").ids == [5, 63, 1]
    settings = json.loads((site.workload / "workload.json").read_text())
    assert tokenizer.token_to_id("<eos>") == settings["eos_id"] == SIZE.model.vocab_size
    lengths = [len(prompt) for prompt in settings["prompts"]]
    assert lengths[0] == 4 and lengths[-1] == 8 and len(lengths) == workload.PROMPTS
    with np.load(site.workload / "batch.npz") as batch:
        assert batch["completion_ids"].shape == batch["old_logps"].shape == (ROWS, TOKENS)
        pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        for row, (ids, mask) in enumerate(pairs):
            assert ids[mask].tolist() == settings["prompts"][row // workload.ROLLOUTS]
            assert mask[-1] and not ids[~mask].any()


def test_texts_and_ids_are_the_same_prompts(site):
    """A library that tokenises the texts itself reads what the others are given as ids."""
    given = Given(site.workload, [])
    assert given.tokenizer()(given.texts)["input_ids"] == given.prompts
    file = site.workload / "model/tokenizer.json"
    file.write_text(file.read_text().replace('"t5": 5', '"t5": 6').replace('"t6": 6', '"t6": 5'))
    given.settings["prompts"] = [[5, 7]]
    with pytest.raises(ValueError, match="does not give the ids of the prompts"):
        given.tokenizer()


def sides(ours, theirs):
    """Return two sides whose turns take these seconds, and the order in which they are asked."""
    order = []

    def side(name, seconds):
        left = iter(seconds)

        def turn():
            order.append(name)
            return {"seconds": next(left), "peak_bytes": len(order)}

        return Side(SimpleNamespace(name=name, turn=turn), None)

    return side("ours", ours), side("theirs", theirs), order


def test_turns_alternate_and_the_first_do_not_count():
    own, other, order = sides([9.0, 9.0, 1.0, 2.0, 4.0], [9.0, 9.0, 3.0, 6.0, 8.0])
    measure.take_turns(own, other, 3)
    assert order[:4] == ["ours", "ours", "theirs", "theirs"]
    assert order[4:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (own.seconds, other.seconds) == ([1.0, 2.0, 4.0], [3.0, 6.0, 8.0])
    assert other.peak_bytes == len(order)


def test_the_table_and_the_json_say_the_same():
    checked = (
        CheckedPeer(OURS, {"jax": "1"}, 0.0, 0.0),
        CheckedPeer("hf", {"torch": "2"}, 2e-6, 1e-8),
        CheckedPeer("tunix", refused="not installed: no tunix", is_missing=True),
    )
    figures = (
        PeerFigures("update", OURS, "as it is", Spread(2.0, 1.5, 3.0), peak_bytes=2**30),
        PeerFigures(
            "update", "hf", "as it is", Spread(5.0, 4.5, 6.0), Spread(2.5, 2.25, 3.5), 2**31
        ),
        PeerFigures("iteration", "hf", "as it is", failed="it was killed"),
    )
    result = AgainstResult("tiny", "cpu", "float32", 5, 2, 0.25, 1.5, checked, figures)
    text = against.describe(result)
    rows = [
        " ".join(line.split())
        for line in text.splitlines()
        if line.startswith(("update", "iteration"))
    ]
    assert rows[0] == "update jlrm as it is 2.00 1.50 3.00 - - - 1.00"
    assert rows[1] == "update hf as it is 5.00 4.50 6.00 2.50 2.25 3.50 2.00"
    assert rows[2] == "iteration hf as it is - - - - - - -"
    assert "hf, iteration, malloc as it is: it was killed." in text
    assert "tunix: not timed, not installed: no tunix." in text
    assert "log-probabilities differ by 2e-06 at most (bound 0.0001)" in text
    assert "load 0.2 before and 1.5 after" in text
    written = json.loads(json.dumps(contracts.encode(result)))
    assert contracts.decode(AgainstResult, written, "against.json") == result


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ("one token", "a log-probability differs by 0.0003 nats"),
        ("loss", "the loss by 3e-05 (at most 1e-05)"),
        ("nan", "the loss by nan"),
        ("other shape", "log-probabilities (2, 2), and (32, 4) are asked for"),
        ("dies at once", "exit code 1: MemoryError: no room for the model"),
    ],
)
def test_a_library_that_computes_something_else_is_not_timed(fakes, capsys, wrong, wanted):
    fakes(hf=(wrong,))
    assert run("hf") == 1
    captured = capsys.readouterr()
    assert wanted in captured.out and "hf" in captured.out
    assert not any(line.startswith(measure.PHASES) for line in captured.out.splitlines())
    assert "error: no library could be timed" in captured.err


STAGES = ("--phases", "sft,dpo", "--repeats", "1")


def test_a_stage_that_learns_something_else_is_not_timed(fakes, capsys):
    """The first loss agrees, as it does in DPO whatever is computed; the third one does not."""
    fakes(hf=("rises",), trl=())
    assert run("hf,trl", *STAGES, "--json") == 0
    result = contracts.decode(AgainstResult, json.loads(capsys.readouterr().out), "stdout")
    assert {each.library for each in result.figures} == {OURS, "trl"}
    _, hf, trl = result.checked
    assert hf.refused == (
        "it computes something else: a loss of dpo differs by 0.0006 (at most 0.0001)"
    )
    assert trl.stage_differences == {"sft": 0.0, "dpo": 0.0}
    text = against.describe(result)
    assert "losses of the first steps, sft by 0, dpo by 0 (bound 0.0001)" in text
    assert {each.phase for each in result.figures} == {"sft", "dpo"}


def test_a_stage_that_a_library_does_not_have_is_named(fakes, tmp_path, monkeypatch, capsys):
    whole, less = tmp_path / "fake.py", tmp_path / "less.py"
    less.write_text(FAKE.replace("sft = dpo = update", "sft = update"))
    fakes(hf=())
    monkeypatch.setitem(processes.LIBRARIES, "hf", Library("", less))
    assert whole.exists() and run("hf", *STAGES) == 0
    printed = capsys.readouterr().out
    assert "hf, dpo, malloc as it is: it ended with exit code 1: nothing is known of dpo" in printed
    rows = [line.split()[:2] for line in printed.splitlines() if line.startswith(("sft", "dpo"))]
    assert rows == [["sft", OURS], ["sft", "hf"], ["dpo", "hf"]]


def test_one_that_hangs_is_ended_and_named(fakes, site):
    fakes(hf=("hangs at once",))
    with Process(site, "hf", "check", "as it is") as process:
        process.patience = 1
        with pytest.raises(FailedLibrary, match="no answer within 1 s"):
            process.turn()
        pid = process.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("wrong", ["greedy", "short"])
def test_a_rollout_that_is_another_one_does_not_count(fakes, site, wrong):
    fakes(hf=(wrong,))
    with Process(site, "hf", "rollout", "as it is") as process:
        wanted = r"must be \[32, 4, 32\], got \[32, [43], (1|32)\]"
        with pytest.raises(FailedLibrary, match=wanted):
            Side(process, (ROWS, TOKENS)).turn()


def test_what_is_not_installed_is_left_out(fakes, tmp_path, capsys):
    """Alone it is the user's to mend; beside another that is there, it is told and left out."""
    empty = str(tmp_path / "empty")
    assert run("trl", "--peers", empty) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "launch/peers.sh" in captured.err
    assert f"there is no {empty}/torch/bin/python" in captured.err
    fakes(hf=())
    assert run("trl,hf", "--peers", empty, "--json", "--repeats", "1", "--phases", "update") == 0
    result = contracts.decode(AgainstResult, json.loads(capsys.readouterr().out), "stdout")
    assert [each.library for each in result.checked if each.is_missing] == ["trl"]
    assert {each.library for each in result.figures} == {OURS, "hf"}


def test_a_package_that_is_missing_is_named(fakes, tmp_path, site):
    (tmp_path / "fake.py").write_text("import no_such_library")
    with (
        Process(site, OURS, "check", "as it is") as process,
        pytest.raises(processes.MissingLibrary, match="No module named 'no_such_library'"),
    ):
        process.turn()


def test_without_ours_nothing_is_measured(fakes, site):
    fakes(hf=(), **{OURS: ("dies at once",)})
    with pytest.raises(RunError, match="jlrm's own process failed: it ended with exit code 1"):
        measure.check(site, ["hf"])


@pytest.mark.slow
def test_one_that_fails_halfway_leaves_the_others(fakes, capsys):
    fakes(hf=("slow",), trl=("is killed",), tunix=("hangs",))
    began = time.monotonic()
    assert run("hf,trl,tunix", "--repeats", "3", "--patience", "5", "--json") == 0
    assert time.monotonic() - began < 300
    result = contracts.decode(AgainstResult, json.loads(capsys.readouterr().out), "stdout")
    found = {(each.phase, each.library): each for each in result.figures}
    assert set(found) == {
        (phase, name) for phase in measure.GRPO for name in (OURS, "hf", "trl", "tunix")
    }
    for phase in ("update", "iteration"):
        assert "it was killed" in found[phase, "trl"].failed
        assert "no answer within 5 s" in found[phase, "tunix"].failed
        assert found[phase, "hf"].seconds.min >= 0.02 > found[phase, OURS].seconds.min
        assert found[phase, "hf"].times_ours.median > 1
    for name in ("hf", "trl", "tunix"):
        assert found["rollout", name].seconds and 2**20 < found["rollout", name].peak_bytes < 2**31


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["hg"], "Did you mean 'hf'?"),
        ([","], "--against names nothing"),
        (["jlrm"], "--against: jlrm is not known"),
        (["hf", "--phases", "dop"], "--phases: dop is not known. Did you mean 'dpo'?"),
        (["hf", "--repeats", "0"], "--repeats 0 is outside"),
        (["hf", "--patience", "-1"], "--patience -1 is outside"),
    ],
)
def test_what_can_be_mended_is_one_sentence(capsys, words, wanted):
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and wanted in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_help_tells_the_flags_and_the_libraries(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--against", "hf", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("--size", "--repeats", "--peers", "--patience", "--json", "trl-checkpointing"):
        assert word in text


@pytest.mark.slow
def test_ours_and_transformers_compute_the_same(torch, fakes, monkeypatch, capsys):
    """Real adapters of both, in this Python; every phase runs."""
    monkeypatch.setenv("XLA_FLAGS", COMPILE_FASTEST)
    for name, file in ((OURS, "ours.py"), ("hf", "hf_torch.py")):
        monkeypatch.setitem(processes.LIBRARIES, name, Library("", processes.HERE / file))
    assert run("hf", "--repeats", "1", "--json") == 0
    result = contracts.decode(AgainstResult, json.loads(capsys.readouterr().out), "stdout")
    other = result.checked[1]
    assert other.refused is None and "torch" in other.versions
    assert other.logp_difference < 1e-5 and other.loss_difference < 1e-6
    timed = [each for each in result.figures if each.library == "hf"]
    assert [each.phase for each in timed] == list(measure.GRPO)
    assert all(each.times_ours and each.peak_bytes > 2**25 for each in timed)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "value"), [("clip", 0.25), ("kl_weight", 0.05)])
def test_the_bound_of_the_loss_sees_another_loss(torch, site, setting, value):
    from jlrm.peers import hf_torch

    given = Given(site.workload, [])
    _, right = hf_torch.check(given)
    given.settings[setting] = value
    _, wrong = hf_torch.check(given)
    assert abs(right - wrong) > 10 * measure.LOSS_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "setting", "value"),
    [("sft", "check_rate", 2e-4), ("dpo", "beta", 0.15), ("bradley_terry", "check_rate", 2e-4)],
)
def test_the_bound_of_a_stage_sees_another_one(site, stage, setting, value):
    """Ours of a stage: the first loss is known, later ones fall, and a setting is seen in them."""
    from jlrm.peers import ours

    given = Given(site.workload, [])
    right = ours.losses(given, stage)
    assert len(right) == given.check_steps and right[-1] < right[0]
    first = {"sft": np.log(SIZE.model.vocab_size), "dpo": np.log(2), "bradley_terry": np.log(2)}
    assert right[0] == pytest.approx(first[stage], abs=1e-6 if stage == "dpo" else 0.2)
    given.settings[setting] = value
    wrong = ours.losses(given, stage)
    assert abs(right[-1] - wrong[-1]) > 5 * measure.STAGE_TOLERANCE


def test_a_setting_of_malloc_reaches_the_process(fakes, site):
    """glibc reads it in site, and leaves zeros between its parts."""
    with Process(site, OURS, "update", "keeps memory") as process:
        process.turn()
        environment = pathlib.Path(f"/proc/{process.process.pid}/environ")
        if not environment.exists():
            pytest.skip("no /proc here")
        assert processes.KEEPS.encode() in environment.read_bytes().replace(b"\0", b":")
