"""`KVCache`: keys and values of earlier tokens, always an explicit argument."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Integer

from jaxtrain.nn.config import LayerKind, ModelConfig
from jaxtrain.parallel.mesh import platform_of
from jaxtrain.types import Array

_ROW, _COLUMN, _HEAD, _WIDTH = range(4)  # the axes of keys and values as the layers compute them, [B, S, K, H]


class Order(NamedTuple):
    """The order of the axes [B, S, K, H] in a buffer. Rows always come first."""

    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]


ON_TPU = Order((_ROW, _COLUMN, _HEAD, _WIDTH), (_ROW, _COLUMN, _HEAD, _WIDTH))
"""The order that XLA:TPU decodes with: it copies a buffer in any other order into this one and back at every call."""

OFF_TPU = Order((_ROW, _HEAD, _WIDTH, _COLUMN), (_ROW, _HEAD, _COLUMN, _WIDTH))
"""Both products of a decode step are batched products of the buffers as stored. With keys [B, K, S, H] XLA:CPU
transposes all of them at every step, which takes longer than the product."""


def order_on(mesh: Mesh | None) -> Order:
    """The order for the platform of `mesh`."""
    return ON_TPU if platform_of(mesh) == "tpu" else OFF_TPU


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("order",))
@dataclass(frozen=True)
class LayerCache:
    """A ring buffer: position p is stored in column p mod S (in column p, if S is at least the length of the row)."""

    # Arrays [B, S, K, H], axes permuted by `order`; or other leaves, such as shardings, in trees of this structure.
    k: Any
    v: Any
    order: Order

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], order: Order) -> LayerCache:
        """Keys and values as a layer computes them."""
        return cls(k.transpose(order.k), v.transpose(order.v), order)

    @property
    def columns(self) -> int:
        return self.v.shape[self.order.v.index(_COLUMN)]

    def all(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values with the axes that layers compute with."""
        return self.k.transpose(np.argsort(self.order.k)), self.v.transpose(np.argsort(self.order.v))

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"],
        length: Integer[Array, " B"],
    ) -> LayerCache:
        """The cache with `k` and `v` at `positions`, in rows that hold `length` tokens afterwards.

        Padding (segment 0) is not written, and neither are tokens that a ring of this size has already overwritten.
        """
        size = self.columns
        kept = (segment_ids != 0) & (positions >= length[:, None] - size)
        columns = jnp.where(kept, positions % size, size)  # out of range: not written
        rows = jnp.arange(k.shape[0])[:, None]

        def put(buffer: Array, order: tuple[int, ...], new: Array) -> Array:
            # Heads come before width in both orders, so the new values need no transpose.
            index = tuple({_ROW: rows, _COLUMN: columns}.get(axis, slice(None)) for axis in order)
            return jnp.asarray(buffer).at[index].set(new, mode="drop")

        return LayerCache(put(self.k, self.order.k, k), put(self.v, self.order.v, v), self.order)

    def take(self, columns: Integer[Array, " s"]) -> LayerCache:
        """The columns with these indices, in this order."""
        k, v = (
            jnp.take(each, columns, order.index(_COLUMN))
            for each, order in zip((self.k, self.v), self.order, strict=True)
        )
        return LayerCache(k, v, self.order)

    def resized(self, rows: int, columns: int) -> LayerCache:
        """The cache with this many rows and columns: cut off, or padded with zeros."""

        def resize(buffer: Array, order: tuple[int, ...]) -> Array:
            shape = list(buffer.shape)
            shape[0], shape[order.index(_COLUMN)] = rows, columns
            pad = [(0, max(new - old, 0)) for new, old in zip(shape, buffer.shape, strict=True)]
            return jnp.pad(buffer, pad)[tuple(slice(size) for size in shape)]

        return LayerCache(resize(self.k, self.order.k), resize(self.v, self.order.v), self.order)

    def positions(self, length: Integer[Array, " B"]) -> Integer[Array, "B S"]:
        """The position that each column holds in rows of `length` tokens; negative for an empty column."""
        last = length[:, None] - 1
        size = self.columns
        return last - (last - jnp.arange(size)) % size


class KVCache(NamedTuple):
    """One buffer per layer: an unrolled decode step updates each in place; it would copy a stacked buffer entirely."""

    layers: tuple[LayerCache, ...]
    length: Array  # [B] int32, tokens in each row


def columns_of(kind: LayerKind, length: int) -> int:
    """Columns that a layer's buffer needs for rows of up to `length` tokens: at most its window."""
    return length if kind.window is None else min(length, kind.window)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jnp.dtype, order: Order) -> KVCache:
    """A cache for `rows` sequences of up to `length` tokens."""
    layers = []
    for kind in config.pattern:
        zeros = jnp.zeros((rows, columns_of(kind, length), config.num_kv_heads, config.head_dim), dtype)
        layers.append(LayerCache.of(zeros, zeros, order))
    return KVCache(tuple(layers), jnp.zeros(rows, jnp.int32))


def cache_spec(order: Order, rows: str | tuple[str, ...], heads: str | None) -> LayerCache:
    """The sharding of a layer's buffers: a `LayerCache` with a `PartitionSpec` in the place of each."""
    named = {_ROW: rows, _HEAD: heads}
    k, v = (PartitionSpec(*(named.get(axis) for axis in each)) for each in order)
    return LayerCache(k, v, order)
