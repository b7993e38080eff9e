"""What of a layer the backward pass computes again, by `model.remat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# Names of what may be kept, given where it is computed (`checkpoint_name`).
QKV = "qkv"  # what enters attention (qwen.py)
EXPERTS = "experts"  # products of experts, which are kernels (experts.py)
ATTENDED = "attended"  # its output, and the logarithms of its sums (attention.py, splash.py)

_policies = jax.checkpoint_policies
POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(ATTENDED, EXPERTS),
    ),
    "attention": _policies.save_only_these_names(QKV, ATTENDED),
    "full": None,
}


def rematerialised(policy: str, layer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer whose backward pass recomputes nothing ("none"), all but matrix products and
    attention ("dots"), all but attention and what enters it ("attention"), or everything ("full").

    cuDNN's attention runs again under all but "none": its kernel's results have no name.
    """
    if policy == "none":
        return layer
    # prevent_cse guards against XLA merging the recomputation away; inside a scan it can't.
    return jax.checkpoint(layer, policy=POLICIES[policy], prevent_cse=False)
