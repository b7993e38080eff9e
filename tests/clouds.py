"""Fakes of the clouds' own tools, by which the launch scripts are tested.

A fake `gcloud` (`kubectl`, `xpk`, `srun`, `scontrol`) notes its argv and stdin and answers from
rules, which may also fail or hang; hosts of a slice are folders in which the real `launch/host.sh`
runs.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

from conftest import slowness

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
HOSTILE = ["a b; $(rm -rf /)", "it's", '"q" \\ $HOME `id`', "& | > < * ? ~ #", "ü", "@NAME@", ""]
TOKEN = "hf_very-secret'$value"
TPU = ["--name", "judge", "--zone", "us-east5-b", "--poll", "0.02"]
CONFIG = "configs/judgelrm_7b.yaml"
TRAIN = ["--", "python", "-m", "jlrm.train", "--config", CONFIG, "run.dir=gs://bucket/run"]

FAKE = """#!{python} -IS
import fcntl, json, os, sys, time
home = {home!r}
tool, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("latin1")
words = " ".join([tool, *argv])
with open(home + "/lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(home + "/calls.jsonl", "a") as log:
        print(json.dumps([tool, argv, text]), file=log)
    rules = json.load(open(home + "/rules.json"))
    rule = next((r for r in rules if r["times"] and all(m in words for m in r["match"])), None)
    if rule is not None:
        rule["times"] -= 1
        json.dump(rules, open(home + "/rules.json", "w"))
if rule is None:
    sys.exit(0)
time.sleep(rule["hangs"])
if rule["host"]:
    import subprocess
    node = argv[argv.index("ssh") + 1]
    worker = next((a for a in argv if a.startswith("--worker=")), "--worker=0")[9:]
    place = os.path.join(home, "hosts", node + "-" + worker)
    os.makedirs(place, exist_ok=True)
    if not os.path.lexists(place + "/jlrm"):
        os.symlink({root!r}, place + "/jlrm")
    environment = {{k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "WANDB_API_KEY")}}
    command = next(a for a in argv if a.startswith("--command="))[10:]
    done = subprocess.run(["bash", "-c", command], cwd=place, env=environment | {{"HOME": place}},
                          input=text.encode("latin1"))
    sys.exit(done.returncode)
for path, content in rule["writes"].items():
    flag = next(a for a in argv if a.startswith(path + "="))
    open(flag.partition("=")[2], "w").write(content)
sys.stdout.write(rule["out"])
sys.stderr.write(rule["err"])
sys.exit(rule["code"])
"""


class Cloud:
    """Fakes on PATH, the rules they answer by, and what they were called with."""

    def __init__(self, home: pathlib.Path) -> None:
        self.home, self.bin, self.rules = home, home / "bin", []
        self.bin.mkdir()
        for tool in ("gcloud", "kubectl", "xpk", "srun", "scontrol"):
            script = self.bin / tool
            script.write_text(FAKE.format(python=sys.executable, home=str(home), root=str(ROOT)))
            script.chmod(0o755)

    def reply(
        self, *match, out="", err="", code=0, times=10**6, host=False, writes=None, hangs=0
    ) -> None:
        self.rules.append(
            {
                "match": match,
                "out": out,
                "err": err,
                "code": code,
                "times": times,
                "host": host,
                "writes": writes or {},
                "hangs": hangs,
            }
        )

    def states(self, *states: str) -> None:
        """Let `describe` answer these in turn, and the last one from then on."""
        for state in states[:-1]:
            self.state(state, 1)
        self.state(states[-1], 10**6)

    def state(self, state: str, times: int) -> None:
        if state == "ABSENT":
            self.reply("describe", err="NOT_FOUND: no such resource\n", code=1, times=times)
        else:
            self.reply("describe", out=state + "\n", times=times)

    def run(self, script: str, *args: str, env=None, timeout=30) -> subprocess.CompletedProcess:
        (self.home / "rules.json").write_text(json.dumps(self.rules))
        return subprocess.run(
            ["bash", str(LAUNCH / script), *args],
            env=self.env(env),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout * slowness(),
            stdin=subprocess.DEVNULL,
        )

    def env(self, more=None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "WANDB_API_KEY")}
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | (more or {})

    def up(self, *args: str, kind=("--type", "v5p-16", "--spot"), env=None):
        return self.run("tpu_vm.sh", "up", *TPU, *kind, *args, *TRAIN, env=env)

    def calls(self, *match: str, tool: str | None = None) -> list[tuple[list[str], str]]:
        """Return argv and stdin of the calls whose words hold all of these."""
        log = self.home / "calls.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [
            ([name, *argv], text)
            for name, argv, text in rows
            if tool in (None, name) and all(m in " ".join([name, *argv]) for m in match)
        ]

    def deletions(self) -> list[tuple[list[str], str]]:
        """Return the calls that ask for the end of a slice."""
        return self.calls("queued-resources delete")


def flag(argv: list[str], name: str) -> str:
    return next(word for word in argv if word.startswith(name + "="))[len(name) + 1 :]


def check_started(argv: list[str], words: list[str]) -> None:
    """Check what the remote shell, and nothing else, makes of a start command."""
    remote = shlex.split(flag(argv, "--command"))
    assert remote == ["bash", "jlrm/launch/host.sh", "start", "--", *words]


def wait_for(is_true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds * slowness()
    while not is_true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
