"""What one saved step holds, read and checked: parameters, single tensors.

What is read is compared with the digests of what was saved (digests.py), and its files with their
checksums (file_list.py). `Damaged` says what is wrong; whoever knows the step names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from jlrm.config import UsageError
from jlrm.weights import digests, file_list, steps
from jlrm.weights.steps import read_digests


class Damaged(UsageError):
    """What a step holds is not what was saved; the message is a part of a sentence."""


def restore_params(step_dir: epath.Path, params: Any) -> Any:
    """Restore the parameters alone onto the shardings of the given `ShapeDtypeStruct`s.

    Raises:
      UsageError: they are not what was saved; some are NaN or infinite.
    """
    check_files(step_dir)
    wanted, handler = read_digests(step_dir), ocp.PyTreeCheckpointHandler()
    with _naming(step_dir), ocp.Checkpointer(handler) as checkpointer:
        with reading("params"):
            args = restore_args(params)
            restored = checkpointer.restore(steps.absolute(step_dir) / "params", args=args)
        broken = compare("params", restored, wanted)
    if broken:
        names = [name.removeprefix(digests.PARAMS) for name in broken]
        raise UsageError(
            f"{step_dir} holds NaN or infinite numbers in {some(names)}: its training had "
            "diverged. Take weights from an earlier step, as RUN@STEP."
        )
    return restored


def check_files(step_dir: epath.Path) -> None:
    """Compare the files that hold a step's parameters with their checksums; reads all of them.

    Raises:
      UsageError: one has changed.
    """
    with _naming(step_dir):
        if reason := file_list.changed(step_dir, "params"):
            raise Damaged(reason)


def read_tensor(
    step_dir: epath.Path,
    path: str,
    index: tuple[int, ...] = (),
    wanted: dict[str, Any] | None = None,
) -> np.ndarray:
    """Read one array (`a.b.c`), or a part of a stacked one, without touching a device.

    Args:
      index: layer, or layer and expert; empty: all.
      wanted: what `read_digests` returns.

    Raises:
      UsageError: it can't be read, or is not what was saved.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": _store(step_dir / "params"),
            "path": f"{path}/",
        },
        # Without a cache limit of its own every read opens afresh and keeps nothing.
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }
    name = digests.PARAMS + path
    with _naming(step_dir):
        with reading("params"):
            stored = tensorstore.open(spec).result()
            array = np.asarray(stored[index].read().result())
        if wanted and not digests.is_stored(array, index, wanted["params"].get(name, {})):
            raise Damaged(f"its item 'params' is not what was saved, in {name}")
    return array


def compare(item: str, value: Any, wanted: dict[str, Any]) -> list[str]:
    """Compare one restored item with its digests; return the names of what is not finite.

    Raises:
      Damaged: it is not what was saved.
    """
    if not wanted:
        return digests.look({item: value})[1]
    if item not in wanted:
        raise Damaged(f"its digests do not name the item '{item}'")
    wrong, broken = digests.changed({item: value}, wanted[item])
    if wrong:
        raise Damaged(f"its item '{item}' is not what was saved, in {some(wrong)}")
    return broken


def some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"


@contextlib.contextmanager
def reading(item: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a reader raise into `Damaged`."""
    try:
        yield
    except (Damaged, jax.errors.JaxRuntimeError):  # the latter: no memory
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise Damaged(f"its item '{item}' can't be read ({reason})") from None


def restore_args(abstract: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=args)


@contextlib.contextmanager
def _naming(step_dir: epath.Path) -> Iterator[None]:
    """Say which step is damaged, and what to do."""
    try:
        yield
    except Damaged as error:
        raise UsageError(
            f"{step_dir} is damaged: {error}. Bring its files back, or name another step as "
            "RUN@STEP."
        ) from None


def _store(path: epath.Path) -> Any:
    """Return a directory as tensorstore names it. In a url, # and % would not be of the name."""
    absolute = str(steps.absolute(path))
    return f"{absolute}/" if "://" in absolute else {"driver": "file", "path": f"{absolute}/"}
