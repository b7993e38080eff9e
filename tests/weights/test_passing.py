"""A model of the hub that one process of several downloads; the others never see its files."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import COMPILE_FASTEST, GOLDEN, slowness

from jlrm.weights import passing

ROOT = pathlib.Path(__file__).parent.parent.parent
COMMIT = "0" * 40
# Each process opens the hub id with a cache of its own, notes what it opens, and writes the digest
# of the parts that its devices hold beside that of the same parts read from the directory itself.
PROGRAM = """
import argparse, hashlib, json, os, pathlib, sys
number, (folder, golden) = os.environ["JLRM_PROCESS_ID"], sys.argv[1:]
os.environ |= {"HF_HOME": f"{folder}/{number}", "HF_HUB_OFFLINE": "1"}
import jax, numpy as np
from jlrm.config import MeshConfig
from jlrm.runtime import cluster, commands, hosts
from jlrm.runtime.mesh import open_mesh, training_layout
from jlrm.weights import hf, hf_config, hf_files, source
opened, safe_open = [], hf_files.safe_open
def noted(path, **rest):
    opened.append(str(path))
    return safe_open(path, **rest)
hf_files.safe_open = noted
parser = argparse.ArgumentParser()
cluster.add_arguments(parser)
def bits(params):
    return [hashlib.sha256(np.asarray(s.data).tobytes()).hexdigest()
            for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
def main():
    with hosts.joined(parser.parse_args([]), {}, timeout=120.0):
        config = hf_config.read_config(source.model_files("org/model"), param_dtype=DTYPE)
        layout = training_layout(open_mesh(MeshConfig(fsdp=4, tensor=2)))
        fingerprint = source.fingerprint("org/model")
        got, from_hub = bits(source.read_params("org/model", config, layout)), list(opened)
        wanted = bits(hf.load_params(pathlib.Path(golden), config, layout))
        pathlib.Path(f"{folder}/{number}.json").write_text(json.dumps(
            {"opened": from_hub, "same": got == wanted, "parts": len(got), "base": fingerprint}))
commands.finish(main)
"""


def cache(home: pathlib.Path, name: str, has_weights: bool) -> None:
    """Lay a golden model out as the hub's client keeps what it has downloaded."""
    model = home / "hub/models--org--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    leave = None if has_weights else shutil.ignore_patterns("*.safetensors")
    shutil.copytree(GOLDEN / name, model / "snapshots" / COMMIT, ignore=leave)


def load(
    tmp_path: pathlib.Path, name: str, who: list[bool], dtype: str, broken: bool = False
) -> tuple[int, str]:
    """Load in as many processes; `who` has the weights. Return the exit code and what was said."""
    for number, has_weights in enumerate(who):
        cache(tmp_path / str(number), name, has_weights)
    if broken:
        next(tmp_path.glob("0/**/*.safetensors")).write_bytes(b"no weights")
    program = tmp_path / "load.py"
    program.write_text(PROGRAM.replace("DTYPE", repr(dtype)))
    command = ["bash", str(ROOT / "launch/local.sh"), str(len(who)), str(8 // len(who)), "--"]
    done = subprocess.run(
        [*command, sys.executable, str(program), str(tmp_path), str(GOLDEN / name)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": COMPILE_FASTEST},
        capture_output=True,
        text=True,
        timeout=240 * slowness(),
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "dtype"),
    [
        ([True, False, False, False], "float32"),
        ([True, False], "bfloat16"),
        ([True, True], "float32"),
    ],
)
def test_who_opens_the_files(tmp_path, who, dtype):
    code, said = load(tmp_path, "qwen2_untied", who, dtype)
    assert code == 0, said[-3000:]
    told = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(len(who))]
    assert [bool(each["opened"]) for each in told] == who
    assert all(each["same"] and each["parts"] for each in told)
    assert len({each["base"] for each in told}) == 1 and told[0]["base"]


@pytest.mark.slow
def test_what_the_reader_finds_wrong_ends_all(tmp_path):
    code, said = load(tmp_path, "qwen2_untied", [True, False], "float32", broken=True)
    assert code == 2 and "is not a readable safetensors file" in said, said[-3000:]
    assert "Process 0" in said and not list(tmp_path.glob("*.json"))


def test_bits_come_as_they_are():
    """One process: the same arithmetic, and the sign of a zero, a subnormal, the last bit."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        value = np.array([-0.0, 0.0, 1e-40, -1e-45, 1.0000001, -3.5, 3e38], dtype)
        again = passing.pass_on(value, value.shape, np.dtype(dtype))
        assert again.tobytes() == value.tobytes() and again.dtype == dtype
    odd = np.arange(3 * 5 * 7, dtype=ml_dtypes.bfloat16).reshape(3, 5, 7)
    np.testing.assert_array_equal(passing.pass_on(odd, odd.shape, odd.dtype), odd)


def test_a_tensor_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr(passing, "PIECE", 64)
    monkeypatch.setattr(passing, "LEAST", 16)
    value = np.random.default_rng(0).normal(size=(13, 17)).astype(np.float32)
    again = passing.pass_on(value, value.shape, value.dtype)
    np.testing.assert_array_equal(again, value)
