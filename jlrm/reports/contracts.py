"""What leaves the program as JSON is a frozen dataclass: here is the one way to write and read it.

A field's name is its JSON key, unless its metadata gives another: `from` and `with` are words of
Python. JSON has no number for NaN, which is written as null. A field that has a default may be
absent from a file, so older files stay readable. Unknown keys are passed over, so files of newer
programs are readable too, until the version changes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jlrm.config import UsageError
from jlrm.runtime.storage import write_atomically

LEFT_OUT = {"is_left_out": True}  # metadata of a field: None is not written


def key(name: str) -> dict[str, str]:
    """Return the metadata of a field that has another key in JSON."""
    return {"key": name}


def encode(value: Any) -> Any:
    """Return what `json.dumps` takes, with null for numbers that are not finite."""
    if dataclasses.is_dataclass(value):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            _key_of(field): encode(each)
            for field, each in pairs
            if each is not None or not field.metadata.get("is_left_out")
        }
    if isinstance(value, Mapping):
        return {str(name): encode(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, place: str) -> Any:
    """Return JSON as a value of a type: dataclasses, tuples, dicts, unions with None, scalars.

    Args:
      place: where the value stands, for the error.

    Raises:
      UsageError: the value is not of the type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        if value is None or (float in inner and _is_no_number(value)):
            return None
        (kind,) = (each for each in inner if each is not types.NoneType)
        return decode(kind, value, place)
    if origin is tuple:
        return _decoded_tuple(inner, value, place)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, place)
        return {name: decode(inner[1], each, f"{place}.{name}") for name, each in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decoded_fields(kind, value, place)
    kinds = (int, float) if kind is float else (kind,)
    is_flag = isinstance(value, bool) and kind is not bool  # Python counts true among the ints
    _expect(isinstance(value, kinds) and not is_flag, NAMES[kind], value, place)
    try:
        return kind(value)
    except OverflowError:  # JSON knows whole numbers of any size
        raise UsageError(f"{place} is too large a number.") from None


NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def write(path: pathlib.Path, content: Any) -> None:
    """Write a dataclass as JSON, replacing the file whole."""
    write_atomically(path, (json.dumps(encode(content), indent=2, allow_nan=False) + "\n").encode())


def read(path: pathlib.Path, version: int, remedy: str) -> dict[str, Any]:
    """Return the object that a file holds; files without a version are from before there was one.

    Args:
      remedy: what to do about a file that can't be read, as a sentence.

    Raises:
      UsageError: the file is no JSON object, or of a version after the given one.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object. {remedy}")
    written = content.get("version", version)
    if not isinstance(written, int) or written > version:
        raise UsageError(
            f"{path} is of version {written}, and this program reads version {version} and older. "
            "Update jlrm."
        )
    return content


def _key_of(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("key") or field.name


def _expect(is_right: bool, wanted: str, value: Any, place: str) -> None:
    if not is_right:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "…"
        raise UsageError(f"{place} must be {wanted}, got {shown}.")


def _is_no_number(value: Any) -> bool:
    """Say whether a value stands for NaN or an infinity, which some writers put in text."""
    return value in ("nan", "inf", "-inf") or (
        isinstance(value, float) and not math.isfinite(value)
    )


def _decoded_tuple(inner: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, place)
    kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
    _expect(len(kinds) == len(value), f"a list of {len(kinds)}", value, place)
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(decode(kind, each, f"{place}[{i}]") for i, (kind, each) in pairs)


def _decoded_fields(kind: Any, value: Any, place: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, place)
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        name = _key_of(field)
        if name in value:
            given[field.name] = decode(hints[field.name], value[name], f"{place}.{name}")
        elif _has_no_default(field):
            raise UsageError(f"{place} has no '{name}'.")
    return kind(**given)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
