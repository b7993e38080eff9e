"""`report.html` and `report.png` of a run: curves, held-out results, sampled judgements.

The one idea: PANELS lists the curves, and whatever a run has no numbers for is left out, so one
page serves SFT alone, GRPO alone, both, and a run still under way. The page is one file without
scripts or network. Each panel is a picture of its own, in a light and a dark version, so that the
browser can lay them out for a phone or a desktop.

Left out: comparing runs (TensorBoard and W&B do that).

    python -m jlrm.report RUN_DIR            renders again from what the directory holds
    python -m jlrm.report JUDGED_DIR         the page of what `jlrm judge` wrote
    python -m jlrm.report RUN_DIR --audit    tells which rows were drawn, and whether each was once
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from jlrm.config import RunError, UsageError
from jlrm.data import audit
from jlrm.reports.run_page import write_report
from jlrm.reports.tables import table
from jlrm.runtime import commands
from jlrm.serving import judged_page

MOST_FAULTS = 10  # lines of them that are shown


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.report",
        description="Draw report.html of a run, or of judged pairs, again.",
    )
    shown = "run.dir of the run's configuration, or --out of jlrm judge"
    parser.add_argument("run_dir", type=pathlib.Path, help=shown)
    parser.add_argument(
        "--audit",
        action="store_true",
        help="check that every row of an epoch was drawn exactly once; exit code 1 if not",
    )
    args = parser.parse_args(argv)
    if args.audit:
        show_audit(args.run_dir)
        return
    if judged_page.is_judged(args.run_dir):
        judged_page.write(args.run_dir)
    else:
        write_report(args.run_dir)
    print(args.run_dir / "report.html")


def show_audit(run_dir: pathlib.Path) -> None:
    """Print what each stage drew and what became of it.

    Raises:
      UsageError: the directory holds no record of it.
      RunError: a row of an epoch was drawn twice, or a step or a batch is missing.
    """
    if not (lines := audit.read(run_dir)):
        raise UsageError(f"{run_dir} holds no {audit.FILE}: no step of it has ended.")
    stages = audit.check(lines)
    rows = [stage._asdict() | stage.counts for stage in stages]
    print(table(rows, ["stage", "steps", "rows", "epochs", *audit.FATES]))
    faults = [f"{stage.stage}: {fault}" for stage in stages for fault in stage.faults]
    if faults:
        more = f"\nand {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        shown = "\n".join(faults[:MOST_FAULTS])
        raise RunError(f"Not every row of an epoch was drawn exactly once:\n{shown}{more}")
    print("No step is missing, and no row was drawn twice in an epoch.")


if __name__ == "__main__":
    commands.finish(main)
