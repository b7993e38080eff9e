"""`report.html`, `report.png` and `model_card.md` of evaluated judges, side by side.

The one idea: the first screen says which judge is better, by how much, and how sure that is; the
rest says what `results.json` says. Whatever no judge has numbers for is left out. The page is one
file without scripts or network. What a judge wrote is hostile text: it is escaped, and it stands in
boxes of its own.

Left out: any arithmetic on results, which is the business of evaluation/.

    python -m jlrm.scorecard RESULTS_DIR [RESULTS_DIR ...] --out DIR      renders again, compares
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from jlrm.reports import results_file, scorecard_page
from jlrm.runtime import commands


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the results and write them."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.scorecard",
        description="Write report.html, report.png and model_card.md of judges side by side.",
    )
    parser.add_argument(
        "results", type=pathlib.Path, nargs="+", help="directories that hold a results.json"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where to write")
    arguments = parser.parse_args(argv)
    files = [results_file.read(directory) for directory in arguments.results]
    scorecard_page.write(arguments.out, files)
    print(arguments.out / "report.html")


if __name__ == "__main__":
    commands.finish(main)
