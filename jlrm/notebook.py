"""Commands of jlrm in a notebook: run as processes of their own, watched while they run.

A command in its own process gives the TPU back when it ends, and needs no restart of the notebook
after an installation. Interrupting the cell stops a run as Ctrl-C does: it saves, and the same cell
goes on from there.
"""

from __future__ import annotations

import collections
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from IPython.display import HTML, Image, display  # pyright: ignore[reportMissingImports]

from jlrm.config import RunError
from jlrm.reports import run_page

LINES = 30  # of output that are kept


def run(command: str, *arguments: str, curves: str = "", seconds: float = 5.0) -> None:
    """Run `python -m jlrm.COMMAND ARGUMENTS` and show its last line, and curves as they grow.

    curves: a run directory whose metrics are drawn anew every `seconds`.

    Raises:
      RunError: it failed; the message ends with what it said last.
    """
    shown = display("", display_id=True)
    drawn = display("", display_id=True) if curves else None
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", f"jlrm.{command}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    said: collections.deque[str] = collections.deque(maxlen=LINES)
    reader = threading.Thread(target=_read, args=(process, said), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            _show(shown, said, 1)
            _draw(drawn, curves)
            time.sleep(min(seconds, 1.0) if not curves else seconds)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
    process.wait()
    reader.join()
    _draw(drawn, curves)
    _show(shown, said, LINES)
    if process.returncode:
        raise RunError(f"jlrm.{command} ended with {process.returncode}: {' '.join(said)[-2000:]}")


def _read(process: subprocess.Popen[str], said: collections.deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            said.append(line.rstrip())


def _show(shown: Any, said: collections.deque[str], num_lines: int) -> None:
    from html import escape

    text = "\n".join(list(said)[-num_lines:])
    shown.update(HTML(f"<pre>{escape(text)}</pre>"))


def _draw(drawn: Any, run_dir: str) -> None:
    if not run_dir or not pathlib.Path(run_dir).is_dir():
        return
    picture = run_page.picture(pathlib.Path(run_dir))
    if picture is not None:
        drawn.update(Image(picture, width=1100))
