"""The tensors that the safetensors of a directory hold, matched to those that a model wants.

Directories in the field hold more and less than a model: heads of other tasks, buffers of older
versions, names without `model.` or with two, one matrix under either name of a tied pair, an index
of an earlier save. They are read as `transformers` reads them, and what is left out is said.
Anything else that does not match is refused by name, since dropping it would change what is
computed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jlrm.config import UsageError
from jlrm.runtime import hosts
from jlrm.runtime.settings import read_json

log = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "model."  # of everything but the head: models lack it, or their heads have it too
# A language model. What stands beside it computes nothing here: heads of value and reward models,
# modules that draft several tokens or see images.
OWN = re.compile(r"^(model\.)?((layers|embed_tokens|norm|lm_head)\.|.*lora_)")
# Tables that older versions stored.
TABLES = re.compile(r"(^|\.)rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$")
FLOATS = ("F64", "F32", "F16", "BF16")
# The exponent of bfloat16: all of its bits are set in NaN and infinity, and in no other number.
EXPONENT = 0x7F80
CHUNK = 2**22  # numbers looked at together
POINTER = b"version https://git-lfs"  # how a file begins that Git has not fetched


@dataclass(frozen=True)
class Stored:
    """One tensor of an open file; a part that is read is checked for NaN and infinity."""

    name: str  # in the file
    file: pathlib.Path
    view: Any  # of the safetensors library

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.view.get_shape())

    def read(self, part: Any, dtype: Any) -> np.ndarray:
        """Read a part in the given dtype.

        Raises:
          UsageError: it can't be read, or holds a number that is not finite in this dtype.
        """
        try:
            value = self.view[part]
        except Exception as error:  # the library raises its own kinds and OSError alike
            raise UsageError(f"{self.file}: {self.name} can't be read: {error}.") from None
        with np.errstate(over="ignore"):
            value = value.astype(dtype, copy=False)
        if not is_finite(value):
            raise UsageError(
                f"{self.file}: the tensor {self.name} holds NaN or infinite numbers, or larger "
                f"ones than {np.dtype(dtype).name} has, so that nothing can be computed with it. "
                "Copy the file again, or take weights from before the training that broke them."
            )
        return value


def is_finite(value: np.ndarray) -> bool:
    """Return whether an array of floats holds neither NaN nor infinity."""
    flat = np.ascontiguousarray(value).reshape(-1)
    chunks = (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
    if value.dtype == ml_dtypes.bfloat16:  # NumPy's isfinite takes three times as long on it
        return not any((chunk.view(np.uint16) & EXPONENT == EXPONENT).any() for chunk in chunks)
    return all(np.isfinite(chunk).all() for chunk in chunks)


def open_tensors(
    directory: pathlib.Path,
    wanted: Mapping[str, tuple[int, ...]],
    stack: contextlib.ExitStack,
    *,
    is_tied: bool,
) -> dict[str, Stored]:
    """Open a directory's safetensors and return what they hold of each wanted tensor.

    Args:
      wanted: the shape in the file of every tensor of the model, by name.
      stack: keeps the files open.
      is_tied: the embedding is the head too.

    Raises:
      UsageError: there are no safetensors, or tensors are missing, unknown, of another shape, or
        of numbers that are not floats.
    """
    known = {*wanted, HEAD}
    held: dict[str, Stored] = {}
    for tensor in _open(directory, stack):
        name = _full_name(tensor.name, known)
        if name in held:
            raise UsageError(
                f"{directory} holds {name} twice: {_place(held[name])} and {_place(tensor)}. "
                "Copy all files of one save again."
            )
        held[name] = tensor
    head = held.pop(HEAD, None) if is_tied else None
    # A library that stores one of two shared tensors may keep either name.
    if head is not None and EMBED not in held:
        held[EMBED] = head
    is_whole = held.keys() >= wanted.keys()  # else what stands beside it may be what is missing
    extra = sorted(held.keys() - wanted.keys())
    left_out = [n for n in extra if TABLES.search(n) or (is_whole and not OWN.match(n))]
    held = {name: tensor for name, tensor in held.items() if name not in left_out}
    _check(directory, held, wanted, head)
    if left_out:
        _warn(f"{directory}: left out {_some(left_out)}, which a language model does not use.")
    return held


def are_here(directory: pathlib.Path) -> bool:
    """Return whether a directory holds all files of its weights."""
    return all(os.path.isfile(directory / name) for name in _file_names(directory))


def _full_name(name: str, known: Collection[str]) -> str:
    """Return the name in a language model of a tensor with a prefix too few or too many."""
    names = (name, PREFIX + name, name.removeprefix(PREFIX))
    return next((full for full in names if full in known), name)


def _place(tensor: Stored) -> str:
    return f"{tensor.name} in {tensor.file.name}"


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> list[Stored]:
    """Return every tensor of the checkpoint's files."""
    held = []
    for name in _file_names(directory):
        path = directory / name
        if not os.path.isfile(path):  # Path.is_file raises for a name that no file can have
            raise UsageError(f"{directory} holds no {name:.100}. {_instead(directory)}")
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            held += [Stored(key, path, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118 (no mapping)
        except Exception as error:  # the library raises its own kinds and OSError alike
            text = f"{path} is not a readable safetensors file: {error}{_if_pointer(path)}"
            raise UsageError(text) from None
    return held


def _if_pointer(path: pathlib.Path) -> str:
    """Return what to do about a file that Git has not fetched; "" for any other."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(POINTER)) == POINTER
    except OSError:
        is_pointer = False
    return ". It is a pointer of Git LFS: run `git lfs pull` in its directory." * is_pointer


def _instead(directory: pathlib.Path) -> str:
    """Return what to do about weights that are not where they should be."""
    suffixes = {file.suffix for file in directory.iterdir()}
    if ".safetensors" in suffixes:
        return (
            f"Copy all files of the model again: its weights are {WEIGHTS}, or the shards that "
            f"{INDEX} names."
        )
    if suffixes & {".bin", ".pt", ".pth"}:
        return (
            "Only safetensors weights are read, since pickled ones can run code. Of a source you "
            "trust, transformers' `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)` "
            "writes them."
        )
    if ".gguf" in suffixes:
        return "Only safetensors weights are read, not GGUF. Use the model that it was made from."
    return "Only safetensors weights are read."


def _file_names(directory: pathlib.Path) -> list[str]:
    """Return the names of the files to read; a single file wins over shards, as in transformers."""
    index, single = directory / INDEX, directory / WEIGHTS
    if single.is_file():
        if index.is_file():
            _warn(
                f"{directory} holds {WEIGHTS} and {INDEX} with its shards. {WEIGHTS} is read and "
                "the shards are left out, as in transformers; remove the ones that are stale."
            )
        return [WEIGHTS]
    if not index.is_file():
        return [WEIGHTS]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UsageError(
            f'{index} is no safetensors index, such as {{"weight_map": {{NAME: FILE}}}}.'
        )
    return sorted({*names.values()})


def _check(
    directory: pathlib.Path,
    held: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    head: Stored | None,
) -> None:
    missing, unknown = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
    common = {name: held[name] for name in wanted if name in held}
    wrong = [
        f"{name} {list(tensor.shape)} (wanted {list(wanted[name])})"
        for name, tensor in common.items()
        if tensor.shape != wanted[name]
    ]
    floats = common if head is None else {**common, HEAD: head}
    dtypes = {name: tensor.view.get_dtype() for name, tensor in floats.items()}
    quantised = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    # Qwen3-0.6B ships its tied head as a second copy. transformers ignores it, and so does this.
    is_other = not (head is None or missing or wrong or quantised or _is_same(head, held[EMBED]))
    problems = {
        "missing": missing,
        "unknown": unknown,
        "of another shape than config.json says": wrong,
        f"of numbers that are not read (wanted {', '.join(FLOATS)})": quantised,
        f"other than {EMBED}, though config.json ties them": [HEAD] if is_other else [],
    }
    text = "; ".join(f"{what}: {_some(which)}" for what, which in problems.items() if which)
    if text:
        raise UsageError(
            f"The weights in {directory} do not match their config.json. Tensors {text}."
            + (UNTIE if is_other else "")
            + (_advice(missing, unknown) if missing or unknown else "")
        )


def _advice(missing: list[str], unknown: list[str]) -> str:
    """Return what to do about names, where it shows why they don't match; else ""."""
    if any("lora_" in name for name in unknown):
        return MERGE
    if missing == [HEAD]:
        return TIE
    wrapped = [name for name in unknown if missing and name.endswith(f".{missing[-1]}")]
    if not wrapped:
        return ""
    prefix = wrapped[0].removesuffix(missing[-1])
    return (
        f" What is missing is there under names that begin with {prefix:.80}, so a wrapper of the "
        "model was saved: save the model inside of it."
    )


TIE = ' If the embedding is the head too, config.json has to say so: "tie_word_embeddings": true.'
UNTIE = (
    ' If the head was trained by itself, config.json has to say so: "tie_word_embeddings": '
    "false; else remove it from the file."
)
MERGE = (
    " To train from it, set model.path to its base model and model.adapter to this directory. For "
    "all else, merge it into its base model first: peft's `AutoPeftModelForCausalLM"
    ".from_pretrained(ADAPTER).merge_and_unload().save_pretrained(MODEL)`, and its tokenizer's "
    "`save_pretrained(MODEL)`."
)


def refuse_adapter(directory: pathlib.Path) -> None:
    """Refuse a PEFT directory, which transformers would read as its base model with the adapter.

    Raises:
      UsageError: there is an adapter_config.json.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = read_json(file).get("base_model_name_or_path") or "a base model"
    except UsageError:
        base = "a base model"
    text = f"{directory} is a PEFT adapter of {base}, not a whole model.{MERGE}"
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        text += " If its weights are merged already, remove adapter_config.json."
    raise UsageError(text)


def _is_same(first: Stored, second: Stored) -> bool:
    """Return whether two matrices hold the same numbers, NaN too, which reading then names."""
    if first is second or first.shape != second.shape:
        return first is second
    size = first.shape[0]
    bounds = [slice(i, min(i + 8192, size)) for i in range(0, size, 8192)]
    pairs = (
        [tensor.view[part].astype(np.float32) for tensor in (first, second)] for part in bounds
    )
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


@functools.cache  # a run opens its weights more than once, and says this once
def _warn(text: str) -> None:
    if hosts.is_main():
        log.warning("%s", text)
