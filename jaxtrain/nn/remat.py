"""What the forward pass of a layer saves for the backward pass, by the names of activations.

Modules name their activations with `jax.ad_checkpoint.checkpoint_name`, outside of products and kernels with their own
derivatives, into which a policy of `jax.checkpoint` does not see. The policy decides by these names alone.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.ops.blockwise import RESIDUALS

QKV = "qkv"
ATTENTION_OUT = "attention_out"
GATE = "gate"
UP = "up"
DOWN = "down"

DENSE_ONLY = (GATE, UP, DOWN)
"""Activations of `GatedMLP`, which a mixture of experts does not have."""

KEEP, RECOMPUTE, OFFLOAD = "keep", "recompute", "offload"

Remat = str | tuple[tuple[str, str], ...]
"""A preset, or (activation, KEEP | RECOMPUTE | OFFLOAD) pairs; an activation without a pair is recomputed."""

PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    # The output of the attention is as large as the input of the layer, which is always kept, and its kernel is the
    # only part of a layer whose cost grows with the square of the length.
    "full": ((RESIDUALS, KEEP),),
    "dots": tuple((name, KEEP) for name in (QKV, RESIDUALS, ATTENTION_OUT, *DENSE_ONLY)),
}


def remat_policy(remat: Remat) -> Callable[..., Any]:
    """The policy of `jax.checkpoint` for one layer. `remat` is not "none", which saves everything without a policy."""
    places = dict(PRESETS[remat] if isinstance(remat, str) else remat)
    kept, offloaded = ([name for name, place in places.items() if place == each] for each in (KEEP, OFFLOAD))
    if not offloaded:
        return jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )
