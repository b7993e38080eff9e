"""The notice that Google Cloud gives a VM before it takes it back, taken as SIGTERM.

The metadata of a spot VM say `instance/preempted` as soon as it is to go, some 30 s before it is
off; SIGTERM comes later than that, when the system is shutting down, and often too late to save.
GKE sends SIGTERM at once, and so does Slurm: nothing is asked there.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

VENDOR = pathlib.Path("/sys/class/dmi/id/product_name")
HOST = "metadata.google.internal"  # another one: GCE_METADATA_HOST, as Google's libraries have it
EVERY = 1.0  # seconds between questions
PATIENCE = 10.0  # for an answer
NOTICE = 30.0  # seconds that Google allows
ALLOWED = "JLRM_GRACE_SECONDS"  # what another scheduler allows, as it says itself


def watch() -> None:
    """Begin to ask, on a VM of Google Cloud, whether it is to go: then SIGTERM comes."""
    if not _is_on_google():
        return
    threading.Thread(target=_wait, daemon=True, name="preemption").start()


def seconds_allowed() -> float | None:
    """Return the time from SIGTERM to SIGKILL, None if nobody has said it."""
    try:
        return float(os.environ[ALLOWED])
    except (KeyError, ValueError):
        return NOTICE if _is_on_google() else None


def _is_on_google() -> bool:
    if os.environ.get("GCE_METADATA_HOST"):
        return True
    try:
        return VENDOR.read_text().startswith("Google")
    except OSError:
        return False


def _wait() -> None:
    url = f"http://{os.environ.get('GCE_METADATA_HOST') or HOST}/computeMetadata/v1/"
    question = urllib.request.Request(
        f"{url}instance/preempted", headers={"Metadata-Flavor": "Google"}
    )
    # The metadata are never behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(question, timeout=PATIENCE) as answer:
                is_to_go = answer.read().strip() == b"TRUE"
        except urllib.error.HTTPError as error:
            if error.code == 404:  # GKE's own server knows no such thing
                return
            is_to_go = False
        except OSError:  # not there for a moment
            is_to_go = False
        if is_to_go:
            print("Google Cloud is taking this VM back.", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(EVERY)
