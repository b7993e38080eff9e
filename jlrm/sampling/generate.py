"""A sampler bound to a model: prompts in, token ids, log-probabilities and lengths out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jlrm.data import batches
from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime.mesh import Layout, global_array, host_array, replicate
from jlrm.sampling import sampler
from jlrm.sampling.decode import Prompts
from jlrm.sampling.sampler import Rollout, SamplerSettings
from jlrm.sampling.stops import StopTables

# generate(weights from `lay_out`, prompts, their numbers in the data, step) begins on the devices
# and returns at once; `fetch` waits.
Generate = Callable[[Params, Sequence[Sequence[int]], np.ndarray, int], Rollout]


def make_generator(
    model: QwenConfig,
    layout: Layout,
    settings: SamplerSettings,
    tables: StopTables,
    seed: int,
    num_rollouts: int,
    width: int,
) -> Generate:
    """Return the sampler of `num_rollouts` completions of each prompt.

    `width` is the fixed prompt width in tokens. Prompts are filled up to what the mesh divides.
    """
    stops = StopTables._make(global_array(array, layout.replicated()) for array in tables)
    program = jax.jit(partial(sampler.generate, model, layout, settings))
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
