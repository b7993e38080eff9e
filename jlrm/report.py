"""`report.html` and `report.png` of a run: curves, held-out results, sampled judgements.

The one idea: PANELS lists the curves, and whatever a run has no numbers for is left out, so one
page serves SFT alone, GRPO alone, both, and a run still under way. The page is one file without
scripts or network. Each panel is a picture of its own, in a light and a dark version, so that the
browser can lay them out for a phone or a desktop.

Left out: comparing runs (TensorBoard and W&B do that).

    python -m jlrm.report RUN_DIR        renders again from what the directory holds
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jlrm.reports.run_page import write_report
from jlrm.runtime import commands


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.report", description="Write report.html and report.png of a run again."
    )
    parser.add_argument("run_dir", type=pathlib.Path, help="run.dir of the run's configuration")
    run_dir = parser.parse_args(argv).run_dir
    write_report(run_dir)
    print(run_dir / "report.html")


if __name__ == "__main__":
    sys.exit(commands.run(main))
