"""A plan as text, as files and as a picture; what it says is found in plan.py."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jlrm.planning.phases import KINDS
from jlrm.planning.slices import GIB
from jlrm.reports import tables

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#F0E442", "#BBBBBB")
PROGRAM_COLUMNS = ["program", "argument GiB", "temp GiB", "peak GiB"]
PROGRAM_COLUMNS += ["TFLOP", "HBM GiB", "bound s", "compile s"]


def describe(result: dict[str, Any], table: Any = tables.table) -> str:
    """Return a plan as text; `table` lays out rows under columns."""
    limit = result["limit_gib"]
    sizes = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [
        f"{result['topology']} x {result['slices']}: {result['devices']} devices ({sizes}), "
        f"{limit:.2f} GiB each. Model: {result['model']}.",
        "",
        table(
            [
                {
                    "phase": name,
                    "resident GiB": phase["resident_gib"],
                    "peak GiB": phase["peak_gib"],
                    "of limit %": 100 * phase["peak_gib"] / limit,
                    "during": phase["program"],
                }
                for name, phase in result["phases"].items()
            ],
            ["phase", "resident GiB", "peak GiB", "of limit %", "during"],
        ),
        "",
        table(
            [_row(name, program) for name, program in result["programs"].items()],
            PROGRAM_COLUMNS,
        ),
        "",
        table(
            [row for name, program in result["programs"].items() for row in _moves(name, program)],
            ["program", "collective", "count", "ICI GiB", "DCN GiB"],
        ),
        "",
        *(
            f"{name}: {', '.join(note for note in (program['assumed'], program['note']) if note)}"
            for name, program in result["programs"].items()
            if program["assumed"] or program["note"]
        ),
        "Per device. bound s: lower bound from data-sheet rates, no speed. TFLOP: matrix products, "
        "without Pallas kernels (attention of score and update).",
    ]
    if result["not_compiled"]:
        lines.append(f"Not compiled: {', '.join(result['not_compiled'])}.")
    if "overrides" in result:
        lines.append(f"Smallest that fits: {result['topology']} {' '.join(result['overrides'])}")
    return "\n".join([*lines, verdict(result)])


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
            "count": int(found["count"]),
            "ICI GiB": found["ici_bytes"] / GIB,
            "DCN GiB": found["dcn_bytes"] / GIB,
        }
        for kind, found in sorted((program["collectives"] or {}).items())
    ]


def _markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(result: dict[str, Any], directory: pathlib.Path) -> None:
    """Write plan.json, plan.md and plan.png."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(result, indent=2) + "\n")
    (directory / "plan.md").write_text(describe(result, _markdown) + "\n")
    _draw(result).savefig(directory / "plan.png", dpi=150)


def _draw(result: dict[str, Any]) -> Any:
    """Draw memory by phase: a bar of what is held, and the limit as a line."""
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    names = list(result["phases"])
    figure = Figure(figsize=(9, 1.8 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        sizes = [result["phases"][name]["kinds_gib"].get(kind, 0.0) for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, label=kind, color=colour, edgecolor="white")
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for name, total in zip(names, left, strict=True):
        place: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(f"{total:.2f}", (total, name), (4, 0), bbox=over_the_line, **place)
    axes.axvline(result["limit_gib"], color="black", linestyle="--")
    axes.annotate(
        f"limit {result['limit_gib']:.2f}",
        (result["limit_gib"], 1.0),
        (-4, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
    )
    axes.set_xlim(0, 1.08 * max(result["limit_gib"], *left))
    axes.invert_yaxis()
    axes.set_xlabel("GiB of HBM per device, at each phase's peak")
    times = f" x {result['slices']}" if result["slices"] > 1 else ""
    title = f"{result['model'].partition(',')[0]} on {result['topology']}{times}"
    axes.set_title(title, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
