"""The record of what was drawn: cut where a run goes back, and checked place by place."""

from __future__ import annotations

import json

import pytest

from jlrm import report
from jlrm.config import RunError, UsageError
from jlrm.data import audit, batches
from jlrm.data.audit import Draws
from jlrm.runtime import commands


def written(path, num_steps: int, *, batch: int = 3, rows: int = 7, draws: int = 1):
    """Write the record of a stage as a run does, each step drawing so many batches."""
    for step in range(num_steps):
        first = step * draws
        drawn = [batches.batch_rows(0, first + i, batch, rows).tolist() for i in range(draws)]
        fates = [["discarded"] * batch] * (draws - 1) + [["trained"] * batch]
        audit.write(path, "grpo", step + 1, first, Draws(rows, drawn, fates))
    return path


@pytest.mark.parametrize("draws", [1, 3])
def test_epochs_that_batches_run_across_add_up(tmp_path, draws):
    (found,) = audit.check(audit.read(written(tmp_path, 14, draws=draws)))
    assert found.faults == [] and found.steps == 14
    assert found.epochs == pytest.approx(14 * 3 * draws / 7)
    assert found.counts == {
        "trained": 42, "skipped": 0, "discarded": 42 * (draws - 1), "not_applied": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda lines: lines.pop(2), "after step 2 comes step 4"),
        (lambda lines: lines.insert(2, lines[1]), "after step 2 comes step 2"),
        (lambda lines: lines[3].update(position=2), "step 4 drew batch 2 of the data, not 3"),
        (lambda lines: lines[0]["rows"][0].__setitem__(1, lines[0]["rows"][0][0]), "again in ep"),
        (lambda lines: lines[1].update(rows=lines[0]["rows"]), "again in epoch 1"),
        (lambda lines: lines[1]["rows"][0].__setitem__(0, 7), "step 2 drew row 7, of 7"),
    ],
)
def test_what_does_not_add_up_is_named(tmp_path, change, fault):
    lines = audit.read(written(tmp_path, 5))
    change(lines)
    (found,) = audit.check(lines)
    assert any(fault in text for text in found.faults), found.faults


def test_other_rows_begin_other_epochs(tmp_path):
    """As when a run goes on with rows that were added, which it was told to accept."""
    written(tmp_path, 2, rows=7)
    for step in (3, 4):
        drawn = batches.batch_rows(0, step - 1, 3, 11).tolist()
        audit.write(tmp_path, "grpo", step, step - 1, Draws(11, [drawn], [["trained"] * 3]))
    (found,) = audit.check(audit.read(tmp_path))
    assert found.faults == [] and found.rows == 11


def test_going_back_to_a_step_forgets_later_ones_and_later_stages(tmp_path):
    audit.write(tmp_path, "sft", 1, 0, Draws(4, [[0, 1]], [["trained"] * 2]))
    written(tmp_path, 4)
    with (tmp_path / audit.FILE).open("a") as file:
        file.write('{"stage": "grpo", "st')  # a kill tore it
    audit.forget_after(tmp_path, "grpo", 2)
    assert [(x["stage"], x["step"]) for x in audit.read(tmp_path)] == [
        ("sft", 1), ("grpo", 1), ("grpo", 2)
    ]  # fmt: skip
    assert (tmp_path / audit.FILE).read_text().endswith("}\n")
    audit.forget_after(tmp_path, "sft", 0)
    assert audit.read(tmp_path) == []
    audit.forget_after(tmp_path / "nothing", "sft", 0)  # no file, none made


def test_the_command_shows_it(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"holds no audit\.jsonl"):
        report.main([str(tmp_path), "--audit"])
    report.main([str(written(tmp_path, 5)), "--audit"])
    said = capsys.readouterr().out
    assert "No step is missing" in said and said.splitlines()[2].split()[:4] == [
        "grpo", "5", "7", "2.14"
    ]  # fmt: skip
    lines = (tmp_path / audit.FILE).read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"rows": json.loads(lines[0])["rows"]})
    (tmp_path / audit.FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match="again in epoch 1"):
        report.main([str(tmp_path), "--audit"])
    assert commands.run(lambda: report.main([str(tmp_path), "--audit"])) == 1
    for text, why in {
        "x": "is no JSON",
        "[1]": "names no stage",
        '{"stage": "sft", "step": 1}': "is no step of a run",
    }.items():
        (tmp_path / audit.FILE).write_text(f"{text}\n{lines[0]}\n")
        with pytest.raises(UsageError, match=f"line 1 {why}"):
            report.main([str(tmp_path), "--audit"])
