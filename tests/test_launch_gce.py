"""`launch/tpu_vm.sh --gce` against a fake gcloud: groups of VMs, what they lose and leave."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from clouds import HOSTILE, LAUNCH, TPU, TRAIN, Cloud, check_started, flag, wait_for
from conftest import slowness

GCE = [*TPU, "--gce", "--project", "p-1"]
KIND = ["--type", "v5p-16", "--spot"]  # two hosts
RUNNING = "judge-aaaa,RUNNING\njudge-bbbb,RUNNING\n"
STAGING = "judge-aaaa,STAGING\njudge-bbbb,\n"
NEWEST_FLAG = 567  # the gcloud in which the last of the flags became generally available
NO_GROUP = "ERROR: The resource 'instanceGroupManagers/judge' was not found\n"


class Group:
    """The answers about one group, in turn; the last one from then on."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def lists(self, text: str, times: int = 10**6) -> None:
        self.cloud.reply("list-instances", out=text, times=times)

    def absent(self, times: int = 10**6) -> None:
        self.cloud.reply("list-instances", err=NO_GROUP, code=1, times=times)

    def stable(self, text: str, times: int = 10**6) -> None:
        self.cloud.reply("describe", "isStable", out=text + "\n", times=times)


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def group(cloud):
    return Group(cloud)


def up(cloud, *args: str, kind=KIND):
    return cloud.run("tpu_vm.sh", "up", *GCE, *kind, *args, *TRAIN)


def verbs(cloud) -> list[str]:
    """Return what was made and deleted, in order."""
    words = [" ".join(argv) for argv, _ in cloud.calls()]
    kinds = ("create workload-policy", "templates create", "managed create")
    kinds += ("managed delete", "templates delete", "policies delete")
    return [kind for call in words for kind in kinds if kind in call]


MADE = ["create workload-policy", "templates create", "managed create"]
DELETED = ["managed delete", "templates delete", "policies delete"]


@pytest.mark.parametrize(
    ("kind", "machine", "topology", "hosts", "image"),
    [
        ("v6e-1", "ct6e-standard-1t", "", 1, "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"),
        ("v6e-8", "ct6e-standard-4t", "2x4", 2, "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"),
        ("v6e-16", "ct6e-standard-4t", "4x4", 4, "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"),
        ("v5p-64", "ct5p-hightpu-4t", "2x4x4", 8, "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"),
        ("tpu7x-8", "tpu7x-standard-4t", "", 1, "ubuntu-accel-2404-amd64-tpu-tpu7x"),
        ("tpu7x-16", "tpu7x-standard-4t", "2x2x2", 2, "ubuntu-accel-2404-amd64-tpu-tpu7x"),
    ],
)
def test_create(cloud, kind, machine, topology, hosts, image):
    done = cloud.run("tpu_vm.sh", "create", *GCE, "--type", kind, "--create-flag=--network=my net")
    assert done.returncode == 0, done.stderr
    *policy, (template, _), (group, _) = cloud.calls()
    assert len(policy) == bool(topology)
    if topology:
        assert flag(policy[0][0], "--accelerator-topology") == topology
        assert flag(policy[0][0], "--region") == "us-east5"
        assert (
            flag(group, "--workload-policy")
            == "projects/p-1/regions/us-east5/resourcePolicies/judge"
        )
    assert flag(template, "--machine-type") == machine and flag(template, "--image-family") == image
    assert "--network=my net" in template and "--maintenance-policy=TERMINATE" in template
    assert not any("provisioning-model" in word for word in template)
    assert flag(group, "--size") == str(hosts)
    assert flag(group, "--template") == "projects/p-1/regions/us-east5/instanceTemplates/judge"
    assert {"--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing"} < set(
        group
    )


@pytest.mark.parametrize(
    ("flags", "wanted", "unwanted"),
    [
        ([], {"--max-run-duration=7d", "--instance-termination-action=DELETE"}, "provisioning"),
        (["--spot", "--lifetime", "0"], {"--provisioning-model=SPOT"}, "max-run"),
        (["--spot"], {"--provisioning-model=SPOT", "--max-run-duration=7d"}, "FLEX"),
        (["--flex", "4h"], {"--provisioning-model=FLEX_START", "--max-run-duration=4h"}, "7d"),
    ],
)
def test_a_vm_has_an_end(cloud, flags, wanted, unwanted):
    cloud.run("tpu_vm.sh", "create", *GCE, "--type", "v6e-1", *flags)
    ((argv, _),) = cloud.calls("templates create")
    assert wanted <= set(argv) and not any(unwanted in word for word in argv)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--type", "v5e-16"], "not offered by Compute Engine"),
        (["--type", "v4-8"], "not offered by Compute Engine"),
        (["--type", "v6e-12"], "not a slice"),
        (["--type", "tpu7x-4"], "TensorCores"),
        (["--type", "v5p-24"], "TensorCores"),
        (["--slices", "2"], "one slice"),
        (["--reserved"], "--create-flag=--reservation=NAME"),
        (["--valid-until", "6h"], "waits for capacity"),
        (["--project", ""], "needs --project"),
        (["--lifetime", "3"], "--lifetime=3"),
    ],
)
def test_wrong_input_calls_nothing(cloud, flags, said):
    done = cloud.run("tpu_vm.sh", "create", *GCE, "--type", "v6e-16", *flags)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not cloud.calls()


def test_tpu7x_without_it_names_it(cloud):
    done = cloud.run("tpu_vm.sh", "create", *TPU, "--type", "tpu7x-8")
    assert done.returncode == 2 and "--gce" in done.stderr


@pytest.mark.parametrize("step", ["create workload-policy", "templates create", "managed create"])
def test_what_was_made_before_a_refusal_goes_again(cloud, group, step):
    group.absent()
    cloud.reply(step, err="Quota 'TPUS_V5P' exceeded.\n", code=1)
    done = up(cloud)
    assert done.returncode == 1 and "no quota or capacity for v5p-16 (spot)" in done.stderr
    assert "paid for" not in done.stderr
    begun = MADE[: MADE.index(step) + 1]
    undone = ["templates delete", "policies delete"][3 - len(begun) :]
    assert verbs(cloud) == begun + undone


def test_a_thing_of_the_same_name_is_left_alone(cloud, group):
    group.absent()
    cloud.reply("create workload-policy", err="The resource 'judge' already exists\n", code=1)
    done = up(cloud)
    assert done.returncode == 1 and "judge exists in us-east5-b" in done.stderr
    assert "tpu_vm.sh --gce down" in done.stderr and verbs(cloud) == MADE[:1]


def test_an_old_gcloud_is_named(cloud, group):
    group.absent()
    cloud.reply("managed create", err="unrecognized arguments: --target-size\n", code=2)
    done = up(cloud)
    assert done.returncode == 1 and "gcloud components update" in done.stderr


def test_a_missing_config_is_found_before_anything_is_made(cloud):
    command = ["--", "python", "-m", "jlrm.train", "--config", "configs/typo.yaml"]
    done = cloud.run("tpu_vm.sh", "up", *GCE, *KIND, *command)
    assert done.returncode == 2 and "configs/typo.yaml is not in" in done.stderr
    assert not cloud.calls()


@pytest.mark.slow
def test_up_survives_preemption(cloud, group):
    """It waits, loses a VM, deletes the group, makes it again, and deletes it at the end."""
    group.absent(1)
    group.lists(STAGING, 2)
    group.lists(RUNNING, 2)
    group.lists("judge-aaaa,RUNNING\njudge-bbbb,TERMINATED\n", 2)
    group.lists(RUNNING)
    group.stable("False", 2)
    group.stable("True")
    cloud.reply("list-errors", out="QUOTA_EXCEEDED Quota is 0\n")
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="running | step 3\n", times=2)
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    cloud.reply("host.sh log", out="all of the log\n")
    done = up(cloud)
    assert done.returncode == 0, done.stderr
    told = ["judge is WAITING", "Google says: QUOTA_EXCEEDED", "LOST: preempted", "restart 1 of 20"]
    assert all(text in done.stderr for text in told), done.stderr
    assert done.stderr.count("Google says") == 1
    assert verbs(cloud) == [*MADE, *DELETED, *MADE, *DELETED]
    assert len(cloud.calls("host.sh start")) == len(cloud.calls("host.sh setup")) == 4
    assert (cloud.home / "runs/launch/judge/judge-bbbb-1.log").read_text() == "all of the log\n"
    assert "paid for" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "code"), [("exited 0 | ", 0), ("exited 2 | ", 2), ("exited 1 | ", 1)]
)
def test_up_ends_as_the_command_does(cloud, group, told, code):
    group.lists(RUNNING)
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", out=told + "\n")
    assert up(cloud).returncode == code
    assert verbs(cloud) == DELETED


@pytest.mark.slow
def test_a_vm_out_of_reach_is_replaced(cloud, group):
    group.lists(RUNNING, 5)
    group.absent(1)
    group.lists(RUNNING)
    cloud.reply("host.sh status", out="none\n", times=2)
    cloud.reply("host.sh status", "judge-bbbb", err="ssh: timed out\n", code=255, times=4)
    cloud.reply("host.sh status", out="running | step\n", times=4)
    cloud.reply("host.sh status", out="exited 0 | done\n")
    done = up(cloud)
    assert done.returncode == 0, done.stderr
    assert "host judge-bbbb can't be reached (4 of 4; the slice is ACTIVE)" in done.stderr
    assert verbs(cloud) == [*DELETED, *MADE, *DELETED]


@pytest.mark.slow
def test_a_group_whose_vms_are_gone_is_made_again(cloud, group):
    """As a lifetime leaves it: without VMs, and at rest."""
    group.lists("", 1)
    group.lists(RUNNING)
    group.stable("True")
    cloud.reply("host.sh status", out="exited 0 | done\n")
    done = up(cloud)
    assert done.returncode == 0 and "judge is LOST" in done.stderr, done.stderr
    assert verbs(cloud) == [*DELETED, *MADE, *DELETED]


@pytest.mark.parametrize("policy", ["", NO_GROUP])
def test_down_finds_what_is_left(cloud, policy):
    cloud.reply("managed delete", err=NO_GROUP, code=1)
    cloud.reply("policies delete", err=policy, code=bool(policy))
    cloud.reply("instances list", out="judge-cccc\n")
    done = cloud.run("tpu_vm.sh", "down", *GCE)
    assert done.returncode == 0, done.stderr
    assert "nothing named judge is left of Compute Engine" in done.stderr
    assert verbs(cloud) == DELETED
    ((argv, _),) = cloud.calls("instances list")
    assert flag(argv, "--filter") == "labels.jlrm=judge"
    assert [argv[4] for argv, _ in cloud.calls("instances delete")] == ["judge-cccc"]


@pytest.mark.parametrize("what", ["managed delete", "instances delete"])
def test_down_says_what_it_could_not_delete(cloud, what):
    cloud.reply("instances list", out="judge-cccc\n")
    cloud.reply(what, err="Required 'delete' permission\n", code=1)
    done = cloud.run("tpu_vm.sh", "down", *GCE)
    assert done.returncode == 1 and "could not be deleted" in done.stderr
    assert "nothing named" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("hanging", ["managed create", "list-instances", "host.sh setup"])
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_who_leaves_a_gcloud_that_hangs_is_told_what_is_paid_for(
    cloud, group, hanging, signum, code
):
    if hanging == "list-instances":
        group.absent(1)
    cloud.reply(hanging, hangs=60)
    if hanging == "managed create":
        group.absent()
    group.lists(RUNNING)
    cloud.reply("host.sh status", out="none\n")
    (cloud.home / "rules.json").write_text(json.dumps(cloud.rules))
    with (cloud.home / "said").open("w") as said:  # a pipe would stay open in what hangs
        pinned = ["--git", "https://host/x", "--commit", "abcdef0"]
        script = ["bash", LAUNCH / "tpu_vm.sh", "up", *GCE, *KIND, *pinned, *TRAIN]
        started = subprocess.Popen(
            ["env", "--default-signal=INT,HUP", *script],
            env=cloud.env(),
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(cloud.calls(hanging)) > (hanging == "list-instances"))
        started.send_signal(signum)
        assert started.wait(timeout=20 * slowness()) == code
    finally:
        os.killpg(started.pid, signal.SIGKILL)
    text = (cloud.home / "said").read_text()
    assert "judge is there, and paid for" in text and "tpu_vm.sh --gce down" in text
    assert "managed delete" not in verbs(cloud)


def test_dry_run_prints_every_command_and_runs_none(cloud):
    words = ["python", "-m", "jlrm.train", "run.dir=gs://b/r", *HOSTILE]
    done = cloud.run("tpu_vm.sh", "up", *GCE, *KIND, "--dry-run", "--", *words)
    assert done.returncode == 0 and not done.stderr and not cloud.calls()
    argvs = [shlex.split(s) for s in done.stdout.splitlines() if not s.startswith("#")]
    assert [" ".join(argv[2:4]) for argv in argvs] == [
        "resource-policies create",
        "instance-templates create",
        "instance-groups managed",
        "instance-groups managed",
        *["ssh judge-HOST0", "ssh judge-HOST1"] * 2,
        "instance-groups managed",
        "instance-templates delete",
        "resource-policies delete",
    ]
    for argv in argvs[6:8]:
        check_started(argv, words)


@pytest.mark.slow
def test_gcloud_knows_these_flags(cloud, tmp_path):
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed")
    version = subprocess.run([gcloud, "version"], capture_output=True, text=True).stdout.split()[3]
    if int(version.partition(".")[0]) < NEWEST_FLAG:
        pytest.skip(f"gcloud {version} is older than these flags")
    lines = []
    for flags in (["--spot"], ["--flex", "4h"]):
        dry = cloud.run("tpu_vm.sh", "up", *GCE, "--type", "v6e-8", *flags, "--dry-run", *TRAIN)
        lines += [line for line in dry.stdout.splitlines() if not line.startswith("#")]
    lines += cloud.run("tpu_vm.sh", "status", *GCE, *KIND, "--dry-run").stdout.splitlines()
    env = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path / "empty"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    asked = dict.fromkeys(line for line in lines if " ssh " not in line)
    for argv in map(shlex.split, asked):
        done = subprocess.run([gcloud, *argv[1:]], env=env, capture_output=True, text=True)
        # 2 would be a flag it doesn't know; 1 that nobody is logged in.
        assert done.returncode == 1 and "active account" in done.stderr, (argv, done.stderr)


@pytest.mark.slow
def test_a_job_on_two_hosts_from_start_to_stop(cloud, group):
    group.lists(RUNNING)
    cloud.reply("compute ssh", host=True)
    command = [
        "--",
        sys.executable,
        "-c",
        "import time; print('begun', flush=True); time.sleep(30)",
    ]
    on_hosts = lambda action, *args: cloud.run("tpu_vm.sh", action, *GCE, *KIND, *args)  # noqa: E731
    assert on_hosts("run", *command).returncode == 0
    hosts = [cloud.home / "hosts" / f"judge-{name}-0" for name in ("aaaa", "bbbb")]
    wait_for(lambda: all("begun" in (host / ".jlrm/log").read_text() for host in hosts))
    assert on_hosts("status").stdout.count(": running") == 2
    assert "begun" in on_hosts("logs", "--host", "0/1").stdout
    assert on_hosts("stop").returncode == 0
    assert on_hosts("status").stdout.count("exited 143") == 2
    left = on_hosts("attach")
    assert left.returncode == 143 and "may be started again" in left.stderr


@pytest.mark.parametrize("action", ["setup", "logs", "stop", "attach"])
def test_without_hosts_there_is_a_sentence(cloud, group, action):
    group.absent()
    done = cloud.run("tpu_vm.sh", action, *GCE, *KIND)
    assert done.returncode == 1 and "judge is ABSENT and has no hosts" in done.stderr
    assert not cloud.calls("ssh")
