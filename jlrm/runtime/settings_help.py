"""Every setting with its default, choices and meaning, as `--help` prints them.

The one idea: the dataclasses of config/ are the only place where a setting is documented. Their
types and defaults are read from the classes, and the meanings are the comments in their source.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import shutil
import textwrap
import tokenize
import typing
from dataclasses import MISSING
from typing import Annotated, Any, Literal

from jlrm import config
from jlrm.config import Config, dotted, sections, stages
from jlrm.config.presets import PRESETS

INDENT = 34  # columns of a setting's name and default
WIDEST = 100  # columns of a line, where the terminal is wider


def add_settings(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """Add `--config`, and every setting to the end of the help."""
    help_text = "YAML file; configs/ holds ready ones"
    parser.add_argument("--config", required=is_required, help=help_text)
    width = min(shutil.get_terminal_size().columns, WIDEST)
    texts = [textwrap.fill(parser.epilog, width)] if parser.epilog else []
    parser.description = textwrap.fill(parser.description or "", width)
    parser.epilog = "\n\n".join([*texts, *describe_settings(width)])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def describe_settings(width: int = WIDEST) -> list[str]:
    """Return one text for each section: its settings, at most `width` columns wide."""
    meanings = all_meanings()
    texts = [
        "Settings with their defaults, as they follow the command (in YAML: one key a section):",
        textwrap.fill(
            f"preset= stands for several of them ({' | '.join(PRESETS)}); other settings that are "
            "given win over it. Several presets: preset=trl,gspo. See README.",
            width,
            subsequent_indent="  ",
        ),
    ]
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        lines = [
            line
            for name, entry in _entries(kind, _default_of(section), section.name, meanings)
            for line in _entry_lines(name, entry, width)
        ]
        texts.append("\n".join([f"{section.name}:", *lines]))
    return texts


def all_meanings() -> dict[tuple[str, str], str]:
    """Return the comment of every setting by (class, field)."""
    return read_meanings("\n".join(map(inspect.getsource, (sections, stages, config))))


def read_meanings(source: str) -> dict[tuple[str, str], str]:
    """Return the comment of each field by (class, field): those above, inside and behind it."""
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    meanings = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        before = node.lineno
        for field in node.body:
            last = field.end_lineno or field.lineno
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                lines = (comments.get(line, "") for line in range(before + 1, last + 1))
                meanings[node.name, field.target.id] = " ".join(filter(None, lines))
            before = last
    return meanings


def _entries(
    section: type, defaults: Any, prefix: str, meanings: dict[tuple[str, str], str]
) -> typing.Iterator[tuple[str, str]]:
    """Yield e.g. ("grpo.steps=0", "Rollout batches; 0: no GRPO (whole number, at least 0)")."""
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        name, hint = dotted(prefix, field.name), hints[field.name]
        default = _default_of(field) if defaults is MISSING else getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _entries(typing.cast(type, hint), default, name, meanings)
            continue
        meaning = meanings[section.__name__, field.name]
        notes = [_describe_type(hint), "must be set" if default is MISSING else ""]
        note = "; ".join(filter(None, notes))
        shown = "" if default is MISSING else _spell(default)
        text = meaning[:1].upper() + meaning[1:].rstrip(".")
        yield f"{name}={shown}", f"{text} ({note})" if note else text


def _entry_lines(name: str, text: str, width: int) -> list[str]:
    indent = " " * INDENT
    columns = max(width, 2 * INDENT)
    lines = textwrap.wrap(text, columns, initial_indent=indent, subsequent_indent=indent)
    head = f"  {name}"
    if len(head) < INDENT:
        return [head.ljust(INDENT) + lines[0][INDENT:], *lines[1:]]
    return [head, *lines]


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _spell(value: Any) -> str:
    """Return a default as an override spells it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe_type(hint: Any) -> str:
    names = {int: "whole number", float: "number", bool: "true | false", str: ""}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        least, *most = args[1:]
        low = f"at least {least:g}"
        return f"{names[args[0]]}, {f'{least} to {most[0]}' if most else low}"
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        return f"a list of {_describe_type(args[0])}"
    return "{NAME: VALUE} or NAME=VALUE,..." if origin is dict else names[hint]
