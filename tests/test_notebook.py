"""The notebook runs from top to bottom, on a CPU with the toy model, and defines nothing itself."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import COMPILE_FASTEST

pytestmark = pytest.mark.slow  # whole models are compiled

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "launch" / "colab_quickstart.ipynb"
SMOKE = (
    "sft.steps=3 grpo.steps=3 grpo.prompts=4 grpo.rollouts=2 data.eval_rows=8 "
    "run.eval_every=0 sft.batch_size=8"
)


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_it_holds_no_output_and_asks_for_a_tpu():
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert notebook["metadata"]["accelerator"] == "TPU"
    assert notebook["metadata"]["colab"]["gpuType"] == "V5E1"
    assert "colab-badge.svg" in cells("markdown")[0]


def nodes(source: str) -> list[ast.AST]:
    """Parse a cell; a shell command or a magic counts as `pass`."""
    return list(ast.walk(ast.parse(re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", source))))


def test_it_imports_the_library_and_defines_nothing():
    for source in cells("code"):
        kinds = {type(node) for node in nodes(source)}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.AsyncFunctionDef}


def test_every_config_it_names_is_there():
    constants = [n.value for c in cells("code") for n in nodes(c) if isinstance(n, ast.Constant)]
    named = [str(value) for value in constants if str(value).startswith("configs/")]
    assert len(named) >= 3 and all((ROOT / name).is_file() for name in named)


HOSTS = {"Colab": "COLAB_RELEASE_TAG", "Kaggle": "KAGGLE_KERNEL_RUN_TYPE"}


@pytest.mark.parametrize("host", HOSTS)
def test_the_first_cell_installs_wherever_it_is_hosted_and_may_run_twice(tmp_path, host):
    """With stand-ins for git and pip, which write down what they were asked."""
    home, stubs = tmp_path / "my drive", tmp_path / "stubs"
    home.mkdir()
    (stubs / "pip").mkdir(parents=True)
    said = "import os, sys\nprint('pip', os.getcwd(), *sys.argv[1:], flush=True)\n"
    (stubs / "pip" / "__init__.py").touch()
    (stubs / "pip" / "__main__.py").write_text(said)
    (stubs / "git").write_text(
        '#!/bin/sh\necho git "$@"; mkdir -p jlrm/jlrm; touch jlrm/setup.py\n'
    )
    (stubs / "git").chmod(0o755)
    first = cells("code")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{first}\nprint('went on')"],
        env={
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "PYTHONPATH": str(stubs),
            HOSTS[host]: "1",
            "JLRM_REPOSITORY": "https://example.org/jlrm",
        },
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    installed = f"pip {home / 'jlrm'} install -q -U -e .[tpu]"
    cloned = "git clone -q --depth 1 https://example.org/jlrm jlrm"
    assert done.stdout.splitlines() == [cloned, installed, installed, "went on"]


def test_an_install_that_fails_stops_the_first_cell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", cells("code")[0] + "\nprint('went on')"],
        env={"PATH": str(tmp_path), "COLAB_RELEASE_TAG": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "went on" not in done.stdout


def test_a_hosted_training_has_data(monkeypatch):
    import huggingface_hub

    asked = {}

    def download(**named: str) -> str:
        asked.update(named)
        return "/cache/rows.jsonl"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("JLRM_SMOKE", raising=False)
    space = {"os": os, "IS_HOSTED": True}
    exec(cells("code")[2], space)
    assert "data.train=/cache/rows.jsonl" in space["CHANGES"]
    assert asked["repo_type"] == "dataset" and asked["filename"].endswith(".jsonl")


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JLRM_SMOKE", SMOKE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", COMPILE_FASTEST)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in shown if "image/png" in o.get("data", {})]
    assert pictures, "no curves were drawn"
    runs = tmp_path / "runs"
    for name in ("before", "after"):
        results = json.loads((runs / name / "results.json").read_text())
        assert results["benchmarks"]["pairs"]["n"] == 3
    assert (runs / "judge" / "model.safetensors").is_file()
    assert (runs / "comparison" / "report.html").is_file()
    assert any("Qwen2ForCausalLM" in o.get("text", "") for o in shown)
