"""How every command ends: the exit code, and one sentence where a user can mend something.

0 done; 1 the run failed; 2 wrong input; 130 Ctrl-C; 143 SIGTERM (a scheduler may start it again).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from jlrm.config import RunError, UsageError


class Interrupted(Exception):
    """A command was asked to stop by a signal, and has saved what it had."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def run(main: Callable[[], None]) -> int:
    """Run a command's `main` and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    # Orbax says this of every checkpoint saved without a held-out metric, which is most of them.
    logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in record.getMessage())
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("Stopped at once; checkpoints that were finished are whole.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
