"""`jlrm COMMAND`: all commands under one name, a light help, one sentence where none can start."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import jlrm
from jlrm import __main__ as commands
from jlrm.runtime.commands import quieten

ROOT = pathlib.Path(__file__).parent.parent


def run(*args: str, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", *QUIET)}
    return subprocess.run(
        [sys.executable, *python, *args],
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


QUIET = ("TRANSFORMERS_VERBOSITY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")


def test_every_command_is_listed_and_has_an_entry_point():
    modules = {
        path.stem
        for path in (ROOT / "jlrm").glob("*.py")
        if "commands.finish(main)" in path.read_text()
    }
    assert modules == commands.COMMANDS.keys()
    help_of_all = run("-m", "jlrm", "--help").stdout
    assert all(f"  {name} " in help_of_all for name in modules)
    assert '"jlrm = jlrm.__main__:main"' in (ROOT / "setup.py").read_text()
    assert run("-m", "jlrm", "--version").stdout == f"jlrm {jlrm.__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom jlrm import __main__\n__main__.main(['--help'])\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'numpy', 'yaml', 'flax'}))"
    )
    assert run("-c", code).stdout.endswith("[]\n")


@pytest.mark.slow
def test_a_command_runs_as_its_module_does(tmp_path):
    both = [run("-m", *module, str(tmp_path)) for module in (["jlrm", "report"], ["jlrm.report"])]
    assert both[0].returncode == both[1].returncode == 2
    assert both[0].stderr == both[1].stderr and "holds no metrics.jsonl" in both[0].stderr


@pytest.mark.parametrize(
    ("name", "said"), [("trian", "Did you mean 'train'?"), ("x", "Known: train, judge, evaluate, ")]
)
def test_an_unknown_command_is_answered_with_the_nearest(name, said):
    done = run("-m", "jlrm", name)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: Unknown command '{name}'. {said}")


@pytest.mark.parametrize("module", ["jlrm", "jlrm.train", "jlrm.prepare"])
def test_without_its_packages_a_command_says_what_to_do(module):
    done = run("-m", module, python=("-S",))  # -S: as if nothing were installed
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.count("\n") == 1 and "source .venv/bin/activate, or pip install" in done.stderr
    )


@pytest.mark.slow
def test_libraries_say_nothing_of_themselves():
    """Neither transformers without PyTorch nor libtpu without a TPU says anything."""
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from jlrm.runtime.commands import quieten\nquieten()\n"
        "import jax, transformers\njax.devices()\ntransformers.AutoTokenizer"
    )
    done = run("-c", code)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    for name in QUIET:
        monkeypatch.setenv(name, "mine")
    quieten()
    assert {os.environ[name] for name in QUIET} == {"mine"}


def test_a_chip_is_left_to_name_itself(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    quieten()
    assert not {"TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"} & os.environ.keys()


def test_modules_named_in_strings_exist():
    """`sys.modules.get("jlrm.x")` would miss a module that has moved, and say nothing."""
    for path in (ROOT / "jlrm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if (
                isinstance(text, str)
                and text.startswith("jlrm.")
                and text.replace(".", "").isalpha()
            ):
                place = ROOT / text.replace(".", "/")
                assert place.is_dir() or place.with_suffix(".py").exists(), f"{path}: {text}"


def test_of_a_save_that_failed_only_what_we_say_is_printed():
    code = """
import logging, sys, types
from jlrm.config import RunError
from jlrm.runtime import commands

def main():
    log = logging.getLogger("absl")
    log.handle(logging.LogRecord("absl", 40, "/lib/orbax/future.py", 1, "a part failed", (), None))
    log.warning("orbax: requested `tracked_metric`")
    log.warning("something else")
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    raise RunError("No space is left.")

commands.finish(main)
"""
    ended = run("-c", code)
    assert (ended.returncode, ended.stderr) == (1, "something else\nerror: No space is left.\n")
