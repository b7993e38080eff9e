"""Read a config from YAML and `section.key=value` overrides, and write it back.

The one idea: the annotations in config/ decide how each value is read (`1e-6` is a float although
YAML reads it as text), and an unknown key is answered with the nearest known one. Whatever a file
holds, the outcome is a `Config` or a `UsageError` of one sentence.

`preset: NAME` stands for settings of config/presets.py. What a file sets itself wins over its
preset, a preset of the command line over the file, and every other override over both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal, TypeVar

import yaml

from jlrm.config import Config, UsageError, dotted, nearest
from jlrm.config.presets import PRESETS
from jlrm.runtime.storage import write_atomically

# Settings that moved into a section of their own: old name -> present name. Files, overrides and
# run directories may use either. One file may not use both.
MOVED = {
    f"grpo.{name}": f"grpo.loss.{name}"
    for name in (
        *("ratio", "clip_low", "clip_high", "dual_clip", "aggregation", "importance_cap"),
        *("mask_truncated", "kl_weight", "entropy_weight"),
    )
} | {f"grpo.advantage_{name}": f"grpo.advantage.{name}" for name in ("scale", "eps")}


Section = TypeVar("Section")


def load(path: str | pathlib.Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides.

    Raises:
      UsageError: no such file, not a mapping, an unknown key, a value of the wrong type, a bad
        combination.
    """
    tree = _read_tree(path, "sections such as `run:` and `grpo:`")
    # Before overrides, which win over the file in either spelling.
    tree = _with_preset(_moved(tree))
    for override in sorted(overrides, key=lambda text: not text.startswith("preset=")):
        _apply_override(tree, override)
    return from_dict(tree)


def load_as(kind: type[Section], path: str | pathlib.Path) -> Section:
    """Read a YAML file onto any dataclass, by its annotations.

    Raises:
      UsageError: as `load`.
    """
    names = list(typing.get_type_hints(kind))[:3]
    wanted = ", ".join(f"`{name}:`" for name in names)
    return _coerce_section(kind, _read_tree(path, f"keys such as {wanted}"), "")


def _read_tree(path: str | pathlib.Path, wanted: str) -> dict[str, Any]:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Cannot read the config file {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"The config file {path} is not UTF-8 text: {error}.") from None
    tree = parse_yaml(text, str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold {wanted}, got {type(tree).__name__}.")
    return tree


def parse_yaml(text: str, what: str) -> Any:
    """Return what YAML text holds; `what` names it in an error.

    Raises:
      UsageError: not valid YAML, a key that stands twice, or nested too deep.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark and mark.line else ""
        why = " ".join(filter(None, (error.context, error.problem)))
        raise UsageError(f"{what}{place} is not valid YAML: {' '.join(why.split())}.") from None
    except RecursionError:
        raise UsageError(f"{what} is nested too deep.") from None
    except Exception as error:  # PyYAML raises ValueError for 2001-99-99, IndexError for !!int _
        why = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{what} is not valid YAML: {why}.") from None


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
      UsageError: no such file, or it holds anything else.
    """
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {file}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise UsageError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(described, dict):
        raise UsageError(f"{file} must hold a JSON object, got {type(described).__name__}.")
    return described


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: PyYAML would silently keep the last of two sections."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                problem = f"the key '{name}' stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name or key)
        return super().construct_mapping(node, deep)


def _as_spelled(loader: Any, node: yaml.ScalarNode) -> Any:
    """Return a number, or the text where the number would be written otherwise: 2024_05_01, 0100.

    YAML 1.1 has octal numbers, base 60 and dates, which nobody means by the name of a directory.
    What is to be a number is made one later, where the setting is known.
    """
    kind = node.tag.rpartition(":")[2]
    value = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)
    is_number = isinstance(value, int | float)
    is_same = is_number and (str(value) == node.value or not math.isfinite(value))
    return value if is_same else node.value


for _kind in ("int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_spelled)


def from_dict(tree: dict[str, Any]) -> Config:
    """Build a `Config` from nested dictionaries, with the checks of `load`."""
    return _coerce_section(Config, _with_preset(_moved(tree)), "")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the resolved configuration as nested plain dictionaries."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted names, as overrides spell them."""
    flat = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def save(config: Config, path: pathlib.Path) -> None:
    """Write the resolved configuration, whole or not at all, as YAML that `load` reads back."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_atomically(path, text.encode())


def parse_pairs(text: str, what: str) -> dict[str, str]:
    """Read `a=b,c=d`, or a YAML mapping such as `{a: b}`.

    Raises:
      UsageError: neither.
    """
    if text.lstrip().startswith("{"):
        mapping = parse_yaml(text, what)
        if isinstance(mapping, dict):
            return {str(_as_written(key)): str(value) for key, value in mapping.items()}
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise UsageError(f"{what}={_short(text)} is not pairs such as NAME=VALUE,NAME=VALUE.")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _as_written(key: Any) -> Any:
    """Return a key that YAML reads as true or false as text: labels may be so."""
    return str(key).lower() if isinstance(key, bool) else key


def _moved(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with every setting under its present name; the one given stays as it is.

    Raises:
      UsageError: a setting is given under both of its names.
    """
    for old, new in MOVED.items():
        where, name = old.split(".")
        _, inner, present_name = new.split(".")
        section = tree.get(where)
        if not isinstance(section, dict) or name not in section:
            continue
        present = section.get(inner)
        present = {} if present is None else present
        if not isinstance(present, dict):  # `_coerce_section` says what it must hold
            return tree
        if present_name in present:
            raise UsageError(f"{old} is the old name of {new}, and both are given. Keep {new}.")
        rest = {key: value for key, value in section.items() if key != name}
        tree = {**tree, where: {**rest, inner: {**present, present_name: section[name]}}}
    return tree


def _with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with what its presets set and it does not; the one given stays as it is."""
    tree = copy.deepcopy(tree)
    for name, value in _of_presets(tree.pop("preset", None)).items():
        if not _is_given(tree, name):
            _set(tree, name, value, "preset")
    return tree


def _of_presets(names: Any) -> dict[str, Any]:
    """Return what presets set, by dotted name, where the last one wins.

    Raises:
      UsageError: no preset has this name.
    """
    names = [] if names is None else names
    names = names if isinstance(names, list) else str(names).split(",")
    values: dict[str, Any] = {}
    for name in (str(name).strip() for name in names):
        if name not in PRESETS:
            raise UsageError(f"preset={_short(name)} is none. {nearest(name, PRESETS)}")
        values |= PRESETS[name]
    return values


def _is_given(tree: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"Got {_short(override)}, wanted section.key=value, e.g. grpo.steps=100.")
    value = parse_yaml(text, f"The value of {_short(override)}") if text else ""
    values = _of_presets(value) if key == "preset" else {MOVED.get(key, key): value}
    for name, each in values.items():
        _set(tree, name, each, override)


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UsageError(
                f"{_short('.'.join(sections[: depth + 1]))} in {_short(override)} is not a section."
            )
    tree[name] = value


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """Convert a YAML value to the annotated type, or say what was got and what was wanted."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):  # one of several, by names of their own
        return _coerce_section(kind, value, where)
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{where}={_short(value)} is not one of {', '.join(map(str, args))}.")
        return value
    if origin is dict:
        pairs = parse_pairs(value, where) if isinstance(value, str) else value
        if not isinstance(pairs, dict):
            raise _wrong(where, value, kind)
        pairs = {_as_written(key): inner for key, inner in pairs.items()}
        is_named = dataclasses.is_dataclass(args[1])
        return {
            _coerce(args[0], k, f"{where} key"): _coerce(
                args[1], v, dotted(where, k) if is_named else f"{where}[{_short(k)}]"
            )
            for k, v in pairs.items()
        }
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise _wrong(where, value, kind)
        items = [each.strip() if isinstance(each, str) else each for each in items]
        return [_coerce(args[0], each, where) for each in items]
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) is not (kind is bool):
        raise _wrong(where, value, kind)
    try:
        converted = kind(value)
    except (ValueError, OverflowError):  # "many"; .inf or a number of 400 digits
        raise _wrong(where, value, kind) from None
    if kind is int and isinstance(value, float) and converted != value:
        raise _wrong(where, value, kind)
    return converted


def _wrong(where: str, value: Any, kind: Any) -> UsageError:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list: "a list such as [NAME, NAME] or NAME,NAME",
        dict: "pairs such as {NAME: VALUE} or NAME=VALUE,NAME=VALUE",
    }
    wanted = names[typing.get_origin(kind) or kind]
    return UsageError(f"{where}={_short(value)} is not what was wanted: {wanted}.")


def _short(value: Any) -> str:
    """Return a value for a message: cut, since YAML aliases can make a line of text a gigabyte."""
    shortened = reprlib.Repr()
    shortened.maxlevel = 2
    shortened.maxstring = shortened.maxother = shortened.maxlong = 80
    text = shortened.repr(value)
    return text if len(text) < 120 else text[:120] + "..."


def _names(hints: Mapping[str, Any]) -> list[str]:
    """Return what a section may hold, the fields of its own sections too: `loss.clip_low`."""
    inner = [
        dotted(name, field.name)
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
        for field in dataclasses.fields(hint)
    ]
    return [*hints, *inner]


def _coerce_section(kind: Any, value: Any, where: str, default: Any = None) -> Any:
    """Build a section; what is not given is taken from `default`, or else from the class."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UsageError(f"Section '{where}' must hold keys and values, got {_short(value)}.")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            known = [*_names(hints), *([] if where else ["preset"])]
            way_out = nearest(str(key), known, hints)
            raise UsageError(f"Unknown key {_short(dotted(where, key))}. {way_out}")
    built = {}
    for spec in dataclasses.fields(kind):
        hint, name = hints[spec.name], dotted(where, spec.name)
        make_default = spec.default_factory
        if dataclasses.is_dataclass(hint):
            # A section's default may differ from its class's own, as SFT's optimiser does.
            section = None if make_default is MISSING else make_default()
            built[spec.name] = _coerce_section(hint, value.get(spec.name), name, section)
        elif spec.name in value:
            built[spec.name] = _coerce(hint, value[spec.name], name)
        elif spec.default is MISSING and make_default is MISSING:
            raise UsageError(f"'{name}' is not set.")
    return kind(**built) if default is None else dataclasses.replace(default, **built)
