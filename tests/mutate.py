"""Change the code that decides what a judge is worth, one place at a time: some test must fail.

    python tests/mutate.py [--sample N] [--seed S] [--files GLOB ...] [--workers 2]

A mutant is one change of one file: a comparison's boundary or sense, an operator, a number, a
condition, a dropped statement, two swapped arguments. The sample takes as many of each file as its
share of all. The tests of a mutant are those of the files that import its module, the fast ones
first, then the fast ones of its room. It is killed when one of them fails or they take ten times
as long as without it.

Left out by rule: docstrings, annotations, decorators, f-strings, what `raise`, `assert` and a
logger's calls hold, `strict=` of zip and seeds: no result depends on them; and what changes nothing
by its meaning, such as `SYMMETRIC` calls.

Every mutant runs in a fork of one process that has imported the libraries but nothing of ours.
Exit code 1: fewer than 95 % were killed, or the tests fail without any change.
"""

from __future__ import annotations

import argparse
import ast
import copy
import fnmatch
import functools
import importlib.abc
import importlib.util
import io
import json
import os
import pathlib
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
TARGETS = (
    "jlrm/judgement/*.py",
    "jlrm/rl/*.py",
    "jlrm/training/packing.py",
    "jlrm/evaluation/classes.py",
    "jlrm/evaluation/statistics/diagnostics.py",
    "jlrm/evaluation/statistics/clusters.py",
    "jlrm/evaluation/statistics/metrics.py",
    "jlrm/evaluation/statistics/intervals.py",
    "jlrm/evaluation/policies.py",
    "jlrm/evaluation/scoring.py",
    "jlrm/data/contamination.py",
)
ENOUGH = 95.0  # percent
SWAPS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
SYMMETRIC = {
    *("min", "max", "minimum", "maximum", "isclose", "isdisjoint", "union", "corrcoef"),
    "_mcnemar",
}
LOGGERS = {"log", "logger", "warnings", "tqdm"}


class Mutant(NamedTuple):
    """A change: where, what it says, and which of the changes of its file it is."""

    path: str
    line: int
    change: str
    number: int


# --- Changes ---


def _is_silent(node: ast.AST) -> bool:
    """Return whether no result depends on what is inside the node."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.Call):
        head = node.func
        if isinstance(head, ast.Attribute) and head.attr == "default_rng":
            return True  # any seed would do
        while isinstance(head, ast.Attribute):
            head = head.value
        return isinstance(head, ast.Name) and head.id in LOGGERS
    return False


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may be changed, in the order of the text."""
    if _is_silent(node):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _nodes(child)


def _edits(node: ast.AST) -> Iterator[tuple[str, str, Any]]:
    """Yield changes of a node: what is said of it, a field, and the field's new value."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in SWAPS.get(type(operator), ()):
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                yield f"{type(operator).__name__} -> {other.__name__}", "ops", ops
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        for other in () if _is_a_type(node) else SWAPS.get(type(node.op), ()):
            yield f"{type(node.op).__name__} -> {other.__name__}", "op", other()
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        number = node.value + 1 if node.value + 1 != node.value else node.value * 2
        other = not node.value if isinstance(node.value, bool) else number
        yield f"{node.value} -> {other}", "value", other
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "condition negated", "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        yield f"{type(node.op).__name__} dropped", "op", ast.UAdd()
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield "filter dropped", "ifs", []
    elif isinstance(node, ast.Call) and len(node.args) > 1 and _may_be_swapped(node):
        first, second, *rest = node.args
        yield "arguments swapped", "args", [second, first, *rest]
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for i, statement in enumerate(block if isinstance(block, list) else ()):
            if isinstance(statement, (ast.AugAssign, ast.Continue, ast.Break)) or (
                isinstance(statement, ast.Expr) and not _is_silent(statement.value)
                and isinstance(statement.value, ast.Call)
            ):  # fmt: skip
                yield "statement dropped", name, [*block[:i], ast.Pass(), *block[i + 1 :]]


def _is_a_type(node: ast.AST) -> bool:
    """Return whether it is a union of types, such as `int | None`."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.BitOr):
        return False
    return any(isinstance(side, ast.Constant) for side in (node.left, node.right))


def _may_be_swapped(call: ast.Call) -> bool:
    if any(isinstance(arg, ast.Starred) for arg in call.args[:2]):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    same = ast.dump(call.args[0]) == ast.dump(call.args[1])
    return name not in SYMMETRIC and not same


def mutants(path: pathlib.Path) -> list[Mutant]:
    """Return every mutant of a file."""
    every = []
    for node in _nodes(ast.parse(path.read_text())):
        for change, field, value in _edits(node):
            where = value[0] if field == "ops" else node
            line = getattr(node, "lineno", 0) or getattr(where, "lineno", 0)
            if change == "statement dropped":
                line = next(
                    old.lineno
                    for old, new in zip(getattr(node, field), value, strict=True)
                    if isinstance(new, ast.Pass) and not isinstance(old, ast.Pass)
                )
            if isinstance(node, ast.comprehension):
                line = node.target.lineno
            every.append(Mutant(str(path.relative_to(ROOT)), line, change, len(every)))
    return every


def mutated(mutant: Mutant) -> ast.Module:
    """Return the tree of the file with the change."""
    tree = copy.deepcopy(ast.parse((ROOT / mutant.path).read_text()))
    edits = ((node, edit) for node in _nodes(tree) for edit in _edits(node))
    node, (_, field, value) = next(e for i, e in enumerate(edits) if i == mutant.number)
    setattr(node, field, value)
    return ast.fix_missing_locations(tree)


def sample(files: Sequence[pathlib.Path], size: int, seed: int) -> list[Mutant]:
    """Return mutants of all files, of each its share, at least three."""
    by_file = {path: mutants(path) for path in files}
    total = sum(len(every) for every in by_file.values())
    chosen = []
    for path, every in sorted(by_file.items()):
        number = min(len(every), max(3, round(size * len(every) / total)))
        draw = random.Random(f"{seed} {path.relative_to(ROOT)}")
        chosen += sorted(draw.sample(every, number), key=lambda mutant: mutant.number)
    return chosen


# --- Tests ---


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


class Stage(NamedTuple):
    """Tests that are run together: files, and pytest's options."""

    files: tuple[str, ...]
    options: tuple[str, ...]


def importers(module: str) -> tuple[list[str], list[str]]:
    """Return the files of tests that import a module, those of its room and others."""
    package, _, name = module.rpartition(".")
    mine, others = [], []
    # A file named for the module first.
    for path in sorted(TESTS.rglob("test_*.py"), key=lambda p: (p.stem != f"test_{name}", p)):
        if {f"{package}.{name}", f"{package}:{name}"} & _imported(path):
            files = mine if _room(module) in path.parents else others
            files.append(str(path.relative_to(ROOT)))
    return mine, others


def stages(module: str) -> list[Stage]:
    """Return the tests of a module, those that are quickest to kill first.

    Of the files that import it: the fast ones of its own room, the fast ones of others, the slow
    ones of its room. Then the fast ones of the files of its room that reach it through others.
    """
    mine, others = importers(module)
    room = [str(path.relative_to(ROOT)) for path in sorted(_room(module).glob("test_*.py"))]
    rest = [path for path in room if path not in mine]
    fast, slow = ("--tier=fast",), ("--tier=everything", "-m", "slow")
    every = ((mine, fast), (others, fast), (mine, slow), (rest, fast))
    return [Stage(tuple(files), options) for files, options in every if files]


def _room(module: str) -> pathlib.Path:
    return TESTS.joinpath(*module.split(".")[1:-1])


@functools.cache
def _imported(path: pathlib.Path) -> set[str]:
    """Return the modules a file imports, and `module:name` for each name from one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}:{alias.name}" for alias in node.names)}
    return names


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != module_of(self._mutant.path):
            return None
        return importlib.util.spec_from_file_location(name, ROOT / self._mutant.path, loader=self)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(mutated(self._mutant), self._mutant.path, "exec"), module.__dict__)


def run_tests(mutant: Mutant | None, stage: Stage, seconds: float) -> int:
    """Fork; return the child's process id. It ends with 0 if all tests pass, or there are none."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        import hypothesis
        import pytest

        hypothesis.settings.register_profile(
            "mutants", max_examples=60, derandomize=True, database=None, deadline=None
        )
        hypothesis.settings.load_profile("mutants")
        if mutant is not None:
            sys.meta_path.insert(0, Finder(mutant))
        slack = ["--fast-seconds=1e9", "--fast-compile=1e9", "--fast-in-all=1e9"]
        options = ["-x", "-q", "-p", "no:cacheprovider", *slack, *stage.options]
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = int(pytest.main([*options, *stage.files]))
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            code = 0
        if code and mutant is None:
            os.write(2, said.getvalue().encode())
    finally:
        os._exit(code)


class Report(NamedTuple):
    mutant: Mutant
    is_killed: bool


class Limits:
    """How long the tests of a stage may take with a mutant: ten times what they take without."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}

    def of(self, stage: Stage) -> float:
        if stage not in self._seconds:
            _, status, used = os.wait4(run_tests(None, stage, 3600), 0)
            if status:
                sys.exit(f"These tests fail without any change: {stage}")
            seconds = used.ru_utime + used.ru_stime
            print(f"{seconds:.0f} s: {' '.join((*stage.options, *stage.files))}", flush=True)
            self._seconds[stage] = 20 + 10 * seconds
        return self._seconds[stage]


def examine(chosen: Sequence[Mutant], num_workers: int, num_stages: int) -> list[Report]:
    """Run the tests of every mutant, some mutants at a time."""
    paths = {mutant.path for mutant in chosen}
    tests = {path: stages(module_of(path))[:num_stages] for path in sorted(paths)}
    untested = [path for path in tests if not any(importers(module_of(path)))]
    if untested:
        sys.exit(f"No test imports {', '.join(untested)}.")
    limits = Limits()
    for every in tests.values():
        for stage in every:
            limits.of(stage)
    waiting = [(mutant, 0) for mutant in reversed(chosen)]
    running: dict[int, tuple[Mutant, int]] = {}
    reports: list[Report] = []
    while waiting or running:
        while waiting and len(running) < num_workers:
            mutant, number = waiting.pop()
            stage = tests[mutant.path][number]
            running[run_tests(mutant, stage, limits.of(stage))] = mutant, number
        child, status, _ = os.wait4(-1, 0)
        mutant, number = running.pop(child)
        if not status and number + 1 < len(tests[mutant.path]):
            waiting.append((mutant, number + 1))
            continue
        reports.append(Report(mutant, status != 0))
        word = "killed" if status else "SURVIVED"
        at = f"{mutant.path}:{mutant.line}"
        print(f"{len(reports)}/{len(chosen)} {word} {at} {mutant.change}", flush=True)
    return reports


def preload() -> None:
    """Import what every fork needs, and nothing that starts threads or devices."""
    # conftest.py sets these too late for libraries that are imported here.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(TESTS))
    os.chdir(ROOT)
    for name in ("hypothesis", "pytest", "numpy", "jax", "flax.linen", "optax", "transformers"):
        importlib.import_module(name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=200, help="mutants; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=["*"], help="patterns of paths")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", type=int, default=4, help="1: fast tests of the module alone")
    parser.add_argument("--json", help="write what became of every mutant to this file")
    args = parser.parse_args(argv)
    files = [path for pattern in TARGETS for path in sorted(ROOT.glob(pattern))]
    files = [
        path
        for path in files
        if path.stem != "__init__"
        and any(fnmatch.fnmatch(str(path.relative_to(ROOT)), each) for each in args.files)
    ]
    chosen = sample(files, args.sample or 10**9, args.seed)
    preload()
    began = time.monotonic()
    reports = examine(chosen, args.workers, args.stages)
    survivors = [report for report in reports if not report.is_killed]
    share = 100 * (1 - len(survivors) / len(reports))
    seconds = time.monotonic() - began
    num_killed = len(reports) - len(survivors)
    print(f"\n{num_killed} of {len(reports)} mutants killed: {share:.1f} %, {seconds:.0f} s")
    for path, line, change, _ in sorted(report.mutant for report in survivors):
        text = (ROOT / path).read_text().splitlines()[line - 1].strip()
        print(f"survived  {path}:{line}  {change}  | {text}")
    if args.json:
        rows = [{**r.mutant._asdict(), "is_killed": r.is_killed} for r in reports]
        pathlib.Path(args.json).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return int(share < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
