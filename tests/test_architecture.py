"""The arrows of the design: a folder imports from folders of lower rank, and holds no circle."""

from __future__ import annotations

import ast
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "jlrm"
# One number a folder. What stands beside the folders is a command, but for these two.
RANKS = {
    "config": 1,
    "runtime": 2,
    "judgement": 2,
    "model": 3,
    "rl": 3,
    "data": 3,
    "reports": 3,
    "sampling": 4,
    "weights": 4,
    "evaluation": 5,
    "preparation": 5,
    "evaluation.statistics": 6,
    "evaluation.benchmarks": 6,
    "evaluation.benchmarks.raters": 6,
    "judges": 7,
    "serving": 8,
    "server": 9,
    "training": 8,
    "training.recipes": 9,
    "planning": 10,
    "peers": 10,
    "studies": 9,
}
COMMAND = 11
COMMANDS = {
    *("train", "evaluate", "export", "prepare", "plan", "bench", "report", "scorecard"),
    *("notebook", "judge", "study"),
}
FORBIDDEN = {
    "judgement": {"jax", "numpy", "flax"},
    "rl": {"transformers", "json", "pathlib"},
    "config": {"jax", "numpy"},
}
LINEN = "flax.linen"
MOST_FILES = 13  # of a folder, without its face
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(("jlrm", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES
}


def place(module: str) -> str:
    """Return the folder of a module, or the module itself where it stands at the top."""
    inner = module.removeprefix("jlrm").removeprefix(".")
    while inner and inner not in RANKS and inner not in COMMANDS:
        inner = inner.rpartition(".")[0]
    return inner


def imports(path: pathlib.Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES or name == LINEN else node.module for name in names}
    return modules


def ours(path: pathlib.Path) -> set[str]:
    return {module for module in imports(path) if module.split(".")[0] == "jlrm"}


def rank(folder: str) -> int:
    return RANKS.get(folder, COMMAND)


ARROWS = {module: ours(path) for module, path in MODULES.items()}


def test_what_stands_at_the_top_is_a_command_or_a_folder_with_a_rank():
    tops = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert tops - {"__init__", "__main__"} == {name.split(".")[0] for name in RANKS} | COMMANDS


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_to_lower_ranks(module):
    mine = place(module)
    for other in ARROWS[module]:
        if place(other) and place(other) != mine:
            assert rank(place(other)) < rank(mine), f"{module} imports {other}"


def test_arrows_inside_a_folder_go_one_way():
    waiting = {
        module: {other for other in others if other in MODULES and other != module}
        for module, others in ARROWS.items()
    }
    while waiting:
        free = {module for module, others in waiting.items() if not others & waiting.keys()}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {module: others for module, others in waiting.items() if module not in free}


@pytest.mark.parametrize("folder", sorted(RANKS))
def test_a_folder_can_be_seen_at_a_glance(folder):
    files = [p for p in (ROOT / folder.replace(".", "/")).glob("*.py") if p.stem != "__init__"]
    assert 0 < len(files) <= MOST_FILES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_place_does_not_know_what_it_must_not(module):
    roots = {other.split(".")[0] for other in imports(MODULES[module])}
    assert not roots & FORBIDDEN.get(place(module), set())


def test_linen_stays_inside_the_model():
    assert {place(m) for m, path in MODULES.items() if LINEN in imports(path)} == {"model"}


def test_a_class_name_means_one_thing():
    where: dict[str, str] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                first = where.setdefault(node.name, module)
                assert first == module, f"class {node.name} stands in {first} and in {module}"


def test_every_module_says_what_it_does():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_picture_of_the_readme_is_of_this_house():
    folder = ROOT.parent / ".github"
    overview = runpy.run_path(str(folder / "overview.py"))
    assert (folder / "overview.svg").read_text() == overview["picture"]()
    rooms = {room for _, room in (*overview["TRAINING"], *overview["MEASURING"])}
    assert rooms <= RANKS.keys()


def _is_slow(node: ast.AST) -> bool:
    return any("mark.slow" in ast.unparse(each) for each in getattr(node, "decorator_list", ()))


@pytest.mark.parametrize("folder", sorted(RANKS.keys() - {"config"}))
def test_a_folder_has_tests_and_fast_ones_among_them(folder):
    """`launch/test.sh --fast` looks into every folder."""
    tests = []
    for path in (pathlib.Path(__file__).parent / folder.replace(".", "/")).glob("test_*.py"):
        body = ast.parse(path.read_text()).body
        marks = [ast.unparse(n) for n in body if ast.unparse(n).startswith("pytestmark =")]
        if not any("mark.slow" in each for each in marks):
            functions = [node for node in body if isinstance(node, ast.FunctionDef)]
            tests += [n.name for n in functions if n.name.startswith("test_") and not _is_slow(n)]
    assert tests, f"tests/{folder} has no test that is not slow"
