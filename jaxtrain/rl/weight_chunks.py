"""Weights on their way to another process: in chunks of a bounded size, so that no host holds a whole model."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.nn.model import Model
from jaxtrain.parallel.sharding import replicated
from jaxtrain.rl.sync import merge
from jaxtrain.sample.capacity import serving_shardings
from jaxtrain.types import Array, Params

CHUNK_BYTES = 1 << 28


class Piece(NamedTuple):
    """A block of a parameter."""

    leaf: int  # the parameter's number among the leaves of the tree
    start: tuple[int, ...]  # of the block
    # Those in bfloat16 are viewed as uint16: Ray's shared memory supports only numpy's own dtypes; others would be
    # pickled, and copied by every reader.
    values: np.ndarray


class ChunkedWeights(NamedTuple):
    """The parameters of a model without adapters, matrices in its compute dtype."""

    layout: Params  # of jax.ShapeDtypeStruct
    chunks: Iterable[Any]  # lists of `Piece`, or Ray's references to such

    @property
    def bytes(self) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layout))


def chunk_weights(trainer: Model, params: Params, limit: int = CHUNK_BYTES) -> ChunkedWeights:
    """`params` of the model `trainer`, merged and cast, in chunks of at most `limit` bytes.

    Each chunk is copied to the host when it is asked for, and is the only one there if its reader keeps no earlier one.
    Several processes that hold shards iterate over the chunks together, and each gets all.
    """
    merged = merge(trainer, params)
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), merged)
    return ChunkedWeights(layout, _chunks(jax.tree.leaves(merged), limit))


def place_chunks(model: Model, weights: ChunkedWeights) -> Params:
    """The weights on the devices of `model`, sharded as its engine has them.

    A chunk is asked for when those before it are on the devices, and no longer referred to.
    """
    layout, structure = jax.tree.flatten(weights.layout)
    shardings: Sequence[NamedSharding | None] = [None] * len(layout)
    if model.run.mesh is not None:
        shardings = jax.tree.leaves(serving_shardings(model))
    placed: dict[int, jax.Array] = {}

    def place(chunk: list[Piece]) -> None:
        for number, start, values in chunk:
            leaf, sharding = layout[number], shardings[number]
            values = values.view(ml_dtypes.bfloat16) if leaf.dtype == jnp.bfloat16 else values
            block = jax.device_put(values, _of_block(sharding, values.shape, leaf.shape))
            if number not in placed:
                placed[number] = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
            # Also of a whole parameter, which would else, on the CPU, be the chunk itself.
            placed[number] = _put_block(placed[number], block, start, sharding)
        jax.block_until_ready([placed[piece.leaf] for piece in chunk])

    for _ in map(place, weights.chunks):  # unlike the variable of a loop, `map` keeps no chunk while it waits for one
        pass
    return jax.tree.unflatten(structure, [placed[number] for number in range(len(layout))])


def _chunks(leaves: Sequence[jax.Array], limit: int) -> Iterator[list[Piece]]:
    chunk, size = [], 0
    for number, leaf in enumerate(leaves):
        shape = _block_shape(leaf.shape, limit // leaf.dtype.itemsize)
        size_of_block = math.prod(shape) * leaf.dtype.itemsize
        for start in _starts(leaf.shape, shape):
            if chunk and size + size_of_block > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(Piece(number, start, _on_host(leaf, start, shape)))
            size += size_of_block
    if chunk:
        yield chunk


def _block_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """The largest blocks of an array that have at most `limit` elements and are contiguous."""
    sizes: list[int] = []
    for size in reversed(shape):
        sizes.append(max(min(size, limit), 1))
        limit //= sizes[-1]
    return tuple(reversed(sizes))


def _starts(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Where the blocks of an array begin. They are of one size, so that one program copies all: the last may overlap
    with the one before."""
    axes = zip(shape, block, strict=True)
    return itertools.product(*([min(at, size - part) for at in range(0, size, part)] for size, part in axes))


def _on_host(leaf: jax.Array, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    # Of a copy on the device, also of a whole parameter: a jax.Array keeps what it was converted to.
    if leaf.is_fully_addressable:
        values = np.asarray(_block(leaf, start, shape, None))
    else:
        assert isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, Mesh)
        values = np.asarray(_block(leaf, start, shape, replicated(leaf.sharding.mesh)).addressable_data(0))
    return values.view(np.uint16) if values.dtype == jnp.bfloat16 else values


@partial(jax.jit, static_argnums=(2, 3))
def _block(leaf: Array, start: tuple[Array, ...], shape: tuple[int, ...], sharding: NamedSharding | None) -> Array:
    block = jax.lax.dynamic_slice(leaf, start, shape)
    return block if sharding is None else jax.lax.with_sharding_constraint(block, sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_block(leaf: Array, block: Array, start: tuple[Array, ...], sharding: NamedSharding | None) -> Array:
    leaf = jax.lax.dynamic_update_slice(leaf, block, start)
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def _of_block(sharding: NamedSharding | None, block: Sequence[int], shape: Sequence[int]) -> NamedSharding | None:
    """The sharding of a block of an array: that of the array, over the axes that the block has whole."""
    if sharding is None:
        return None
    axes = zip(sharding.spec, block, shape, strict=False)  # a spec may leave out the last axes
    spec = [names if part == size else None for names, part, size in axes]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
