"""Shared set-up: 8 fake CPU devices, strict ranks, tiny models, where reference data lies."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

if "JLRM_CACHE" not in os.environ:  # one for all processes of these tests, and none before them
    os.environ["JLRM_CACHE"] = tempfile.mkdtemp(prefix="jlrm-tests-")
    atexit.register(shutil.rmtree, os.environ["JLRM_CACHE"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# jax 0.11 and later fuse float32 programs otherwise: two forms of one number differ by up to 1e-5
# of it there (measured on 0.12), and by nothing beyond the absolute bounds on 0.10.
IS_OLD_JAX = importlib.metadata.version("jax").startswith("0.10.")
ROUNDING = 0.0 if IS_OLD_JAX else 1e-5

# Programs here run for milliseconds; what costs is compiling them well. The emitters of fusions
# take most of that; jax 0.11 has no other ones, and refuses the flag, as libtpu does. A program
# cut into 32 modules for as many threads costs a fifth more than in one piece.
COMPILE_FAST = os.environ.get(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
COMPILE_FASTEST = COMPILE_FAST + IS_OLD_JAX * (
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = COMPILE_FASTEST

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from qwen import qwen3, qwen3_official, qwen25  # noqa: F401 (fixtures)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # reads the flags
os.environ["XLA_FLAGS"] = COMPILE_FAST  # for libtpu in this process, and in those it starts

from endpoints import serve  # noqa: F401 (a fixture)

from jlrm.config import MeshConfig
from jlrm.data.worlds import toy
from jlrm.model.qwen import QwenConfig, hidden_states
from jlrm.model.visibility import BLOCK, Packing
from jlrm.runtime import storage
from jlrm.runtime.mesh import AXES, create_mesh

pytest_plugins = ["programs", "tiers"]

# Whoever starts us in the background may have switched Ctrl-C off, for all that we start too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def slowness() -> float:
    """Return how many times longer than on a quiet machine things may take: runnable per core.

    Bounds on the time of other processes are multiplied by it.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


TESTS = pathlib.Path(__file__).parent
GOLDEN = TESTS / "golden"
ARCHITECTURES = {
    "qwen2_untied": {"qkv_bias": True, "qk_norm": False, "tie_word_embeddings": False},
    "qwen2_tied": {"qkv_bias": True, "qk_norm": False, "tie_word_embeddings": True},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "tie_word_embeddings": True},
    "qwen3_moe": {
        "qkv_bias": False,
        "qk_norm": True,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def required(variable: str, reason: str) -> None:
    """Skip with a reason, unless CI has switched on what must not be skipped."""
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
    """The folder of reference data, which is not part of the project."""
    default = TESTS.parent.parent / "shared" / "data"
    path = pathlib.Path(os.environ.get("JLRM_REFERENCE_DATA", default))
    if not path.is_dir():
        required("JLRM_REQUIRE_REFERENCE", f"there is no reference data at {path}")
    return path


@pytest.fixture(scope="session")
def cases(reference) -> pathlib.Path:
    """The folder of faults that users reported of such tools, with rows and a server."""
    path = reference.parent / "cases"
    if not path.is_dir():
        required("JLRM_REQUIRE_REFERENCE", f"there are no cases at {path}")
    return path


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Let a test whose disk fails see it at once."""
    monkeypatch.setattr(storage, "PAUSES", ())


@pytest.fixture(scope="session", autouse=True)
def one_toy_tokenizer(tmp_path_factory):
    """Train the tokenizer of the toy world once a size: nearly every run of these tests has it."""
    train, known = toy.save_tokenizer, {}

    def save(directory: pathlib.Path) -> None:
        if toy.VOCAB_SIZE not in known:
            trained = tmp_path_factory.mktemp("tokenizer")
            train(trained)
            known[toy.VOCAB_SIZE] = {path.name: path.read_bytes() for path in trained.iterdir()}
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in known[toy.VOCAB_SIZE].items():
            (directory / name).write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "save_tokenizer", save)
        yield


@pytest.fixture(scope="module")
def no_pages():
    """Spare the seconds that a run takes to draw its page; tests/test_report.py draws them all."""
    from jlrm.reports import run_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page, "write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Give back what a file compiled.

    Each program holds some dozen memory maps, of which Linux grants a process 65,530 by default.
    Beyond that XLA crashes where it allocates next.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def torch():
    """PyTorch, for live comparison with `transformers`."""
    try:
        import torch
    except ImportError:
        required("JLRM_REQUIRE_TORCH", "torch is not installed")
    return torch


@pytest.fixture
def mesh():
    """A mesh of one device."""
    return mesh_of(1, 1, 1)


def mesh_of(data: int, fsdp: int, tensor: int):
    """Return a mesh over as many of the fake devices as it needs."""
    return create_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def tpu_mesh(topology: str, *shape: int) -> Mesh:
    """Return a mesh of the chips of a slice that need not be here: libtpu compiles for it."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
    )
    try:
        import libtpu  # noqa: F401
    except ImportError:
        required("JLRM_REQUIRE_LIBTPU", "libtpu is not installed (pip install 'jlrm[plan]')")
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.array(described.devices).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tiny_config(architecture: str = "qwen2_tied", **changes) -> QwenConfig:
    """Return a float32 model small enough for any test, and divisible by the meshes tests use."""
    fields = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if architecture.startswith("qwen3") else 8,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "compute_dtype": "float32",
        **ARCHITECTURES[architecture],
        **changes,
    }
    return QwenConfig(**fields)


def plain_packing(key_mask) -> Packing:
    """Return rows of one causal sequence each, padded anywhere, as packed rows."""
    group = jnp.asarray(key_mask, jnp.int32)
    num_rows, num_slots = group.shape
    return Packing(group, jnp.zeros_like(group), jnp.full(num_rows, num_slots))


def plain_states(config, layout, params, tokens, positions, key_mask):
    """Return the hidden states of rows of one causal sequence each, padded anywhere."""
    width = tokens.shape[1]
    more = ((0, 0), (0, -width % BLOCK))
    tokens, positions, key_mask = (jnp.pad(x, more) for x in (tokens, positions, key_mask))
    packing = plain_packing(key_mask)
    return hidden_states(config, layout, params, tokens, positions, packing)[:, :width]


def dense_attention(q, k, v, mask):
    """Attend over all keys at once: what the skipping of blocks is compared with."""
    num_groups = q.shape[2] // k.shape[1]
    grouped = q.reshape(*q.shape[:2], k.shape[1], num_groups, q.shape[3])
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * q.shape[3] ** -0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v).reshape(q.shape)
