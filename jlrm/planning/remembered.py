"""What is known of programs that were compiled for plans: each is compiled once on a machine.

A program is known by its text before compiling and the names of its operations, by which loops are
counted, by the slice, by the versions of what compiles, and by the code that compiles, counts and
gives compiler options. What is kept is a small file of numbers in
`plans` of the cache (`JLRM_CACHE`). JAX's own cache can't serve: programs for devices that are not
here can't be read back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import pathlib
import re
from typing import Any

from jlrm.planning import counting, hlo
from jlrm.planning.counting import Counts, Program
from jlrm.runtime import mesh, storage
from jlrm.sampling import generate
from jlrm.training import programs
from jlrm.training.recipes import pair_programs

FLAGS = "XLA_FLAGS", "LIBTPU_INIT_ARGS"  # of the environment; the compiler reads them


def place(lowered: Any, *about: Any) -> pathlib.Path:
    """Return where a lowered program's numbers lie, or will; `about` is what else decides them."""
    digest = hashlib.sha256(lowered.as_text().encode())
    names = re.findall(r'loc\("(jit\([^"]*)"', lowered.as_text(debug_info=True))
    digest.update(repr(sorted(set(names))).encode())
    flags = [os.environ.get(name, "") for name in FLAGS]
    digest.update(repr((about, flags)).encode())
    for module in (counting, hlo, mesh, generate, programs, pair_programs):
        digest.update(inspect.getsource(module).encode())
    return storage.cache() / "plans" / f"{digest.hexdigest()}.json"


def recall(file: pathlib.Path) -> dict[str, Any] | None:
    """Return what was kept there; None: nothing, or nothing that can be read."""
    try:
        fields = json.loads(file.read_bytes())
        if fields["counts"] is not None:
            loops = [(turns, Counts(**one)) for turns, one in fields["counts"]["loops"]]
            fields["counts"] = Program(Counts(**fields["counts"]["total"]), loops)
        return fields
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(file: pathlib.Path, fields: dict[str, Any]) -> None:
    """Keep numbers, `counts` among them; where nothing can be written, nothing is kept."""
    counts: Program | None = fields["counts"]
    told = fields | {"counts": counts and dataclasses.asdict(counts)}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(file, json.dumps(told).encode())
