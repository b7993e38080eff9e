"""The sampler bound to a network: prompts in, token ids, log-probabilities and lengths out.

The two programs of a rollout are built here and nowhere else: `lay_out_program` turns weights into
those that decoding reads, `rollout_program` samples with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrm.data import batches
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime.mesh import Layout, compiler_options, global_array, host_array, replicate
from jlrm.sampling import sampler
from jlrm.sampling.decode import Prompts, decode_params
from jlrm.sampling.policy import Network
from jlrm.sampling.sampler import Rollout, SamplerSettings
from jlrm.sampling.stops import StopTables

# generate(weights laid out for decoding, prompts, the numbers that their random keys go by, step)
# begins on the devices and returns at once; `fetch` waits.
Generate = Callable[[Params, Sequence[Sequence[int]], np.ndarray, int], Rollout]


@functools.cache  # rollouts and held-out judgements of a run share one, compiled once
def lay_out_program(model: QwenConfig, decoding: Layout, weights: str = "full") -> Any:
    """Return the jitted program parameters -> weights laid out for decoding (sampling.weights)."""
    return jax.jit(partial(decode_params, model, decoding, weights=weights))


@functools.lru_cache(maxsize=8)  # so that what is compiled ahead is what runs
def rollout_program(network: Network, settings: SamplerSettings) -> Any:
    """Return the jitted sampler; `rollout_arguments` lists what it takes after the weights."""
    return jax.jit(
        partial(sampler.generate, network.model, network.decoding, settings),
        compiler_options=compiler_options(network.mesh, True) if network.model.exact else None,
    )


def rollout_arguments(
    network: Network, tables: StopTables, num_prompts: int, num_rollouts: int, width: int
) -> tuple[Prompts, Any, StopTables]:
    """Return what a rollout takes after its weights, as abstract arrays: prompts, keys, stops."""
    layout = network.decoding
    num_prompts += -num_prompts % layout.num_shards("P")

    def array(letters: str, *shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.activation(letters))

    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    whole = layout.replicated()
    return (
        Prompts(array("P T", num_prompts, width), array("P", num_prompts)),
        array("P R", num_prompts, num_rollouts, dtype=key),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tables),
    )


def make_generator(
    network: Network,
    settings: SamplerSettings,
    tables: StopTables,
    seed: int,
    num_rollouts: int,
    width: int,
) -> Generate:
    """Return the sampler of `num_rollouts` completions of each prompt.

    `width` is the fixed prompt width in tokens. Prompts are filled up to what the mesh divides.
    """
    layout = network.decoding
    stops = StopTables._make(global_array(array, layout.replicated()) for array in tables)
    program = rollout_program(network, settings)
    keys = jax.jit(
        partial(sampler.rollout_keys, seed, num_rollouts=num_rollouts),
        out_shardings=layout.activation("P R"),
    )

    def generate(
        weights: Params, prompts: Sequence[Sequence[int]], numbers: np.ndarray, step: int
    ) -> Rollout:
        filled = [*prompts, *[prompts[-1]] * (-len(prompts) % layout.num_shards("P"))]
        tokens, lengths = batches.pad(filled, width)
        drawn = program(
            weights,
            Prompts(
                global_array(tokens, layout.activation("P T")),
                global_array(lengths, layout.activation("P")),
            ),
            keys(np.int32(step), np.resize(numbers, len(filled)).astype(np.int32)),
            stops,
        )
        # Every host packs the batch it has a part of. Begun here: once something else has been
        # begun on the devices, this would wait for that.
        return replicate(layout, drawn)

    return generate


def fetch(result: Rollout, num_prompts: int) -> Rollout:
    """Return completions on the host, without filling, those of one prompt after another's."""
    host = jax.tree.map(lambda x: host_array(x)[:num_prompts], result)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), host)
