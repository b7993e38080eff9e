"""The mutants themselves: each is one change, none is where no result depends on it."""

from __future__ import annotations

import ast

import mutate
import pytest

SOURCE = '''"""Numbers 1 < 2."""

def clip(value: int = 3, *, most: "1 < 2" = 10) -> int:
    """Return 1 < 2."""
    log.info("%d", value + 1)
    if value > most and not value == 4:
        raise ValueError(f"{value + 1} is more than {most - 1}")
    total = 0
    for each in zip([value], [most], strict=True):
        total += each[0]
    return pick(-value, total) if total else max(value, most)
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    path = tmp_path / "clip.py"
    path.write_text(SOURCE)
    return path


def test_each_mutant_is_one_change_and_differs_from_all_others(file):
    every = mutate.mutants(file)
    texts = [ast.unparse(mutate.mutated(mutant)) for mutant in every]
    plain = ast.unparse(ast.parse(SOURCE))
    assert len({*texts, plain}) == len(every) + 1
    lines = [
        sum(a != b for a, b in zip(text.splitlines(), plain.splitlines(), strict=True))
        for text in texts
    ]
    assert set(lines) == {1}


def test_what_is_changed(file):
    changes = {(mutant.line, mutant.change) for mutant in mutate.mutants(file)}
    assert changes == {
        (3, "3 -> 4"),
        (3, "10 -> 11"),
        (6, "condition negated"),
        (6, "And -> Or"),
        (6, "Gt -> GtE"),
        (6, "Gt -> LtE"),
        (6, "Eq -> NotEq"),
        (6, "4 -> 5"),
        (8, "0 -> 1"),
        (9, "arguments swapped"),
        (10, "Add -> Sub"),
        (10, "0 -> 1"),
        (10, "statement dropped"),
        (11, "condition negated"),
        (11, "arguments swapped"),
        (11, "USub dropped"),
    }


def test_a_sample_depends_on_the_seed_alone_and_takes_some_of_every_file(file):
    other = file.with_name("other.py")
    other.write_text("one = 1\n")
    first = mutate.sample([file, other], 6, 0)
    assert first == mutate.sample([other, file], 6, 0)
    assert {mutant.path for mutant in first} == {"clip.py", "other.py"}
    assert any(mutate.sample([file, other], 6, seed) != first for seed in range(1, 5))
    assert len(mutate.sample([file, other], 10**6, 0)) == len(mutate.mutants(file)) + 1


@pytest.mark.slow
def test_every_target_has_tests_in_its_room():
    for pattern in mutate.TARGETS:
        for path in mutate.ROOT.glob(pattern):
            if path.stem != "__init__":
                module = mutate.module_of(str(path.relative_to(mutate.ROOT)))
                assert any(mutate.importers(module)), f"no test imports {module}"
