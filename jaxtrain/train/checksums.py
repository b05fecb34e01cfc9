"""Checksums of arrays, computed on their devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtrain.types import Array


def array_checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """A checksum of each array, which depends on its values, shape and dtype width, and not on its sharding.

    The change of a single element is always detected. Waits for the devices.
    """
    return {name: int(value) for name, value in jax.device_get(_on_devices(dict(arrays))).items()}


@jax.jit
def _on_devices(arrays: dict[str, Array]) -> dict[str, Array]:
    # A single program: many small ones, each with a collective, can block each other when a CPU runs out of threads.
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(x: Array) -> Array:
    """uint32 []: along one axis after another, the sum of hashes of value and index.

    Integer addition is associative, so the result does not depend on the sharding. The hash is a bijection of the
    value (lowbias32, https://nullprogram.com/blog/2018/07/31/), so the change of a single element is always detected.
    """
    bits = x.dtype.itemsize * 8
    words = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}")
    words = words.astype(jnp.uint32)
    while words.ndim:
        words += jax.lax.broadcasted_iota(jnp.uint32, words.shape, 0) * jnp.uint32(0x9E3779B9)
        words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
        words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
        words = jnp.sum(words ^ (words >> 16), axis=0, dtype=jnp.uint32)
    return words
