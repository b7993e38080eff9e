"""The notice that Google Cloud gives a VM before it takes it back, taken as SIGTERM.

The metadata of a spot VM say `instance/preempted` as soon as it is to go, some 30 s before it is
off; SIGTERM comes later than that, when the system is shutting down, and often too late to save.
GKE sends SIGTERM at once, and so does Slurm: nothing is asked there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from jlrm.runtime import google

EVERY = 1.0  # seconds between questions
PATIENCE = 10.0  # for an answer
NOTICE = 30.0  # seconds that Google allows
ALLOWED = "JLRM_GRACE_SECONDS"  # what another scheduler allows, as it says itself


def watch() -> None:
    """Begin to ask, on a VM of Google Cloud, whether it is to go: then SIGTERM comes."""
    if not google.is_here():
        return
    threading.Thread(target=_wait, daemon=True, name="preemption").start()


def seconds_allowed() -> float | None:
    """Return the time from SIGTERM to SIGKILL, None if nobody has said it."""
    try:
        return float(os.environ[ALLOWED])
    except (KeyError, ValueError):
        return NOTICE if google.is_here() else None


def _wait() -> None:
    while True:
        try:
            is_to_go = google.metadata("instance/preempted", PATIENCE) == "TRUE"
        except google.Unknown:  # GKE's own server knows no such thing
            return
        except OSError:  # not there for a moment
            is_to_go = False
        if is_to_go:
            print("Google Cloud is taking this VM back.", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(EVERY)
