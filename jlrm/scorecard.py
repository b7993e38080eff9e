"""`report.html`, `report.png` and `model_card.md` of evaluated judges, side by side.

The one idea: a page says what `results.json` says, and no more. Judges are columns, and whatever no
judge has numbers for is left out. The page is one file without scripts or network; each picture
comes in a light and a dark version. What a judge wrote is hostile text: it is escaped, and it
stands in boxes of its own.

Left out: any arithmetic on results. statistics.py made the numbers.

    python -m jlrm.scorecard RESULTS_DIR [RESULTS_DIR ...] --out DIR      renders again, compares
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from jlrm.config import UsageError
from jlrm.reports.scorecard_page import write
from jlrm.reports.values import (
    Row,
)
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
    write(arguments.out, [_read(directory) for directory in arguments.results])
    print(arguments.out / "report.html")


def _read(directory: pathlib.Path) -> Row:
    path = directory / "results.json"
    if not path.exists():
        raise UsageError(
            f"{directory} holds no results.json. Give what --out of an evaluation named."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}. Run the evaluation again.") from error


if __name__ == "__main__":
    sys.exit(commands.run(main))
