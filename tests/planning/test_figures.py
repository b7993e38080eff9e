"""Plans are read back as they were written, with what was not counted left out."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jlrm.config import UsageError
from jlrm.planning import figures, page
from jlrm.planning.figures import DecodeStep, Moved, PhasePlan, ProgramPlan, SlicePlan, Work

REFUSED = ProgramPlan(1.0, None, None, 20.0, None, None, None, 0.5, "", "refused")
WORK = Work(2e12, 3e9, {"all-gather": Moved(2.0, 4e9, 0.0)}, {"flops": 0.1, "bytes": 0.2}, 7.0)
STEP = DecodeStep(**{f.name: getattr(WORK, f.name) for f in dataclasses.fields(WORK)}, steps=7)
COUNTED = dataclasses.replace(
    REFUSED, temp_gib=0.5, flops=2e12, bytes=3e9, unknown_loops=0, prefill=WORK, decode_step=STEP
)
PLAN = SlicePlan(
    fits=False,
    peak_gib=20.0,
    limit_gib=15.75,
    topology="v5e:4x4",
    slices=1,
    devices=16,
    mesh={"data": 1, "fsdp": 4, "tensor": 4},
    model="preset toy",
    programs={"rollout": COUNTED, "update": REFUSED},
    phases={"update": PhasePlan("update", 1.5, 20.0, {"weights": 20.0})},
    not_compiled=("evaluation",),
)


@pytest.mark.parametrize("overrides", [None, ("mesh.fsdp=4",)])
def test_a_plan_is_read_back(tmp_path, overrides):
    plan = dataclasses.replace(PLAN, overrides=overrides)
    figures.write_plan(tmp_path, plan)
    path = tmp_path / "plan.json"
    content = json.loads(path.read_text())
    assert ("overrides" in content) == bool(overrides)
    assert "decode_step" not in content["programs"]["update"]
    assert content["programs"]["update"]["flops"] is None
    assert content["programs"]["rollout"]["decode_step"]["steps"] == 7
    assert figures.read_plan(path) == plan
    del content["version"]  # as plans were written before there was one
    path.write_text(json.dumps(content))
    assert figures.read_plan(path) == plan
    path.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(UsageError, match="is of version 2, and this program reads version 1"):
        figures.read_plan(path)


def test_a_plan_that_does_not_fit_says_so():
    text = page.describe(PLAN)
    assert "Does not fit, by 4.25 GiB: the compiler refuses update needs 20.00 of 15.75" in text
    assert "Not compiled: evaluation." in text and "Smallest that fits" not in text


def test_a_vm_that_is_too_small_does_not_fit():
    host = figures.HostPlan(4, 100.0, {"load": 3.0, "checkpoint": 95.0})
    plan = dataclasses.replace(PLAN, peak_gib=1.0, usable_gib=14.4, host=host)
    said = "Does not fit: phase checkpoint needs 95.0 of 100.0 GiB of the VM's own memory"
    assert page.verdict(plan).startswith(said)
