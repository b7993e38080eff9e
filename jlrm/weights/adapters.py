"""Adapters outside of a run: directories of PEFT, written and read, and single merged tensors.

PEFT names an adapter by the tensor that it moves: `q_proj.weight` has `q_proj.lora_A.weight`, our
A transposed, `q_proj.lora_B.weight` and, of DoRA, `q_proj.lora_magnitude_vector`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jlrm.config import Config, LoRAConfig, MeshConfig, UsageError
from jlrm.model import lora, qwen
from jlrm.model.lora import LoRA
from jlrm.model.quantised import MATRICES, quantise, widen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime.mesh import Layout, create_mesh, global_array, training_layout
from jlrm.runtime.settings import read_json
from jlrm.weights import hf, hf_config, reading, steps
from jlrm.weights.hf_files import is_finite, open_tensors
from jlrm.weights.source import (
    as_computed,
    config_with_adapters,
    merged,
    num_labels,
    read_params,
    side_files,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "m"}
# What an adapter_config.json may ask for that is computed otherwise.
REFUSED = (
    *("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "use_qalora", "use_bdlora"),
    *("fan_in_fan_out", "layer_replication", "target_parameters", "trainable_token_indices"),
)

Read = Callable[[hf.Tensor], np.ndarray]  # one tensor of a model, in our shape


def reader(source: str, model: QwenConfig, stack: contextlib.ExitStack) -> Read:
    """Return what reads single tensors of a model, with adapters merged; `source`: `model.path`.

    Args:
      stack: keeps files open.
    """
    if not steps.is_run(source):
        directory, shapes = hf.resolve(source), {t.name: t.hf_shape for t in hf.tensors(model)}
        files = open_tensors(directory, shapes, stack, is_tied=model.tie_word_embeddings)
        return lambda tensor: hf.read_whole(files, tensor, np.float32)
    step = steps.find(source)
    reading.check_files(step)
    wanted = steps.read_digests(step)
    config = config_with_adapters(step)
    if config is None:
        return lambda tensor: reading.read_tensor(step, tensor.path, tensor.index, wanted)
    of_run = of_step(source)
    if config.model.path:
        base = reader(config.model.path, dataclasses.replace(model, num_labels=0), stack)
    else:
        layout = training_layout(create_mesh(MeshConfig(), jax.devices()[:1]))
        plain = dataclasses.replace(of_run, lora=None)
        born = lora.flatten(qwen.init(plain, layout, config.run.seed), sep=".")
        base = lambda tensor: np.asarray(born[tensor.path])[tensor.index]  # noqa: E731
    stored = np.dtype(getattr(ml_dtypes, of_run.param_dtype, of_run.param_dtype))

    def read(tensor: hf.Tensor) -> np.ndarray:
        if tensor.path == "score":
            return reading.read_tensor(step, tensor.path, tensor.index, wanted)
        value = base(tensor).astype(stored).astype(np.float32)  # as it lay beneath the adapters
        kind, path = of_run.lora, tensor.path
        name = path.rpartition(".")[2]
        if kind and kind.base != "stored" and name in MATRICES:
            value = np.asarray(widen(quantise(value, kind.base)))
        if kind is None or name not in kind.targets:
            return value
        names = [f"{path}{lora.MARK}{part}" for part in _parts(kind)]
        a, b, *m = (reading.read_tensor(step, name, tensor.index, wanted) for name in names)
        # As lora.merge does it, but on the host: an export needs no accelerator.
        value += np.float32(kind.scale) * np.tensordot(a, b, ((-1,), (-1,))).astype(np.float32)
        for magnitude in m:
            lengths = np.linalg.norm(value.reshape(-1, *magnitude.shape), axis=0)
            value *= magnitude / lengths
        return value

    return read


def of_step(source: str) -> QwenConfig:
    """Return the architecture of a run's step, with its adapters.

    Raises:
      UsageError: it has none.
    """
    if (config := config_with_adapters(steps.find(source))) is None:
        raise UsageError(f"{source} has no adapters: all its weights were trained (lora.rank=0).")
    side = side_files(source) / "model"
    return as_computed(config, hf_config.read_config(side), hf_config.stored_dtype(side))


def write(source: str, directory: pathlib.Path) -> None:
    """Write the adapters of a run's step, `RUN[@STEP]`, as a directory that PEFT loads."""
    step, model = steps.find(source), of_step(source)
    reading.check_files(step)
    wanted, config, adapters = steps.read_digests(step), config_with_adapters(step), model.lora
    assert config is not None and adapters is not None
    held = {}
    for tensor, name, part in _moved(model, adapters):
        path = f"{tensor.path}{lora.MARK}{part}"
        value = reading.read_tensor(step, path, tensor.index, wanted).astype(np.float32)
        flat = value.reshape(-1, value.shape[-1]) if part != "m" else value.reshape(-1)
        held[PREFIX + name] = np.ascontiguousarray(flat.T if part == "a" else flat)
    modules = sorted({name.split(".")[-3 if "weight" in name[-6:] else -2] for name in held})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": adapters.rank,
        "lora_alpha": config.lora.alpha,
        "use_rslora": config.lora.rank_stabilised,
        "use_dora": adapters.has_magnitude,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if num_labels(source):
        score = reading.read_tensor(step, "score", (), wanted).astype(np.float32)
        held[f"{PREFIX}score.weight"] = np.ascontiguousarray(score.T)
        fields |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    save_file(held, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(fields, indent=2))


def read(directory: pathlib.Path, model: QwenConfig, layout: Layout) -> tuple[Params, LoRA]:
    """Read a directory of PEFT onto the devices, with what kind of adapters it holds.

    Raises:
      UsageError: there is none, or its adapters are none that this code computes.
    """
    fields = read_json(directory / CONFIG)
    asked = [name for name in REFUSED if fields.get(name)]
    if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none" or asked:
        what = ", ".join(asked) or f"{fields.get('peft_type')}, bias={fields.get('bias')}"
        raise UsageError(f"{directory / CONFIG} asks for what is not computed here: {what}.")
    try:
        held = load_file(directory / WEIGHTS)
        settings = LoRAConfig(
            rank=int(fields["r"]),
            alpha=float(fields["lora_alpha"]),
            rank_stabilised=bool(fields.get("use_rslora")),
            magnitude=bool(fields.get("use_dora")),
        )
    except Exception as error:  # the library raises its own kinds and OSError alike
        raise UsageError(f"{directory} can't be read as an adapter of PEFT: {error}.") from None
    every = {PREFIX + name: (t, part) for t, name, part in _moved(model, _all(settings))}
    targets = {t.path.rpartition(".")[2] for name, (t, _) in every.items() if name in held}
    found = dataclasses.replace(_all(settings), targets=tuple(sorted(targets)))
    wanted = {PREFIX + name: (t, part) for t, name, part in _moved(model, found)}
    if unlike := sorted(held.keys() ^ wanted.keys()):
        raise UsageError(
            f"{directory}: {unlike[0]} is {'unknown' if unlike[0] in held else 'missing'}. Wanted "
            "adapters of q, k, v, o, gate, up or down, and in every layer the same."
        )
    if broken := [name for name, value in held.items() if not is_finite(value)]:
        raise UsageError(f"{directory}: {broken[0]} holds NaN or infinite numbers.")
    return _placed(directory, held, wanted, model, found, layout), found


def read_start(config: Config, model: QwenConfig, layout: Layout) -> Params:
    """Return what a run trains that begins from `model.path` with the adapter `model.adapter`.

    A run that trains adapters goes on with these, so they must be of its own kind. A run that
    trains all weights begins from both, merged.

    Raises:
      UsageError: they are of another kind, or can't be read.
    """
    directory = pathlib.Path(config.model.adapter).expanduser()
    adapters, kind = read(directory, model, layout)
    if model.lora is None:
        base = read_params(config.model.path, model, layout)
        return merged(kind, lora.join(base, adapters), model, layout)
    if (asked := dataclasses.replace(model.lora, dtype=kind.dtype, base=kind.base)) != kind:
        raise UsageError(
            f"model.adapter={config.model.adapter} holds {kind}, and the settings of lora ask for "
            f"{asked}. Set them alike, or lora.rank=0 to train all weights from both, merged."
        )
    return adapters


def digest(directory: pathlib.Path) -> str:
    """Return a digest of what a directory of PEFT says.

    Raises:
      UsageError: it is none.
    """
    try:
        content = b"".join((directory / name).read_bytes() for name in (CONFIG, WEIGHTS))
    except OSError as error:
        raise UsageError(
            f"model.adapter={directory} is no directory of PEFT ({CONFIG}, {WEIGHTS}): "
            f"{error.strerror}."
        ) from None
    return hashlib.sha256(content).hexdigest()[:16]


def _placed(
    directory: pathlib.Path,
    held: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[hf.Tensor, str]],
    model: QwenConfig,
    kind: LoRA,
    layout: Layout,
) -> Params:
    """Return the adapters as this model has them, on the devices."""
    kind = dataclasses.replace(kind, dtype=model.lora.dtype if model.lora else kind.dtype)
    model = dataclasses.replace(model, lora=kind)
    abstract, _ = lora.split(kind, qwen.abstract_params(model, layout))
    flat = lora.flatten(abstract, sep=".")
    whole = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flat.items()}
    for name, (tensor, part) in wanted.items():
        into = whole[f"{tensor.path}{lora.MARK}{part}"][tensor.index]
        value = held[name].astype(np.float32)
        value = value.T if part == "a" else value
        if value.size != into.size or (part != "m" and value.shape[-1] != into.shape[-1]):
            raise UsageError(f"{directory}: {name} {held[name].shape} does not fit the model.")
        into[...] = value.reshape(into.shape)
    placed = {
        path: global_array(value.astype(flat[path].dtype), flat[path].sharding)
        for path, value in whole.items()
    }
    return lora.unflatten(placed, sep=".")


def _all(settings: LoRAConfig) -> LoRA:
    return lora.of_settings(settings, "float32")


def _moved(model: QwenConfig, adapters: LoRA) -> list[tuple[hf.Tensor, str, str]]:
    """List what PEFT stores: the tensor that is moved, the name without prefix, and our part."""
    return [
        (tensor, tensor.name.removesuffix("weight") + name, part)
        for tensor in hf.tensors(model)
        if tensor.num_inputs
        and tensor.path.rpartition(".")[2] in adapters.targets
        and len(tensor.index) == 1  # experts have none
        for name, part in PARTS.items()
        if part in _parts(adapters)
    ]


def _parts(adapters: LoRA) -> str:
    return "abm" if adapters.has_magnitude else "ab"
