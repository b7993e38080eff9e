"""The arrows of the design: a file imports only from lower ranks, and only the top may print."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "jlrm"
# Each place, first match wins. Files of one rank may import each other only where listed below.
RANKS = {
    "__init__": 0,
    "config": 0,
    "mesh": 1,
    "cluster": 1,
    "hosts": 1,
    "judge": 1,
    "stops": 1,
    "commands": 1,
    "hlo": 1,
    "model": 2,
    "data": 2,
    "rl": 2,
    "counting": 2,
    "rollout": 3,
    "packing": 3,
    "costs": 3,
    "machine": 3,
    "slices": 3,
    "beam": 3,
    "update": 3,
    "checkpoint": 3,
    "tracking": 3,
    "report": 3,
    "programs": 4,
    "run": 4,
    "judging": 4,
    "groups": 4,
    "heldout": 4,
    "loop": 4,
    "notebook": 4,
    "phases": 4,
    "plan_report": 4,
    "benchmarks": 4,
    "backends": 4,
    "statistics": 4,
    "results": 4,
    "judges": 4,
    "judge_results": 3,
    "model_card": 4,
    "scorecard_charts": 4,
    "scorecard": 4,
    "train": 5,
    "bench": 5,
    "plan": 5,
    "evaluate": 5,
    "export": 5,
    "prepare": 5,
}
# Within a rank: a package's own files, and these.
SIDEWAYS = {
    ("hosts", "cluster"),
    ("report", "tracking"),
    ("update", "packing"),
    ("judging", "run"),
    ("judging", "programs"),
    ("groups", "judging"),
    ("heldout", "judging"),
    ("heldout", "run"),
    ("heldout", "benchmarks"),
    ("heldout", "backends"),
    ("groups", "run"),
    ("loop", "heldout"),
    ("loop", "run"),
    ("phases", "programs"),
    ("scorecard", "scorecard_charts"),
    ("scorecard", "model_card"),
    ("plan_report", "phases"),
    ("beam", "rollout"),
    ("statistics", "benchmarks"),
    ("results", "benchmarks"),
    ("results", "statistics"),
    ("judges", "benchmarks"),
    ("judges", "backends"),
    ("judges", "run"),
    ("backends", "benchmarks"),
    ("backends", "run"),
    ("backends", "programs"),
}
FORBIDDEN = {
    "judge": {"jax", "numpy", "flax"},
    "rl": {"transformers", "json", "pathlib"},
    "config": {"jax", "numpy"},
}
FILES = sorted(ROOT.rglob("*.py"))


def place(module: str) -> str:
    """Return the first name after `jlrm`, the unit that has a rank."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "jlrm":
            found |= {f"jlrm.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def here(path: pathlib.Path) -> str:
    return place(".".join(["jlrm", *path.relative_to(ROOT).with_suffix("").parts]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_lower_ranks(path):
    mine = here(path)
    assert mine in RANKS, f"{path.name} has no rank: give it one"
    for module in imports(path):
        if module.split(".")[0] != "jlrm":
            continue
        other = place(module)
        if other != mine and (mine, other) not in SIDEWAYS:
            assert RANKS[other] < RANKS[mine], f"{mine} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_place_does_not_know_what_it_must_not(path):
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & FORBIDDEN.get(here(path), set())


def test_linen_stays_inside_the_model():
    linen = {"flax", "flax.linen"}
    users = {here(path) for path in FILES if imports(path) & linen}
    assert users <= {"model"}


def test_every_module_says_what_it_does():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
