"""Where the weights of a run come from: a Hugging Face directory, an earlier run, or a preset."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

from jlrm.config import Config, UsageError
from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime import hosts, storage
from jlrm.runtime.mesh import Layout
from jlrm.weights import hf, hf_config, hf_files, passing, reading, steps
from jlrm.weights.presets import PRESETS, preset

ORGANISATIONS = ("qwen", "meta-llama", "mistralai")  # of the hub, whose models are presets
ENDS = 1 << 20  # bytes at each end of a file that stand for it


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
        return hf_config.num_labels(hf.resolve(source))
    meta = steps.read_meta(steps.find(source))
    if meta.get("stage") != "reward_model":
        return 0
    return len(hf_config.LABELS[meta["config"]["reward_model"]["kind"]])


def read_params(source: str, model: QwenConfig, layout: Layout) -> Params:
    """Read a model's weights onto the devices; `source` as in `model.path`.

    Each process reads its own parts, unless one alone has the files: then that one passes them on.
    """
    if steps.is_run(source):
        abstract = qwen.abstract_params(model, layout)
        return reading.restore_params(steps.find(source), abstract)
    directory = hf.resolve(source)
    have = hosts.gather("the weights", hf_files.are_here(directory))  # once all is downloaded
    if all(have) or not any(have):  # where nobody has them, all say so
        return hf.load_params(directory, model, layout)
    return passing.load_params(directory, model, layout, reader=have.index(True))


def read_model(config: Config) -> QwenConfig:
    """Return the architecture without a download: of a preset, a local directory or a run.

    The official models of the presets are known by their hub id.

    Raises:
      UsageError: it would have to be downloaded.
    """
    source = config.model
    names = "param_dtype", "compute_dtype", "remat"
    numerics: dict[str, Any] = {name: getattr(source, name) for name in names}
    numerics["exact"] = config.sampling.exact
    if source.preset:
        return dataclasses.replace(preset(source.preset), **numerics)
    if steps.is_run(source.path):
        return hf_config.read_config(side_files(source.path) / "model", **numerics)
    directory = pathlib.Path(source.path).expanduser()
    if directory.is_dir():
        return hf_config.read_config(directory, **numerics)
    organisation, _, name = source.path.lower().replace("-instruct", "").rpartition("/")
    if organisation in ORGANISATIONS and name in PRESETS:
        return dataclasses.replace(preset(name), **numerics)
    raise UsageError(
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
