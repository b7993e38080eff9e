"""What a command computes on: said in one line, never a CPU beside a TPU, compiled only once."""

from __future__ import annotations

import http.server
import importlib.metadata
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from conftest import mesh_of

from jlrm.config import UsageError
from jlrm.runtime import cluster, devices, google, mesh

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server that knows these attributes of the VM."""
    known: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            self.send_response(200 if name in known else 404)
            self.end_headers()
            self.wfile.write(known.get(name, "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield known
    server.shutdown()
    server.server_close()


@pytest.fixture
def chip(monkeypatch):
    """A machine with a TPU chip, on which JAX finds the CPU alone, though nobody asked for it."""
    monkeypatch.setattr(devices, "tpu_files", lambda: ["/dev/accel0"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


@pytest.fixture
def uncached():
    before = (
        jax.config.values["jax_compilation_cache_dir"],
        jax.config.values["jax_compilation_cache_max_size"],
    )
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_compilation_cache_max_size", before[1])


def installed(monkeypatch, **versions: str) -> None:
    """Let exactly these packages be installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)


def test_devices_mesh_and_versions_stand_in_one_line():
    line = devices.described(mesh_of(2, 2, 1))
    assert line.startswith("4 x cpu (mesh: data 2, fsdp 2, tensor 1); jlrm ")
    assert f"jax {jax.__version__}" in line and "\n" not in line and "libtpu" not in line


def test_a_tpu_that_jax_does_not_find_is_no_reason_to_compute_on_the_cpu(chip, monkeypatch):
    installed(monkeypatch)
    with pytest.raises(UsageError, match=r"/dev/accel0.*libtpu is not installed.*JAX_PLATFORMS"):
        devices._refuse_cpu()
    installed(monkeypatch, libtpu="0.0.42")
    with pytest.raises(UsageError, match="another process may hold it"):
        devices._refuse_cpu()


def test_the_process_that_holds_the_tpu_is_named(chip, monkeypatch, tmp_path):
    installed(monkeypatch, libtpu="0.0.42")
    file = tmp_path / "accel0"
    file.touch()
    monkeypatch.setattr(devices, "tpu_files", lambda: [str(file)])
    monkeypatch.setattr(google, "is_here", lambda: True)
    code = f"f = open({str(file)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
        with pytest.raises(UsageError, match=rf"process {holder.pid} holds it \(.*python"):
            devices._refuse_cpu()
        holder.kill()


@pytest.mark.parametrize("asked", ["cpu", "tpu,cpu"])
def test_who_asks_for_the_cpu_gets_it(chip, asked):
    with pytest.raises(UsageError):
        devices._refuse_cpu()
    jax.config.update("jax_platforms", asked)
    devices._refuse_cpu()  # raises nothing


def test_a_vfio_file_is_a_tpus_at_google_alone(chip, monkeypatch):
    monkeypatch.setattr(devices, "tpu_files", lambda: ["/dev/vfio/0"])
    monkeypatch.setattr(google, "is_here", lambda: False)
    devices._refuse_cpu()
    monkeypatch.setattr(google, "is_here", lambda: True)
    with pytest.raises(UsageError, match="/dev/vfio/0"):
        devices._refuse_cpu()


def test_programs_are_kept_by_processor_or_in_the_runs_store(uncached, monkeypatch, tmp_path):
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path))
    devices._keep_programs("")
    (directory,) = (tmp_path / "compiled").iterdir()
    assert jax.config.values["jax_compilation_cache_dir"] == str(directory)
    assert jax.config.values["jax_compilation_cache_max_size"] == devices.MOST_BYTES
    devices._keep_programs("gs://bucket/run")  # what is set stays
    assert jax.config.values["jax_compilation_cache_dir"] == str(directory)
    jax.config.update("jax_compilation_cache_dir", None)
    devices._keep_programs("gs://bucket/run/")
    assert jax.config.values["jax_compilation_cache_dir"] == "gs://bucket/run/compiled"


def test_a_home_that_cannot_be_written_keeps_nothing(uncached, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path / "file"))
    devices._keep_programs("")
    assert not jax.config.values["jax_compilation_cache_dir"]
    assert devices.described(mesh_of(1, 1, 1)).endswith("compiled programs are not kept")


@pytest.mark.parametrize(
    ("attributes", "are_several"),
    [
        ({}, False),
        ({"worker-network-endpoints": "a:b:c"}, False),
        ({"worker-network-endpoints": "a:b:c,d:e:f"}, True),
        ({"tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({"tpu-env": "MEGASCALE_NUM_SLICES: '1'\n"}, False),
        ({"tpu-env": "MEGASCALE_NUM_SLICES: ''\nnonsense\n: \n"}, False),
    ],
)
def test_slices_of_one_host_are_known_by_their_metadata(
    metadata, monkeypatch, attributes, are_several
):
    for name in ("SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(devices, "tpu_files", lambda: ["/dev/accel0"])
    metadata.update(attributes)
    assert cluster._are_several() is are_several


class Chip:
    """A chip of a slice whose network has no shape that a mesh could follow."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, number: int, slice_index: int) -> None:
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index


def test_a_mesh_that_follows_no_network_takes_chips_slice_by_slice(monkeypatch):
    def refuse(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(mesh.mesh_utils, "create_hybrid_device_mesh", refuse)
    chips = [Chip(number, number % 2) for number in range(6)]
    placed = mesh._arranged([2, 3, 1], chips)
    assert np.vectorize(lambda chip: chip.slice_index)(placed[0]).tolist() == [[0], [0], [0]]
    assert np.vectorize(lambda chip: chip.id)(placed[1]).tolist() == [[1], [3], [5]]


@pytest.mark.slow
def test_a_host_that_never_comes_is_said_after_the_time_allowed():
    code = """
import argparse
from jlrm.runtime import cluster, hosts
parser = argparse.ArgumentParser()
cluster.add_arguments(parser)
flags = ["--coordinator", "127.0.0.1:{port}", "--num-processes", "2", "--process-id", "0"]
hosts.LOADING_SECONDS = 1.0
with hosts.joined(parser.parse_args(flags), {{}}, 3.0):
    print("went on")
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = subprocess.run(
        [sys.executable, "-c", code.format(port=port)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1 and "went on" not in ended.stdout
    assert "error: Not all processes of the run have come within 3 s" in ended.stderr
