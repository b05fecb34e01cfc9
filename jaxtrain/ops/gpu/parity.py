"""Whether cuDNN's attention equals XLA's on the GPU of this process, before a run uses it."""

import logging
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs, blockwise_attention
from jaxtrain.ops.gpu.cudnn import packed_attention

log = logging.getLogger(__name__)

# Relative to the largest value. bfloat16 rounds by 0.004, and the kernels round the probabilities as well.
_TOLERANCE = 0.03

# The segments of the rows that are compared: none is as long as a block of a kernel, and the last row has no padding.
_ROWS = ((130, 60, 1, 40), (200, 56), (256,))
_LENGTH = 256


class HeadShapes(NamedTuple):
    """The attention of a layer."""

    heads: int
    kv_heads: int
    width: int
    window: int | None
    softcap: float | None
    sinks: bool
    dtype: Any


@cache
def agrees_with_xla(shapes: HeadShapes) -> bool:
    """Whether outputs and gradients of cuDNN's attention are those of XLA's on this process's first device.

    It takes some seconds. Otherwise a warning gives the reason.
    """
    if shapes.softcap is not None:
        log.warning("cuDNN attention has no softcap: attention runs in XLA, which is several times slower")
        return False
    try:
        found, expected = _all_gradients(shapes, fused=True), _all_gradients(shapes, fused=False)
    except Exception as error:
        log.warning("cuDNN attention failed (%s): attention runs in XLA, which is several times slower", error)
        return False
    for name in expected:
        one, other = np.asarray(found[name], np.float32), np.asarray(expected[name], np.float32)
        departure = np.abs(one - other).max() / np.abs(other).max()
        if not departure <= _TOLERANCE:
            log.warning(
                "cuDNN attention departs from XLA's (%s by %.3g of its maximum, %s): attention runs in XLA, which is "
                "several times slower",
                *(name, departure, shapes),
            )
            return False
    log.info("cuDNN attention equals XLA's on this GPU: it is used")
    return True


def _all_gradients(shapes: HeadShapes, fused: bool) -> dict[str, jax.Array]:
    """The output and the gradients of the inputs, by name."""
    options = AttentionOptions(shapes.width**-0.5, shapes.window)
    ids = np.zeros((len(_ROWS), _LENGTH), np.int32)
    for row, lengths in enumerate(_ROWS):
        ids[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    keys = jax.random.split(jax.random.key(0), 5)
    heads = (shapes.heads, shapes.kv_heads, shapes.kv_heads, shapes.heads)
    q, k, v, g = (
        jax.random.normal(key, (*ids.shape, count, shapes.width), shapes.dtype)
        for key, count in zip(keys[:4], heads, strict=True)
    )
    # The output of padding is not defined: it has no cotangent, and is not compared.
    real = jnp.asarray(ids > 0)[..., None, None]

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        if fused:
            out = packed_attention(q, k, v, jnp.asarray(ids), sinks, options, limit=8)
        else:
            tokens = MaskInputs(jnp.broadcast_to(jnp.arange(_LENGTH), ids.shape), jnp.asarray(ids))
            out = blockwise_attention(q, k, v, sinks, tokens, options)
        return jnp.where(real, out, 0)

    sinks = jax.random.normal(keys[4], (shapes.heads,)) if shapes.sinks else None

    def run(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> dict[str, jax.Array]:
        out, back = jax.vjp(attention, q, k, v, sinks)
        gradients = dict(zip(("d q", "d k", "d v", "d sinks"), back(g), strict=True))
        return {"output": out, **{name: each for name, each in gradients.items() if each is not None}}

    return jax.jit(run)(q, k, v, sinks)
