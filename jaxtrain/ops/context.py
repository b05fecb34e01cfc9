"""Attention over rows whose tokens are sharded over the mesh axis `CONTEXT`: context parallelism.

Every device gathers the keys and values of its rows, which are small with grouped queries, and computes the outputs of
its own queries. Under a causal mask the queries at the end of a row attend to more keys than those at its beginning. A
kernel that skips masked keys therefore computes, on device i of c, the blocks i and 2c - 1 - i of the 2c blocks of a
row, which have as many keys together as those of any other device: the queries are exchanged before it, and its outputs
after it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer

from jaxtrain.parallel.sharding import CONTEXT, ROWS
from jaxtrain.types import Array


class PartKernel(NamedTuple):
    """Computes the outputs of some queries of rows over all of their keys, on one device."""

    # (inputs, q [B, T/c, N, H], segment ids of the queries [B, T/c], k and v [B, T, K, H], segment ids of the keys
    # [B, T], sinks [N] or None) -> [B, T/c, N, H]
    compute: Callable[[Any, Array, Array, Array, Array, Array, Array | None], Array]
    order: np.ndarray | None = None  # of the queries of all devices together: `query_order`; None: that of the row
    inputs: Any = None  # arrays
    specs: Any = None  # their sharding


def attend_in_parts(
    kernel: PartKernel,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Integer[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    *,
    mesh: Mesh,
) -> Float[Array, "B T N H"]:
    """Attention within packed rows whose tokens are sharded over `CONTEXT`; see `attend`."""
    order = kernel.order

    def part(inputs: Any, q: Array, ids: Array, k: Array, v: Array, all_ids: Array, sinks: Array | None) -> Array:
        k, v = (lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
        if order is None:
            return kernel.compute(inputs, q, ids, k, v, all_ids, sinks)
        return _exchanged_back(kernel.compute(inputs, _exchanged(q), ids, k, v, all_ids, sinks))

    heads = P(ROWS, CONTEXT, "tensor")
    ids = segment_ids if order is None else segment_ids[:, order]
    of_sinks = None if sinks is None else P("tensor")
    in_specs = (kernel.specs, heads, P(ROWS, CONTEXT), heads, heads, P(ROWS), of_sinks)
    shards = jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=False)
    return shards(kernel.inputs, q, ids, k, v, segment_ids, sinks)


def query_order(length: int, devices: int) -> np.ndarray:
    """The tokens of a row [length] in the order in which the devices compute their queries, two blocks each."""
    blocks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([blocks[block] for device in range(devices) for block in _blocks(device, devices)])


def _blocks(device: int, devices: int) -> tuple[int, int]:
    """The two blocks that a device computes, the one of an even number first."""
    first, last = device, 2 * devices - 1 - device
    return (first, last) if first % 2 == 0 else (last, first)


def _exchanged(x: Array) -> Array:
    """The first and the second half of every device's part, at the devices that compute these blocks.

    The halves of all parts are the blocks of a row in order, so that first halves are the blocks of even numbers, of
    which every device computes one, and second halves those of odd numbers.
    """
    return _permuted(x, lambda source, target: (source, target))


def _exchanged_back(x: Array) -> Array:
    return _permuted(x, lambda source, target: (target, source))


def _permuted(x: Array, pair: Callable[[int, int], tuple[int, int]]) -> Array:
    devices = lax.axis_size(CONTEXT)
    halves = []
    for parity, half in enumerate(jnp.split(x, 2, 1)):
        pairs = [pair(_blocks(device, devices)[parity] // 2, device) for device in range(devices)]
        halves.append(lax.ppermute(half, CONTEXT, pairs))
    return jnp.concatenate(halves, 1)
