"""Both engines against the number of rows: the same set, seconds, and peak memory.

    export JLRM_ROWS=100000,300000,1000000
    python -m pytest --tier campaign tests/preparation/test_scale.py -s

prints a line a run. Without apache-beam only the local engine runs. Beam's in-process runner keeps
rows in memory, some 10 GiB of a million: on many machines a runner keeps them on disks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from made_rows import write

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[2]
ROWS = [int(number) for number in os.environ.get("JLRM_ROWS", "20000,60000").split(",")]
MOST_OF_A_ROW = 300  # bytes of memory that a row may cost the local engine


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def prepared(folder: pathlib.Path, num_rows: int, engine: str) -> int:
    """Prepare in a process of its own, print what it took, and return its peak memory in bytes."""
    source = folder / f"rows-{num_rows}"
    if not source.exists():
        write(source, num_rows)
    words = ("--input", source, "--out", folder / f"{engine}-{num_rows}", "--engine", engine)
    words += ("--against", folder / f"{source.name}-benchmark.jsonl")
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "jlrm.prepare", *words], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    seconds, of_processor = time.monotonic() - began, used.ru_utime + used.ru_stime
    print(
        f"{engine:6}{num_rows:>9} rows {seconds:7.0f} s, {of_processor:6.0f} of a processor, "
        f"{used.ru_maxrss / 1024:6.0f} MiB"
    )
    return used.ru_maxrss * 1024


def test_memory_of_the_local_engine_grows_by_keys_and_beam_makes_the_same_set(tmp_path):
    peaks = {}
    for num_rows in ROWS:
        peaks[num_rows] = prepared(tmp_path, num_rows, "local")
        if importlib.util.find_spec("apache_beam"):
            prepared(tmp_path, num_rows, "beam")
            whole, beamed = (contents(tmp_path / f"{e}-{num_rows}") for e in ("local", "beam"))
            assert whole == beamed
        statistics = json.loads((tmp_path / f"local-{num_rows}" / "statistics.json").read_text())
        assert statistics["rows_read"] == num_rows
        assert {"duplicate", "contaminated_exact", "no_label"} == statistics["dropped"].keys()
    fewest, most = min(ROWS), max(ROWS)
    assert peaks[most] - peaks[fewest] <= MOST_OF_A_ROW * (most - fewest)
