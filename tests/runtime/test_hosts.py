"""Several processes on this machine stand for the hosts of a pod."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types

import jax
import pyarrow.parquet as pq
import pytest
from conftest import COMPILE_FASTEST, slowness

from jlrm.config import UsageError
from jlrm.data import audit
from jlrm.data.comparisons import write_comparisons
from jlrm.data.dataset import write_dataset
from jlrm.data.worlds import lists, toy
from jlrm.reports.tracking import read_metrics
from jlrm.runtime import cluster, hosts

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = int(os.environ.get("JLRM_POD_STEPS", "6"))
SETTINGS = """
run: {dir: unset, save_every: 3, eval_every: 0, completions_every: 5, tensorboard: false}
model: {preset: toy, tokenizer: toy, compute_dtype: float32, remat: none}
data: {train: ROWS, prompt: toy, max_prompt_tokens: 48, eval_rows: 8}
sampling: {max_new_tokens: 8, eval_batch_size: 16}
reward: {mode: none, plugins: {"payers:vowels": 1.0}}
grpo:
  {steps: STEPS, prompts: 8, rollouts: 4, loss: {kl_weight: 0.01},
   optimizer: {learning_rate: 1e-5}}
"""


class Pod:
    """Processes of one command, started together; their output is in files."""

    def __init__(self, folder: pathlib.Path, count: int, *command: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"{number}.log" for number in range(count)]
        self.processes = []
        for number, output in enumerate(self.outputs):
            chosen = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(8 // count),
                "XLA_FLAGS": COMPILE_FASTEST,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "JLRM_COORDINATOR": f"127.0.0.1:{port}",
                "JLRM_NUM_PROCESSES": str(count),
                "JLRM_PROCESS_ID": str(number),
                **environment,
            }
            with output.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=chosen,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                    )
                )

    def wait(self, seconds: float = 900) -> list[int]:
        """Return the exit codes."""
        until = time.monotonic() + seconds * slowness()
        try:
            return [p.wait(max(until - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail("a process does not end:\n" + "\n".join(map(self.said, range(len(self)))))
        finally:
            for process in self.processes:
                process.kill()

    def said(self, number: int) -> str:
        """Return what a process has written."""
        return self.outputs[number].read_text(errors="replace")

    def __len__(self) -> int:
        return len(self.processes)


def script(tmp_path: pathlib.Path, count: int, body: str, **environment: str) -> Pod:
    """Run code in processes that have joined, as a command would."""
    code = f"""
import argparse, os, sys, time
import numpy as np
from jlrm.config import UsageError, RunError
from jlrm.runtime import cluster, commands, hosts
hosts.BEAT_SECONDS, hosts.SILENT_SECONDS = 0.5, {10.0 * slowness()}
me = int(os.environ["JLRM_PROCESS_ID"])

def main():
    parser = argparse.ArgumentParser()
    cluster.add_arguments(parser)
    tree = {{"run": {{"dir": "r"}}, "grpo": {{"steps": 1, "rollouts": 8}}}}
    if "OTHER" in os.environ and me == 2:
        tree["grpo"]["rollouts"] = 16
    with hosts.joined(parser.parse_args([]), tree, {8.0 * slowness()}):
        body()

def body():
{textwrap.indent(textwrap.dedent(body), "    ")}

sys.exit(commands.run(main))
"""
    file = tmp_path / "script.py"
    file.write_text(code)
    return Pod(tmp_path / "pod", count, str(file), **environment)


@pytest.mark.slow
def test_what_processes_tell_each_other(tmp_path):
    body = """
    assert (hosts.count(), hosts.index(), hosts.is_main()) == (3, me, me == 0)
    assert hosts.gather("a", bytes([me])) == [b"\\0", b"\\1", b"\\2"]
    assert hosts.highest("b", me * 7) == 14
    mine = hosts.share(8)
    parts = hosts.gather("c", np.array([[row, 0.1 * row] for row in mine]))
    assert [len(part) for part in parts] == [2, 3, 3]
    assert np.array_equal(np.concatenate(parts), [[row, 0.1 * row] for row in range(8)]), parts
    few = hosts.share(1)  # fewer rows than processes
    found = hosts.gather("d", np.ones((len(few), 2)))
    assert [part.shape for part in found] == [(0, 2), (0, 2), (1, 2)]
    assert hosts.gather("e", [("text", me, None)]) == [[("text", n, None)] for n in range(3)]
    hosts.agree("rows", "same")
    try:
        hosts.agree("rows", me == 1)
    except UsageError as error:
        assert "Processes [1] have other rows" in str(error)
    else:
        raise SystemExit("not noticed")
    print("all well")
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [0, 0, 0], pod.said(0)
    assert all("all well" in pod.said(number) for number in range(3))


@pytest.mark.slow
def test_each_process_reads_its_share_of_the_rows(tmp_path):
    rows = toy.comparisons(1, 40)
    rows[7] = dataclasses.replace(rows[7], score_1=-1.0, score_2=-1.0)
    write_comparisons(rows, tmp_path / "rows.jsonl")
    write_dataset({"train": rows}, tmp_path / "prepared")
    body = f"""
    from jlrm.data import libraries, readers, sharded
    asked, parsed, at, comparison = [], [], libraries._at, readers.comparison
    libraries._at = lambda rows, places: (asked.extend(places), at(rows, places))[1]
    readers.comparison = lambda *row: (parsed.append(row), comparison(*row))[1]
    for source in ("{tmp_path}/rows.jsonl", "{tmp_path}/prepared"):
        asked.clear(), parsed.clear()
        rows, dropped = sharded.read(source)
        assert asked == ([] if source.endswith("jsonl") else list(range(me, 40, 3)))
        assert len(parsed) == len(range(me, 40, 3))
        assert [row.id for row in dropped] == ["toy-1-7"]
        names = [f"toy-1-{{i}}" for i in range(40) if i != 7]
        take = lambda rows, chosen: rows.collect("ids", chosen, lambda mine: [r.id for r in mine])
        assert take(rows, range(39)) == names
        assert take(rows, np.array([38, 0, 7, 7])) == [names[i] for i in (38, 0, 7, 7)]
        assert [row.id for row in rows.mine] == [n for n in names if int(n[6:]) % 3 == me]
        few = rows.select([30, 2, 11])
        assert take(few, [0, 1, 2]) == [names[i] for i in (30, 2, 11)]
        both = few.in_both_orders()
        (given, swapped) = both.collect("rows", [2, 3], lambda mine: mine)
        assert given.id == names[2] and swapped == given.swapped()
        is_tie = rows.flags("ties", lambda row: row.label == 0)
        assert is_tie.tolist() == [r.label == 0 for r in rows.collect("r", range(39), list)]
        assert sharded.deal(list("abcde")).mine == list("abcde")[me::3]
    os.mkdir(f"{tmp_path}/{{me}}")
    os.chdir(f"{tmp_path}/{{me}}")
    with open("x.csv", "w") as file:
        file.write("question,answer_1\\n" + "abc"[me:])
    try:
        sharded.read("x.csv")
    except UsageError as error:
        assert "Processes [1, 2] have other files of x.csv than process 0" in str(error)
        print("all well")
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [0, 0, 0], pod.said(0) + pod.said(1) + pod.said(2)
    assert all("all well" in pod.said(number) for number in range(3))


@pytest.mark.slow
def test_a_row_that_one_process_can_not_read_ends_all(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q"}\n' * 2)
    body = f"""
    from jlrm.data import sharded
    sharded.read("{tmp_path}/rows.jsonl")
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [2, 2, 2]
    assert "has no field 'answer_1'" in pod.said(2)


def test_one_process_is_enough_for_itself():
    assert hosts.count() == 1 and hosts.is_main()
    assert list(hosts.share(5)) == [0, 1, 2, 3, 4]
    assert hosts.gather("what", b"x") == [b"x"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--coordinator", "here:1"], "needs --num-processes and --process-id"),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "0"], "HOST:PORT"),
        (["--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"], "0 <= process"),
        (["--num-processes", "4", "--process-id", "1"], "need --coordinator"),
    ],
)
def test_impossible_flags_are_refused(flags, wanted):
    parser = argparse.ArgumentParser()
    cluster.add_arguments(parser)
    with pytest.raises(UsageError, match=wanted):
        cluster.settings(parser.parse_args(flags))


def test_a_mode_of_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("JLRM_DISTRIBUTED", "OFF")
    parser = argparse.ArgumentParser()
    cluster.add_arguments(parser)
    with pytest.raises(UsageError, match="JLRM_DISTRIBUTED=OFF is none of auto, on, off"):
        cluster.settings(parser.parse_args([]))


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in the batch script itself, outside srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "local"}, False),  # Kaggle
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_an_environment_of_several_hosts_is_known(environment, several, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster._are_several() is several


@pytest.mark.slow
def test_a_host_with_another_config_is_named(tmp_path):
    pod = script(tmp_path, 3, "raise SystemExit('went on')", OTHER="1")
    assert pod.wait(60) == [2, 2, 2]
    assert "Process 2" in pod.said(0) and "grpo.rollouts is 16, not 8" in pod.said(0)


@pytest.mark.slow
def test_a_host_that_raises_ends_the_others_with_its_message(tmp_path):
    body = """
    if me == 1:
        raise RunError("The reward of row 7 failed")
    hosts.gather("rewards", b"")
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [1, 1, 1]
    for number in (0, 2):
        assert "Process 1 (" in pod.said(number)
        assert "failed: The reward of row 7 failed" in pod.said(number)


@pytest.mark.slow
def test_a_host_that_is_late_at_the_end_is_waited_for(tmp_path):
    """Process 0 writes the report when the others have done, for longer than silence is borne."""
    body = """
    hosts.SILENT_SECONDS = 2.0
    hosts.gather("the last metrics", b"")
    if me == 0:
        time.sleep(5.0)
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [0, 0, 0], pod.said(0)


@pytest.mark.slow
def test_who_gets_no_answer_where_all_leave_has_left_all_the_same(monkeypatch):
    """Process 0 holds the service, and may be gone before the others have heard of the end."""

    def gone():
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Failed to send RPC to coordinator")

    waited = []
    client = types.SimpleNamespace(wait_at_barrier=lambda name, *_: waited.append(name))
    monkeypatch.setattr(hosts, "_state", hosts._State(client, count=2, index=1))
    monkeypatch.setattr(jax.distributed, "shutdown", gone)
    hosts.leave(0, "")
    assert waited == ["jlrm-end"] and hosts._state.leaving.is_set()


def test_an_interrupt_of_one_host_ends_the_others(tmp_path):
    body = """
    hosts.gather("start", b"")
    if me == 1:
        raise KeyboardInterrupt
    hosts.gather("rewards", b"")
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [130, 130, 130]
    assert "Process 1 (" in pod.said(0) and "Stopped by Ctrl-C" in pod.said(2)
    assert "Stopped at once" in pod.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_vanishes_is_named(tmp_path, victim):
    body = f"""
    hosts.gather("start", b"")
    if me == {victim}:
        os.kill(os.getpid(), 9)
    hosts.gather("rewards", b"")
    """
    pod = script(tmp_path, 3, body)
    began = time.monotonic()
    codes = pod.wait(60)
    assert time.monotonic() - began < 60 * slowness()
    assert codes.pop(victim) == -signal.SIGKILL
    others = [number for number in range(3) if number != victim]
    assert all(code not in (0, 1, 2) for code in codes)  # a scheduler may start it again
    if victim:
        assert all(f"Process {victim} (" in pod.said(number) for number in others)
    else:  # the store dies with it, and jax's own client may be the first to notice
        for number in others:
            assert "Process 0" in pod.said(number) or "leader" in pod.said(number)


@pytest.mark.slow
def test_a_collective_that_breaks_is_laid_to_the_process_that_is_gone(tmp_path):
    body = """
    import jax
    hosts.gather("start", b"")
    if me == 1:
        os._exit(9)
    raise jax.errors.JaxRuntimeError("INTERNAL: connection closed by peer")
    """
    pod = script(tmp_path, 2, body)
    assert pod.wait(60) == [137, 9], pod.said(0)
    assert "Process 1" in pod.said(0) and "connection closed by peer" in pod.said(0)


@pytest.mark.slow
def test_a_host_hangs_from_when_another_has_gone_on_without_it(monkeypatch):
    """All may be in one place for longer than that: hosts judge for hours without another."""
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(hosts, "_give_up", lambda code, message: said.append(message))
    seen = {number: hosts._Seen() for number in range(2)}

    def told_after(seconds: float, *steps: int) -> list[str]:
        now[0] += seconds
        alive = [
            (f"jlrm/alive/{number}", json.dumps([now[0], step, "judging", "judge"]))
            for number, step in enumerate(steps)
        ]
        hosts._note(seen, alive)
        hosts._check_alive(seen, timeout=60)
        return said

    assert not told_after(0, 1, 1)
    assert not told_after(1000, 1, 1)
    assert not told_after(1, 2, 1)  # the first is done with judging
    assert not told_after(59, 2, 1)
    assert not told_after(1, 2, 2)
    assert not told_after(1000, 2, 3)
    assert not told_after(60, 2, 4)
    assert "Process 0 (judge) hangs" in told_after(1, 2, 4)[0] and len(said) == 1


def test_a_host_that_hangs_is_named(tmp_path):
    body = """
    hosts.gather("start", b"")
    if me == 2:
        time.sleep(1000)
    hosts.gather("rewards", b"")
    """
    pod = script(tmp_path, 3, body)
    assert pod.wait(60) == [137, 137, 137]
    assert "Process 2" in pod.said(0) and "no further than 'start'" in pod.said(0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pods")
    write_comparisons(toy.comparisons(1, 80), folder / "rows.jsonl")
    settings = SETTINGS.replace("ROWS", str(folder / "rows.jsonl")).replace("STEPS", str(STEPS))
    (folder / "config.yaml").write_text(settings)
    return folder


def train(settings: pathlib.Path, name: str, count: int, *more: str, **environment: str) -> Pod:
    command = ["-m", "jlrm.train", "--config", str(settings / "config.yaml")]
    return Pod(
        settings / f"{name}.pod",
        count,
        *command,
        f"run.dir={settings / name}",
        "run.precompile=never",  # which takes twice as long, and is what the last test is for
        *more,
        **environment,
    )


def values(run: pathlib.Path) -> list[dict[str, float]]:
    """Return the metrics of every step but for times."""
    ignored = ("time/", "perf/tokens_per_second", "perf/compiles")
    return [
        {name: value for name, value in row.items() if not name.startswith(ignored)}
        for row in read_metrics(run)
    ]


def completions(run: pathlib.Path) -> list[str]:
    files = sorted((run / "completions").glob("*.parquet"))
    return [row["response"] for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.campaign)])
def test_several_processes_train_as_one_does(settings, count):
    for number in (1, count):
        if (settings / f"of_{number}").exists():
            continue
        pod = train(settings, f"of_{number}", number)
        assert pod.wait() == [0] * number, pod.said(number - 1)
        assert all("Report" not in pod.said(process) for process in range(1, number))
    one = values(settings / "of_1")
    assert len(one) == STEPS and any(abs(row["loss"]) > 1e-4 for row in one)
    for mine, theirs in zip(one, values(settings / f"of_{count}"), strict=True):
        assert mine.keys() == theirs.keys()
        numbers = [name for name in mine if name != "stage"]
        assert [mine[n] for n in numbers] == pytest.approx([theirs[n] for n in numbers], abs=1e-5)
    assert completions(settings / f"of_{count}") == completions(settings / "of_1")
    assert audit.read(settings / f"of_{count}") == audit.read(settings / "of_1")


@pytest.mark.slow
def test_several_processes_train_on_lists_as_one_does(settings):
    rows = itertools.islice(lists.rows("lists-many", "train"), 40)
    (settings / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.train={settings / 'lists.jsonl'}", "data.judging=lists", "run.eval_every=2"]
    own += ["data.max_prompt_tokens=112", "grpo.steps=2", "run.completions_every=1"]
    own += ["sampling.stop_strings={</answer>: 4}"]
    for number in (1, 2):
        pod = train(settings, f"lists_of_{number}", number, *own)
        assert pod.wait() == [0] * number, pod.said(number - 1)
    one, two = (values(settings / f"lists_of_{number}") for number in (1, 2))
    assert len(one) == 2 and one[-1]["eval/pairs"] == 8
    for mine, theirs in zip(one, two, strict=True):
        numbers = [name for name in mine if name != "stage"]
        assert [mine[n] for n in numbers] == pytest.approx([theirs[n] for n in numbers], abs=1e-5)
    assert completions(settings / "lists_of_1") == completions(settings / "lists_of_2")
    assert audit.read(settings / "lists_of_1") == audit.read(settings / "lists_of_2")


@pytest.mark.slow
def test_several_hosts_judge_one_benchmark(settings):
    """The judge is the run of the test above."""
    if not (settings / "of_1").exists():
        assert train(settings, "of_1", 1).wait() == [0]
    flags = ["-m", "jlrm.evaluate", "--model", str(settings / "of_1"), "--benchmark", "pairs"]
    flags += ["--data", str(settings / "rows.jsonl"), "--limit", "12", "--batch-size", "8"]
    flags += ["--max-prompt-tokens", "48", "--max-new-tokens", "8", "--compute-dtype", "float32"]
    found = {}
    for count, flag in ((1, "--no-apart"), (2, "--no-apart"), (2, "--apart"), (2, "--refill")):
        out = settings / f"judged_by_{count}{flag}"
        command = [*flags, flag, "--out", str(out), "--no-report"]
        pod = Pod(settings / f"{out}.pod", count, *command)
        assert pod.wait() == [0] * count, pod.said(count - 1)
        assert ["Written" in pod.said(number) for number in range(count)] == [True, False][:count]
        lines = (out / "pairs" / "responses.jsonl").read_text().splitlines()[1:]
        rows = map(json.loads, lines)
        found[count, flag] = {row["game"]: row["outputs"] for row in rows}
        results = json.loads((out / "results.json").read_text())
        assert results["benchmarks"]["pairs"]["n"] == 12
    one, together, blockwise, refilled = found.values()
    assert one == together == blockwise == refilled and len(one) == 24


@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(settings):
    """One of two is killed after a checkpoint; the other ends; restarted, all goes on as before."""
    pod = train(settings, "killed", 2)
    record = settings / "killed" / "metrics.jsonl"
    until = time.monotonic() + 900
    while not record.exists() or len(record.read_text().splitlines()) < 4:
        assert time.monotonic() < until and pod.processes[0].poll() is None, pod.said(0)
        time.sleep(0.05)
    pod.processes[1].kill()
    began = time.monotonic()
    codes = pod.wait(90)
    assert time.monotonic() - began < 60 * slowness()
    assert codes[0] not in (0, 1, 2)
    assert "Process 1" in pod.said(0) or "task:1" in pod.said(0), pod.said(0)
    again = train(settings, "killed", 2)
    assert again.wait() == [0, 0], again.said(0)
    assert "going on after step 3" in again.said(0)
    assert values(settings / "killed") == values(settings / "of_2")
    assert completions(settings / "killed") == completions(settings / "of_2")
    lines = audit.read(settings / "killed")
    assert lines == audit.read(settings / "of_2") and not audit.check(lines)[0].faults


@pytest.mark.slow
def test_a_reward_that_raises_on_one_host_ends_all(settings):
    trap = settings / "trap"
    trap.write_text("raise")
    pod = train(settings, "trapped", 2, TRAP=str(trap))
    assert pod.wait() == [1, 1], pod.said(0)
    assert "Process 1 (" in pod.said(0) and "failed on row" in pod.said(0)
    assert "the reward model is out" in pod.said(0)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(settings):
    pod = train(
        settings, "stopped", 2, "grpo.steps=2000", "run.save_every=1000", "run.precompile=auto"
    )
    record = settings / "stopped" / "metrics.jsonl"
    until = time.monotonic() + 900
    while not record.exists() or len(record.read_text().splitlines()) < 2:
        assert time.monotonic() < until and pod.processes[0].poll() is None, pod.said(0)
        time.sleep(0.05)
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.wait(120) == [143, 143], pod.said(0)
    steps = len(read_metrics(settings / "stopped"))
    saved = [int(path.name) for path in (settings / "stopped/checkpoints/grpo").glob("[0-9]*")]
    assert saved == [steps]
    assert f"Stopped after grpo step {steps}" in pod.said(1)
