"""Updates of parameters in less than float32, which are rounded to the nearest value or stochastically."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxtrain.optim import StochasticallyRounded
from jaxtrain.types import Array, Mean, Metric, Params

_STREAM = 1 << 30  # of the random bits, beside those of dropout, which are numbered by microbatches


def apply_updates(
    tx: optax.GradientTransformation, params: Any, updates: Any, ok: Array, key: Array
) -> tuple[Any, Mapping[str, Metric]]:
    """The parameters after the updates of `tx`, and the metric `updates_lost_to_rounding` if any may be lost.

    Args:
        ok: [] bool, whether the step counts.
        key: Of the step.
    """
    if not isinstance(tx, StochasticallyRounded):
        return optax.apply_updates(params, updates), _lost_to_rounding(params, updates, ok)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, _STREAM), len(leaves))
    new = [
        round_stochastically(leaf.astype(jnp.float32) + update, each)
        if leaf.dtype == jnp.bfloat16
        else optax.apply_updates(leaf, update)
        for leaf, update, each in zip(leaves, jax.tree.leaves(updates), keys, strict=True)
    ]
    return jax.tree.unflatten(structure, new), {}


def round_stochastically(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """Float32 to one of the two neighbours in bfloat16, by chance, so that the expected value is `x`.

    Random bits are added to those that bfloat16 lacks: "Deep Learning with Limited Numerical Precision", Gupta et al.
    2015 (arXiv:1502.02551).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _lost_to_rounding(params: Params, updates: Any, ok: Array) -> dict[str, Metric]:
    """The share of updates of parameters below float32 that round to no change; empty without such parameters."""
    lost, nonzero = jnp.zeros(()), jnp.zeros(())
    narrow = False
    for leaf, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        if leaf.dtype.itemsize >= 4:
            continue
        narrow, precision = True, jnp.finfo(leaf.dtype)
        before, update = leaf.astype(jnp.float32), update.astype(jnp.float32)
        # Explicit, because XLA may omit a rounding to bfloat16 whose result is only compared.
        after = jax.lax.reduce_precision(before + update, precision.nexp, precision.nmant)
        lost += _count(ok & (update != 0) & (after == before))
        nonzero += _count(ok & (update != 0))
    return {"updates_lost_to_rounding": Mean(lost, nonzero)} if narrow else {}


def _count(mask: Array) -> Array:
    """float32 []: from means over axes, since a float32 sum of ones stops at 2**24 and an int32 sum overflows."""
    return mask.astype(jnp.float32).mean(-1).mean() * mask.size
