"""Whatever a model's files or a config hold, the outcome is a model or one sentence."""

from __future__ import annotations

import copy
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import GOLDEN, mesh_of, tiny_config

from jlrm.config import RunError, UsageError
from jlrm.data.tokenizer import control_tokens, encode, prompt_template, token_bytes
from jlrm.data.worlds import toy
from jlrm.model.rope import angles
from jlrm.runtime import settings
from jlrm.runtime.mesh import training_layout
from jlrm.sampling.policy import open_policy
from jlrm.weights import hf, hf_config, hf_files

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 0.5, -0.0, 1e308, 10**30, -(10**30), 10**400),
    *("", "64", "x", "\x00", "\ud800", "é" * 300, "x" * 10**4, "{{", "<|im_end|>", [], {}, [[]]),
    *([None], ["x"], [1, "a", None], {"": 0}, {"a": {"b": []}}, float("nan"), float("inf")),
    *(float("-inf"), {"rope_type": "yarn"}, {"rope_theta": None}, ["full_attention"]),
)


def mutate(rng: random.Random, tree: Any) -> Any:
    """Return JSON with one value, at any depth, replaced, removed, doubled or put elsewhere."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(VALUES))
    tree = copy.copy(tree)
    key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    kind = rng.randrange(6)
    if kind == 0:
        del tree[key]
    elif kind == 1 and isinstance(tree, dict):
        tree[rng.choice(["x", "", *tree])] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 2:
        tree[key] = tree[rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))]
    else:
        tree[key] = mutate(rng, tree[key])
    return tree


def spoil(rng: random.Random, text: str) -> bytes:
    """Return text with its bytes spoilt: cut, in another encoding, nested deep, single bytes."""
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(raw[: rng.randrange(len(raw) + 1)])
    if kind == 1:
        return text.encode(rng.choice(["utf-16", "utf-32", "cp037", "utf-8-sig"]), "replace")
    if kind == 2:
        return rng.choice([b"[", b'{"a":', b"- ", b"{a: "]) * rng.choice([10, 10**5])
    for _ in range(rng.randrange(1, 9)):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def spoilt_json(rng: random.Random, valid: dict[str, Any]) -> bytes:
    tree = valid
    for _ in range(rng.randrange(1, 4)):
        tree = mutate(rng, tree)
    text = json.dumps(tree)
    return spoil(rng, text) if rng.random() < 0.2 else text.encode()


def spoilt_yaml(rng: random.Random, valid: str) -> bytes:
    if rng.random() < 0.3:
        return spoil(rng, valid)
    texts = [
        ".inf",
        "-.inf",
        ".nan",
        "1e400",
        "!!binary aGk=",
        "2001-99-99",
        "&a [*a]",
        "*b",
        "? x",
    ]
    texts += ["0x_", "!!int _", '"\\ud800"', "!!set {a}", "9" * 5000, "[" * 3000, "!!python/name:x"]
    if rng.random() < 0.5:
        tree = mutate(rng, mutate(rng, yaml.safe_load(valid)))
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
    lines = valid.split("\n")
    places = [i for i, line in enumerate(lines) if ":" in line and not line.startswith("#")]
    place = rng.choice(places)
    lines[place] = f"{lines[place].partition(':')[0]}: {rng.choice(texts)}"
    return "\n".join(lines).encode()


def outcome(read: Callable[[], Any]) -> str:
    """Return the sentence that reading ends with, or ""; anything else comes up."""
    try:
        read()
    except (UsageError, RunError) as error:
        return str(error)
    return ""


class Files:
    """A whole tiny model, of which one file at a time is spoilt."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        toy.save_tokenizer(directory)
        self.model = tiny_config(vocab_size=toy.VOCAB_SIZE)
        described = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
        self.valid: dict[str, dict[str, Any]] = {
            "config.json": described | {"rope_parameters": ROPE | {"rope_theta": 1e4}},
            "generation_config.json": {"eos_token_id": [2, 0], "pad_token_id": 0},
            "tokenizer_config.json": {
                **json.loads((directory / "tokenizer_config.json").read_text()),
                "chat_template": TEMPLATE,
                "extra_special_tokens": ["<|im_start|>"],
                "added_tokens_decoder": {"0": {"content": toy.PAD, "special": True}},
            },
            "model.safetensors.index.json": {
                "metadata": {"total_size": 1},
                "weight_map": dict.fromkeys(["model.norm.weight", "a"], "model-1.safetensors"),
            },
        }
        shutil.copyfile(GOLDEN / "qwen3" / hf_files.WEIGHTS, directory / "model-1.safetensors")
        for name in self.valid:
            self.write(name, json.dumps(self.valid[name]).encode())

    def write(self, name: str, content: bytes) -> None:
        (self.directory / name).write_bytes(content)

    def read(self, name: str) -> None:
        if name == "config.json":
            hf_config.stored_dtype(self.directory)
            config = hf_config.read_config(self.directory)
            angles(
                np.zeros((1, 1), np.int32), config.head_dim, config.rope_theta, config.rope_scaling
            )
            assert len(hf.tensors(config)) < 2 * 10**4
        elif name == "model.safetensors.index.json":
            config = hf_config.config_from_hf(self.valid["config.json"])
            hf.load_params(self.directory, config, training_layout(mesh_of(1, 1, 1)))
        else:
            policy = open_policy(self.model, mesh_of(1, 1, 1), self.directory)
            prompt_template(policy.tokenizer, "jlrm")
            token_bytes(policy.tokenizer), control_tokens(policy.tokenizer)
            encode(policy.tokenizer, ["a <|im_end|>"])

    def check(self, name: str, seed: int) -> bool:
        """Spoil one file, read the model, mend it; return whether it was refused."""
        self.write(name, spoilt_json(random.Random(f"{name} {seed}"), self.valid[name]))
        message = outcome(lambda: self.read(name))
        self.write(name, json.dumps(self.valid[name]).encode())
        assert "\n" not in message and len(message) < 1500, message
        return bool(message)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("model"))


NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
FEW_OR_MANY = pytest.mark.parametrize(
    "seeds", [range(15), pytest.param(range(15, 200), marks=pytest.mark.slow)], ids=["few", "many"]
)


@FEW_OR_MANY
@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_file_of_a_model_is_read_or_refused_in_one_sentence(name, seeds, files):
    assert not outcome(lambda: files.read(name))
    refused = sum(files.check(name, seed) for seed in seeds)
    assert 0 < refused < len(seeds)  # some of the changes mean nothing


def check_yaml(file: pathlib.Path, seed: int) -> bool:
    rng = random.Random(seed)
    file.write_bytes(spoilt_yaml(rng, rng.choice(CONFIGS).read_text()))
    message = outcome(lambda: settings.load(file))
    assert "\n" not in message and len(message) < 1500, message
    return bool(message)


@pytest.mark.slow
@FEW_OR_MANY
def test_a_spoilt_config_is_read_or_refused_in_one_sentence(seeds, tmp_path):
    refused = sum(check_yaml(tmp_path / "c.yaml", seed) for seed in seeds)
    assert 0 < refused < len(seeds)
