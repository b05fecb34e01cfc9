"""The short causal convolution before a recurrent layer, over packed rows: of each channel, over a few tokens."""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtrain.types import Array


def short_convolution(
    x: Float[Array, "B T N H"],
    kernel: Float[Array, "N H W"],
    starts: Bool[Array, "B T"],
    tail: Float[Array, "B W1 N H"],
) -> Float[Array, "B T N H"]:
    """`y[t] = sum over w of kernel[w] x[t - (W - 1) + w]`, over the tokens of t's document, summed and in float32.

    `starts`: the first tokens of documents. `tail`: the W - 1 tokens before the first one, zeros where there are none.
    """
    width, length = kernel.shape[-1], x.shape[1]
    joined = jnp.concatenate([tail.astype(x.dtype), x], 1).astype(jnp.float32)
    documents = _documents(starts, width - 1)
    total = jnp.zeros(x.shape, jnp.float32)
    for place in range(width):
        window = slice(place, place + length)
        same = documents[:, window] == documents[:, width - 1 :]
        total += jnp.where(same[..., None, None], joined[:, window], 0) * kernel[..., place].astype(jnp.float32)
    return total


def next_tail(
    x: Float[Array, "B T N H"],
    starts: Bool[Array, "B T"],
    count: Integer[Array, " B"],
    tail: Float[Array, "B W1 N H"],
) -> Float[Array, "B W1 N H"]:
    """The tail after the first `count` tokens of each row: zeros before the start of the last document."""
    size = tail.shape[1]
    joined = jnp.concatenate([tail, x.astype(tail.dtype)], 1)
    places = count[:, None] + jnp.arange(size)
    documents = jnp.take_along_axis(_documents(starts, size), places, 1)
    kept = documents == documents[:, -1:]
    return jnp.where(kept[..., None, None], jnp.take_along_axis(joined, places[..., None, None], 1), 0)


def _documents(starts: Array, before: int) -> Array:
    """The number of the document of each token, of which `before` are of the document before the first one."""
    return jnp.pad(jnp.cumsum(starts, 1), ((0, 0), (before, 0)))
