"""A plan as text, as a page and as a picture; what it says comes from plan.py."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jlrm.planning.figures import ProgramPlan, SlicePlan, write_plan
from jlrm.planning.memory import KINDS
from jlrm.planning.slices import GIB
from jlrm.reports import charts, tables
from jlrm.reports.pages import write_page
from jlrm.reports.theme import colour

NOTE = "Per device. bound s: lower bound from data-sheet rates, no speed. TFLOP: matrix products, "
NOTE += "without the kernels of attention (of log-probabilities and update)."


class PlanTable(NamedTuple):
    columns: list[str]
    rows: list[dict[str, Any]]


def describe(plan: SlicePlan, table: Any = tables.table) -> str:
    """Return a plan as text; `table` lays out rows under columns."""
    lines = [_subject(plan), ""]
    for each in _tables(plan):
        lines += [table(each.rows, each.columns), ""]
    lines += _notes(plan)
    if plan.overrides:
        lines.append(f"Smallest that fits: {plan.topology} {' '.join(plan.overrides)}")
    return "\n".join([*lines, verdict(plan)])


def _subject(plan: SlicePlan) -> str:
    sizes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return (
        f"{plan.topology} x {plan.slices}: {plan.devices} devices ({sizes}), "
        f"{plan.limit_gib:.2f} GiB each. Model: {plan.model}.{_versions(plan)}"
    )


def _versions(plan: SlicePlan) -> str:
    if not plan.versions:
        return ""
    return f" Compiled by {', '.join(f'{name} {each}' for name, each in plan.versions.items())}."


def _tables(plan: SlicePlan) -> list[PlanTable]:
    """Return memory by phase, the programs, and what they move between devices."""
    programs = plan.programs
    phases = [
        {
            "phase": name,
            "resident GiB": phase.resident_gib,
            "peak GiB": phase.peak_gib,
            "of limit %": 100 * phase.peak_gib / plan.limit_gib,
            "during": phase.program,
        }
        for name, phase in plan.phases.items()
    ]
    memory = [f"{name} GiB" for name in ("argument", "temp", "peak", "code")]
    columns = ["program", *memory, "TFLOP", "HBM GiB", "bound s"]
    moves = [row for name, program in programs.items() for row in _moves(name, program)]
    return [
        PlanTable(["phase", "resident GiB", "peak GiB", "of limit %", "during"], phases),
        PlanTable([*columns, "compile s"], [_row(name, each) for name, each in programs.items()]),
        PlanTable(["program", "collective", "count", "ICI GiB", "DCN GiB"], moves),
    ]


def _notes(plan: SlicePlan) -> list[str]:
    notes = [
        f"{name}: {', '.join(note for note in (program.assumed, program.note) if note)}"
        for name, program in plan.programs.items()
        if program.assumed or program.note
    ]
    notes.append(NOTE)
    if plan.host:
        held = ", ".join(f"{name} {gib:.1f}" for name, gib in plan.host.phases_gib.items())
        notes.append(
            f"A VM's own memory: {plan.host.limit_gib:.0f} GiB (chips: {plan.host.chips}). It "
            f"holds, beside Python and what compiling takes, GiB: {held}."
        )
    notes += _duration(plan)
    if plan.not_compiled:
        notes.append(f"Not compiled: {', '.join(plan.not_compiled)}.")
    return notes


def _duration(plan: SlicePlan) -> list[str]:
    """Return how long the run takes, and what that rests on."""
    took = plan.duration
    if took is None:
        return []
    steps = ", ".join(
        f"{name} {took.steps[name]} steps of {_from_to(*took.step_s[name])} s"
        for name in took.step_s
    )
    cost = f", {_from_to(*took.dollars)} dollars" if took.dollars else ""
    return [f"Estimate: {_from_to(*took.hours)} hours{cost} ({steps}). {took.basis}"]


def _from_to(least: float, most: float) -> str:
    return f"{least:.3g} to {most:.3g}"


def verdict(plan: SlicePlan) -> str:
    """Return whether the run fits, as a sentence."""
    usable = plan.limit_gib if plan.usable_gib is None else plan.usable_gib
    over = plan.peak_gib - usable
    sizes = f"{plan.peak_gib:.2f} of {usable:.2f} GiB"
    if usable < plan.limit_gib:
        share = 100 * usable / plan.limit_gib
        sizes += f" ({share:.0f} % of {plan.limit_gib:.2f})"
    if plan.fits:
        return f"Fits: {sizes}."
    host = plan.host
    if host and max(host.phases_gib.values()) > host.limit_gib * usable / plan.limit_gib:
        phase = max(host.phases_gib, key=lambda name: host.phases_gib[name])
        return (
            f"Does not fit: phase {phase} needs {host.phases_gib[phase]:.1f} of "
            f"{host.limit_gib:.1f} GiB of the VM's own memory on {plan.topology}."
        )
    worst = max(plan.phases, key=lambda name: plan.phases[name].peak_gib)
    refused = [name for name, each in plan.programs.items() if each.temp_gib is None]
    where = f"the compiler refuses {', '.join(refused)}" if refused else f"phase {worst}"
    amount = f"by {over:.2f} GiB" if over > 0 else "and the compiler names no HBM size"
    return f"Does not fit, {amount}: {where} needs {sizes} on {plan.topology}."


def _row(name: str, program: ProgramPlan) -> dict[str, Any]:
    row = {
        "program": name,
        "argument GiB": program.argument_gib,
        "temp GiB": program.temp_gib,
        "peak GiB": program.peak_gib,
        "code GiB": program.code_gib,
        "compile s": program.compile_s,
    }
    if program.flops is not None and program.bytes is not None and program.lower_bound_s:
        row |= {
            "TFLOP": program.flops / 1e12,
            "HBM GiB": program.bytes / GIB,
            "bound s": max(program.lower_bound_s.values()),
        }
    return row


def _moves(name: str, program: ProgramPlan) -> list[dict[str, Any]]:
    return [
        {
            "program": name,
            "collective": kind,
            "count": int(moved.count),
            "ICI GiB": moved.ici_bytes / GIB,
            "DCN GiB": moved.dcn_bytes / GIB,
        }
        for kind, moved in sorted((program.collectives or {}).items())
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(plan: SlicePlan, directory: pathlib.Path) -> None:
    """Write plan.json, plan.md, plan.html and plan.png."""
    directory.mkdir(parents=True, exist_ok=True)
    write_plan(directory, plan)
    (directory / "plan.md").write_text(describe(plan, _markdown) + "\n")
    chart, wide = (_memory_chart(plan, width) for width in (charts.WIDTH, 8.0))
    (directory / "plan.png").write_bytes(charts.png([wide], 1))
    write_page(
        directory / "plan.html",
        "plan.html",
        title=_title(plan),
        verdict=verdict(plan),
        fits=plan.fits,
        subject=_subject(plan),
        chart=chart._replace(title="Memory by phase"),
        wide=wide,
        tables=[
            (each.columns, [[_shown(row.get(name)) for name in each.columns] for row in each.rows])
            for each in _tables(plan)
            if each.rows
        ],
        overrides=plan.overrides or (),
        notes=_notes(plan),
    )


def _shown(value: Any) -> str:
    return charts.short(value) if isinstance(value, float) else _cell(value)


def _title(plan: SlicePlan) -> str:
    times = f" x {plan.slices}" if plan.slices > 1 else ""
    return f"Memory of {plan.model.partition(',')[0]} on {plan.topology}{times}"


def _memory_chart(plan: SlicePlan, width: float) -> charts.Chart:
    """Chart memory by phase: a bar of what is held, and the limit as a line."""
    phases = plan.phases
    sizes = {n: [phases[n].kinds_gib.get(kind, 0.0) for kind in KINDS] for n in phases}
    kept = [i for i in range(len(KINDS)) if any(row[i] for row in sizes.values())]
    bars = [
        charts.Bar(name, [row[i] for i in kept], f"{sum(row):.2f}") for name, row in sizes.items()
    ]
    return charts.stacks(
        _title(plan),
        bars,
        [(KINDS[i], colour(i)) for i in kept],
        limit=plan.limit_gib,
        x_label="GiB of HBM per device, at each phase's peak",
        width=width,
    )
