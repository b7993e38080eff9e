"""What programs of a run are called with at most, as abstract arrays, and how they are compiled.

A plan compiles them so, and a run may before its first step. Nothing here knows what a stage does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jlrm.model import lora, qwen
from jlrm.model.qwen import Params
from jlrm.runtime.mesh import Layout
from jlrm.sampling.policy import Network
from jlrm.training import packing, update
from jlrm.training.packing import Group, Rows
from jlrm.training.update import TrainState


class Call(NamedTuple):
    """A program of a run, and what it is called with at most, as abstract arrays."""

    program: Any
    arguments: tuple[Any, ...]
    weights: str = ""  # the program whose result comes before the arguments
    longest: LongestRows | None = None  # what the arguments hold of packed rows


class LongestRows(NamedTuple):
    """The rows of the longest batch, as abstract arrays, and how often their loops run."""

    rows: Rows
    num_passes: int
    num_targets: int  # of the fullest row
    shapes: list[tuple[int, int]]  # every (A, T) that a batch may have


def compilations(calls: Mapping[str, Call]) -> dict[str, Callable[[], Any]]:
    """Return what compiles each program for each shape that it may be called with, by name.

    JAX keeps it for calls with arrays. `lay_out` is compiled here: it decides how weights lie.
    """
    tasks, laid_out = {}, {}
    for name, call in calls.items():
        if name.startswith("init"):  # runs before any step
            continue
        if call.weights:
            tasks[name] = partial(
                _compiled, call.program, (laid_out[call.weights], *call.arguments)
            )
        elif name.startswith("lay_out"):
            shardings = _compiled(call.program, call.arguments).output_shardings
            laid_out[name] = laid_out_weights(call, shardings)
        elif call.longest is None:
            tasks[name] = partial(_compiled, call.program, call.arguments)
        else:
            for shape in call.longest.shapes:
                shaped = packing.in_shape(call.arguments, *shape)
                tasks[f"{name} {shape}"] = partial(_compiled, call.program, shaped)
    return tasks


def laid_out_weights(call: Call, shardings: Any) -> Any:
    """Return what a call of `lay_out` makes, as abstract arrays; `shardings` is its compiler's."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(call.program, *call.arguments),
        shardings,
    )


def _compiled(program: Any, arguments: tuple[Any, ...]) -> Any:
    return program.lower(*arguments).compile()


def longest_rows(layout: Layout, sizes: Sequence[int], groups: Sequence[Group]) -> LongestRows:
    """Return the rows of these groups in the longest of the row lengths."""
    num_rows = layout.mesh.size
    longest = packing.pack(groups, sizes[-1:], num_rows)

    def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=packing.spread(layout, x.ndim))

    rows = jax.tree.map(abstract, longest.rows)
    num_completions = sum(len(group.completions) for group in groups)
    shapes = packing.shapes(sizes, num_completions, num_rows)
    num_passes, num_targets = int(longest.rows.num_passes), int(np.max(longest.rows.count))
    return LongestRows(rows, num_passes, num_targets, shapes)


def abstract_reference(network: Network, state: TrainState) -> Params:
    """Return the reference: what `freeze` makes of what is trained, and all that is frozen."""
    frozen = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        jax.eval_shape(partial(qwen.to_compute_dtype, network.model), state.params),
        state.params,
    )
    return lora.join(state.base, frozen)


def init_optimizer(
    network: Network, optimizer: optax.GradientTransformation, state: TrainState
) -> Call:
    """Return the program of a stage's start that makes the optimiser's state."""
    program = update.init_optimizer_program(network.model, network.training, optimizer)
    return Call(program, (state.params,))


def like(leaf: Any, dtype: Any) -> Any:
    """Return an abstract array of the same shape that lies the same way."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
