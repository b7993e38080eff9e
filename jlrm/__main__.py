"""All commands under one name: `jlrm COMMAND ...` is `python -m jlrm.COMMAND ...`.

A command's module is imported when it is asked for, so that `jlrm --help` answers at once.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Sequence

from jlrm import __version__
from jlrm.config import nearest

COMMANDS = {
    "train": "train a judge: SFT on written judgements, then GRPO",
    "judge": "judge answers: those of a file, or of whoever asks a server",
    "evaluate": "let a judge judge benchmarks, and score it by their rules",
    "study": "run trainings and evaluations of one file, and draw their tables",
    "prepare": "make one checked data set of comparisons from anywhere",
    "export": "move weights between a run and Hugging Face's format",
    "report": "draw the report of a run again",
    "scorecard": "show evaluated judges side by side",
    "plan": "say whether a run fits a TPU slice, without one",
    "bench": "measure how fast a run's programs are on this machine",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, and exit with its code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in jlrm/__init__.py
        sys.argv = [f"jlrm.{name}", *arguments]
        runpy.run_module(f"jlrm.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help", "help"):
        print(describe_commands())
    elif name == "--version":
        print(f"jlrm {__version__}")
    else:
        print(f"error: Unknown command '{name}'. {nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def describe_commands() -> str:
    """Return the help: one line for each command."""
    lines = [f"  {name:12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: jlrm COMMAND [ARGUMENT ...]", "", *lines, "", "jlrm COMMAND --help says more."]
    )


if __name__ == "__main__":
    main()
