"""Where the weights of a run come from: a Hugging Face directory, an earlier run, or a preset."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from jlrm.config import Config, UsageError
from jlrm.model import lora, qwen
from jlrm.model.lora import LoRA
from jlrm.model.quantised import quantise_layers, widen_all
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime import hosts, storage
from jlrm.runtime.mesh import Layout
from jlrm.runtime.settings import from_dict
from jlrm.weights import hf, hf_config, hf_files, passing, reading, steps
from jlrm.weights.presets import PRESETS, preset

ORGANISATIONS = ("qwen", "meta-llama", "mistralai")  # of the hub, whose models are presets
DESCRIPTION = "config.json", "adapter_config.json"
ENDS = 1 << 20  # bytes at each end of a file that stand for it


class NotHere(UsageError):
    """A model would have to be downloaded."""


def model_files(source: str) -> pathlib.Path:
    """Return where everything of a model but its weights lies; `source` as in `model.path`.

    Raises:
      UsageError: no such model, or no such checkpoint of a run.
    """
    if not steps.is_run(source):
        return hf.resolve(source)
    steps.find(source)
    return side_files(source) / "model"


def num_labels(source: str) -> int:
    """Return how many scores a reward model gives a text; 0: the model writes text itself."""
    if not steps.is_run(source):
        return hf_config.num_labels(hf.resolve(source, DESCRIPTION))
    meta = steps.read_meta(steps.find(source))
    if meta.get("stage") != "reward_model":
        return 0
    return len(hf_config.LABELS[meta["config"]["reward_model"]["kind"]])


def read_params(source: str, model: QwenConfig, layout: Layout) -> Params:
    """Read a model's weights onto the devices; `source` as in `model.path`.

    Each process reads its own parts, unless one alone has the files: then that one passes them on.
    Adapters of a run are merged into their base, unless `model` has such adapters itself.
    """
    if steps.is_run(source):
        return _read_run(source, model, layout)
    directory = hf.resolve(source)
    have = hosts.gather("the weights", hf_files.are_here(directory))  # once all is downloaded
    if all(have) or not any(have):  # where nobody has them, all say so
        return hf.load_params(directory, model, layout)
    return passing.load_params(directory, model, layout, reader=have.index(True))


def _read_run(source: str, model: QwenConfig, layout: Layout) -> Params:
    step = steps.find(source)
    if (config := config_with_adapters(step)) is None:
        return reading.restore_params(step, qwen.abstract_params(model, layout))
    side = side_files(source) / "model"
    of_run = as_computed(config, hf_config.read_config(side), hf_config.stored_dtype(side))
    of_run = dataclasses.replace(of_run, num_labels=model.num_labels)
    adapters, _ = lora.split(of_run.lora, qwen.abstract_params(of_run, layout))
    params = lora.join(read_base(config, of_run, layout), reading.restore_params(step, adapters))
    if model.lora is not None:
        return params
    return merged(of_run.lora, params, model, layout)


def merged(adapters: LoRA | None, params: Params, model: QwenConfig, layout: Layout) -> Params:
    """Return parameters without adapters that compute the same, as `model` stores them."""

    def merge(params: Params) -> Params:
        params = jax.tree.map(lambda x: x.astype(model.param_dtype), widen_all(params))
        return {**params, "layers": jax.vmap(partial(lora.merge, adapters))(params["layers"])}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, qwen.abstract_params(model, layout))
    return jax.jit(merge, out_shardings=shardings)(params)


def config_with_adapters(step: Any) -> Config | None:
    """Return the config of the run that saved a step, if the step holds adapters.

    Raises:
      UsageError: their base is no longer what they were trained on.
    """
    meta = steps.read_meta(step)
    if not meta.get("config", {}).get("lora", {}).get("rank"):
        return None
    config, wanted = from_dict(meta["config"]), meta["made_from"]["base"].partition("+")[0]
    if config.model.path and wanted != (found := fingerprint(config.model.path)):
        raise UsageError(
            f"{step} holds adapters of model.path={config.model.path}, whose weights were "
            f"{wanted} then and are {found} now (weights/source.py: fingerprint). Bring them back."
        )
    return config


def read_base(config: Config, model: QwenConfig, layout: Layout) -> Params:
    """Return what lies beneath a run's adapters, as it was born or as its files have it."""
    plain = dataclasses.replace(model, lora=None, num_labels=0)
    if config.model.path:
        params = read_params(config.model.path, plain, layout)
    else:
        params = qwen.init(plain, layout, config.run.seed)
    _, wanted = lora.split(model.lora, qwen.abstract_params(model, layout))
    params = lora.of_paths(params, wanted)  # a reward model has a head of its own
    return params if config.lora.base == "stored" else quantise_program(model, layout)(params)


def quantise_program(model: QwenConfig, layout: Layout) -> Any:
    """Return the jitted program parameters of a base -> the same with its matrices quantised."""
    assert model.lora is not None
    _, wanted = lora.split(model.lora, qwen.abstract_params(model, layout))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return jax.jit(partial(quantise_layers, kind=model.lora.base), out_shardings=shardings)


def read_description(config: Config) -> QwenConfig:
    """Return the architecture of `model.path`, of which config.json alone is downloaded.

    Raises:
      UsageError: there is none, or none that can be trained so.
    """
    directory = hf.resolve(config.model.path, DESCRIPTION)
    stored = hf_config.stored_dtype(directory)
    return as_computed(config, hf_config.read_config(directory), stored)


def as_computed(config: Config, model: QwenConfig, stored: str) -> QwenConfig:
    """Return an architecture as a run computes it; `stored`: the dtype of the model's files.

    Raises:
      UsageError: what experts do not have is asked for: adapters, int8, `sampling.exact`.
    """
    source, settings = config.model, config.lora
    if model.num_experts:
        _check_experts(config)
    numerics: dict[str, Any] = {"compute_dtype": source.compute_dtype, "remat": source.remat}
    numerics["exact"] = config.sampling.exact
    if not settings.rank:
        return dataclasses.replace(model, param_dtype=source.param_dtype, **numerics)
    adapters = lora.of_settings(settings, source.param_dtype)
    return dataclasses.replace(model, param_dtype=stored, lora=adapters, **numerics)


def _check_experts(config: Config) -> None:
    adapted = [name for name in config.lora.targets if name in ("gate", "up", "down")]
    if config.lora.rank and adapted:
        raise UsageError(
            f"lora.targets has {', '.join(adapted)}, and this model has experts in the place of "
            "its MLP, which take no adapters here. Set lora.targets=[q,k,v,o]."
        )
    if config.sampling.exact:
        raise UsageError(
            "sampling.exact=true does not hold for models with experts. Leave it out: "
            "grpo.loss.importance_cap corrects for the gap."
        )
    if config.sampling.weights == "int8":
        raise UsageError(
            "sampling.weights=int8: each step would widen all experts, which costs more than it "
            "saves. Leave it out for a model with experts."
        )


def read_model(config: Config) -> QwenConfig:
    """Return the architecture without a download: of a preset, a local directory or a run.

    The official models of the presets are known by their hub id.

    Raises:
      NotHere: it would have to be downloaded.
      UsageError: as of `as_computed`.
    """
    source = config.model
    if source.preset:
        return as_computed(config, preset(source.preset), "float32")
    directory = pathlib.Path(source.path).expanduser()
    if steps.is_run(source.path):
        directory = side_files(source.path) / "model"
    if directory.is_dir():
        stored = hf_config.stored_dtype(directory)
        return as_computed(config, hf_config.read_config(directory), stored)
    organisation, _, name = source.path.lower().replace("-instruct", "").rpartition("/")
    if organisation in ORGANISATIONS and name in PRESETS:
        return as_computed(config, preset(name), "bfloat16")
    raise NotHere(
        f"model.path={source.path} is no local directory, and nothing is downloaded to be measured."
        " Name a shape instead: model.path= model.preset=qwen2.5-3b model.tokenizer=toy."
    )


def fingerprint(source: str) -> str:
    """Return a digest of a model's files: names, sizes, and the ends of each.

    Reading all of the weights would take as long as loading them. `source` as in `model.path`.
    Each process calls it; one without the weights takes the digest of the first that has them.
    """
    if steps.is_run(source):
        directory: Any = steps.find(source)  # may be in a store
        files = _files(directory)
    else:
        directory = hf.resolve(source)  # where results of an evaluation may lie in a folder below
        kinds = (".safetensors", ".json", ".jinja", ".txt")
        files = (file for file in directory.iterdir() if file.name.endswith(kinds))
        if not hf_files.are_here(directory) and hosts.count() > 1:
            return _of_others(None)
    digest = hashlib.sha256()
    for file in sorted(files):
        size = getattr(about := file.stat(), "st_size", None) or getattr(about, "length", 0)
        digest.update(f"{file.relative_to(directory)} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(ENDS))
            content.seek(max(0, size - ENDS))
            digest.update(content.read())
    return _of_others(digest.hexdigest()[:16])


def _of_others(mine: str | None) -> str:
    """Return this process's digest or, where it has none, that of the first that has one."""
    digests = hosts.gather("the weights' digest", mine)
    return mine or next((digest for digest in digests if digest), "")


def _files(directory: Any) -> Iterator[Any]:
    for path in directory.iterdir():  # paths in a store do not search below themselves
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def side_files(source: str) -> pathlib.Path:
    """Return a local directory with all of an earlier run, `RUN[@STEP]`, but its checkpoints."""
    mirror = storage.mirror(steps.split(source)[0])
    mirror.pull()
    return mirror.local
