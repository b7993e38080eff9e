"""A plan as text, as a page and as a picture; what it says comes from plan.py."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jlrm.planning.memory import KINDS
from jlrm.planning.slices import GIB
from jlrm.reports import charts, tables
from jlrm.reports.pages import write_page
from jlrm.reports.theme import colour

NOTE = "Per device. bound s: lower bound from data-sheet rates, no speed. TFLOP: matrix products, "
NOTE += "without Pallas kernels (attention of log-probabilities and update)."


class PlanTable(NamedTuple):
    columns: list[str]
    rows: list[dict[str, Any]]


def describe(result: dict[str, Any], table: Any = tables.table) -> str:
    """Return a plan as text; `table` lays out rows under columns."""
    lines = [_subject(result), ""]
    for each in _tables(result):
        lines += [table(each.rows, each.columns), ""]
    lines += _notes(result)
    if "overrides" in result:
        lines.append(f"Smallest that fits: {result['topology']} {' '.join(result['overrides'])}")
    return "\n".join([*lines, verdict(result)])


def _subject(result: dict[str, Any]) -> str:
    sizes = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    return (
        f"{result['topology']} x {result['slices']}: {result['devices']} devices ({sizes}), "
        f"{result['limit_gib']:.2f} GiB each. Model: {result['model']}."
    )


def _tables(result: dict[str, Any]) -> list[PlanTable]:
    """Return memory by phase, the programs, and what they move between devices."""
    programs = result["programs"]
    phases = [
        {
            "phase": name,
            "resident GiB": phase["resident_gib"],
            "peak GiB": phase["peak_gib"],
            "of limit %": 100 * phase["peak_gib"] / result["limit_gib"],
            "during": phase["program"],
        }
        for name, phase in result["phases"].items()
    ]
    columns = ["program", "argument GiB", "temp GiB", "peak GiB", "TFLOP", "HBM GiB", "bound s"]
    moves = [row for name, program in programs.items() for row in _moves(name, program)]
    return [
        PlanTable(["phase", "resident GiB", "peak GiB", "of limit %", "during"], phases),
        PlanTable([*columns, "compile s"], [_row(name, each) for name, each in programs.items()]),
        PlanTable(["program", "collective", "count", "ICI GiB", "DCN GiB"], moves),
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [
        f"{name}: {', '.join(note for note in (program['assumed'], program['note']) if note)}"
        for name, program in result["programs"].items()
        if program["assumed"] or program["note"]
    ]
    notes.append(NOTE)
    if result["not_compiled"]:
        notes.append(f"Not compiled: {', '.join(result['not_compiled'])}.")
    return notes


def verdict(result: dict[str, Any]) -> str:
    """Return whether the run fits, as a sentence."""
    over = result["peak_gib"] - result["limit_gib"]
    if result["fits"]:
        return f"Fits: {result['peak_gib']:.2f} of {result['limit_gib']:.2f} GiB."
    worst = max(result["phases"], key=lambda name: result["phases"][name]["peak_gib"])
    refused = [name for name, each in result["programs"].items() if each["temp_gib"] is None]
    where = f"the compiler refuses {', '.join(refused)}" if refused else f"phase {worst}"
    amount = f"by {over:.2f} GiB" if over > 0 else "and the compiler names no HBM size"
    return (
        f"Does not fit, {amount}: {where} needs {result['peak_gib']:.2f} of "
        f"{result['limit_gib']:.2f} GiB on {result['topology']}."
    )


def _row(name: str, program: dict[str, Any]) -> dict[str, Any]:
    row = {
        "program": name,
        "argument GiB": program["argument_gib"],
        "temp GiB": program["temp_gib"],
        "peak GiB": program["peak_gib"],
        "compile s": program["compile_s"],
    }
    if program["flops"] is not None:
        row |= {
            "TFLOP": program["flops"] / 1e12,
            "HBM GiB": program["bytes"] / GIB,
            "bound s": max(program["lower_bound_s"].values()),
        }
    return row


def _moves(name: str, program: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "program": name,
            "collective": kind,
            "count": int(moved["count"]),
            "ICI GiB": moved["ici_bytes"] / GIB,
            "DCN GiB": moved["dcn_bytes"] / GIB,
        }
        for kind, moved in sorted((program["collectives"] or {}).items())
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(result: dict[str, Any], directory: pathlib.Path) -> None:
    """Write plan.json, plan.md, plan.html and plan.png."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(result, indent=2) + "\n")
    (directory / "plan.md").write_text(describe(result, _markdown) + "\n")
    chart, wide = (_memory_chart(result, width) for width in (charts.WIDTH, 8.0))
    (directory / "plan.png").write_bytes(charts.png([wide], 1))
    write_page(
        directory / "plan.html",
        "plan.html",
        title=_title(result),
        verdict=verdict(result),
        fits=result["fits"],
        subject=_subject(result),
        chart=chart._replace(title="Memory by phase"),
        wide=wide,
        tables=[
            (each.columns, [[_shown(row.get(name)) for name in each.columns] for row in each.rows])
            for each in _tables(result)
            if each.rows
        ],
        overrides=result.get("overrides", []),
        notes=_notes(result),
    )


def _shown(value: Any) -> str:
    return charts.short(value) if isinstance(value, float) else _cell(value)


def _title(result: dict[str, Any]) -> str:
    times = f" x {result['slices']}" if result["slices"] > 1 else ""
    return f"Memory of {result['model'].partition(',')[0]} on {result['topology']}{times}"


def _memory_chart(result: dict[str, Any], width: float) -> charts.Chart:
    """Chart memory by phase: a bar of what is held, and the limit as a line."""
    phases = result["phases"]
    sizes = {n: [phases[n]["kinds_gib"].get(kind, 0.0) for kind in KINDS] for n in phases}
    kept = [i for i in range(len(KINDS)) if any(row[i] for row in sizes.values())]
    bars = [
        charts.Bar(name, [row[i] for i in kept], f"{sum(row):.2f}") for name, row in sizes.items()
    ]
    return charts.stacks(
        _title(result),
        bars,
        [(KINDS[i], colour(i)) for i in kept],
        limit=result["limit_gib"],
        x_label="GiB of HBM per device, at each phase's peak",
        width=width,
    )
