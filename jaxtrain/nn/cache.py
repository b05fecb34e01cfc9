"""`KVCache`: keys and values of tokens seen before, always an explicit argument."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.nn.config import LayerKind, ModelConfig
from jaxtrain.parallel.mesh import platform_of
from jaxtrain.types import Array

_ROW, _COLUMN, _HEAD, _WIDTH = range(4)  # the axes of keys and values as the layers compute them, [B, S, K, H]


class Order(NamedTuple):
    """In which order a buffer has the axes [B, S, K, H]. Rows always come first."""

    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]


ON_TPU = Order((_ROW, _COLUMN, _HEAD, _WIDTH), (_ROW, _COLUMN, _HEAD, _WIDTH))
"""What XLA:TPU decodes with: a buffer in any other order is copied into this one, and back, by every device call."""

ELSEWHERE = Order((_ROW, _HEAD, _WIDTH, _COLUMN), (_ROW, _HEAD, _COLUMN, _WIDTH))
"""Both products of a decode step as batched ones of buffers as they lie: with keys [B, K, S, H] XLA:CPU transposes all
of them at every step, which takes longer than the product."""


def order_on(mesh: Mesh | None) -> Order:
    return ON_TPU if platform_of(mesh) == "tpu" else ELSEWHERE


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("order",))
@dataclass(frozen=True)
class LayerCache:
    """A ring: position p lies in column p mod S. Where S reaches beyond the row, that is column p."""

    k: Array  # [B, S, K, H] in the order's order
    v: Array
    order: Order

    @classmethod
    def of(cls, k: Array, v: Array, order: Order) -> LayerCache:
        """Keys and values [B, S, K, H] as they come out of a layer."""
        return cls(k.transpose(order.k), v.transpose(order.v), order)

    @property
    def columns(self) -> int:
        return self.v.shape[self.order.v.index(_COLUMN)]

    def all(self) -> tuple[Array, Array]:
        """Keys and values [B, S, K, H]."""
        # The rank of each axis in the order is where the order has it.
        return self.k.transpose(np.argsort(self.order.k)), self.v.transpose(np.argsort(self.order.v))

    def write(self, k: Array, v: Array, positions: Array, segment_ids: Array, length: Array) -> LayerCache:
        """Put k, v [B, T, K, H] at `positions` [B, T]; not padding (segment 0), nor what a ring of rows that are
        then `length` [B] long has no place for."""
        size = self.columns
        kept = (segment_ids != 0) & (positions >= length[:, None] - size)
        columns = jnp.where(kept, positions % size, size)  # a column beyond the last is dropped
        rows = jnp.arange(k.shape[0])[:, None]

        def put(buffer: Array, order: tuple[int, ...], new: Array) -> Array:
            # Heads before width in both orders, so that what is put needs no transposing.
            where = tuple({_ROW: rows, _COLUMN: columns}.get(axis, slice(None)) for axis in order)
            return buffer.at[where].set(new, mode="drop")

        return LayerCache(put(self.k, self.order.k, k), put(self.v, self.order.v, v), self.order)

    def take(self, columns: Array) -> LayerCache:
        """Only `columns` [s], in this order."""
        k, v = (
            jnp.take(each, columns, order.index(_COLUMN))
            for each, order in zip((self.k, self.v), self.order, strict=True)
        )
        return LayerCache(k, v, self.order)

    def resized(self, rows: int, columns: int) -> LayerCache:
        """With so many rows and columns; those beyond are cut or zero."""

        def resize(buffer: Array, order: tuple[int, ...]) -> Array:
            shape = list(buffer.shape)
            shape[0], shape[order.index(_COLUMN)] = rows, columns
            pad = [(0, max(new - old, 0)) for new, old in zip(shape, buffer.shape, strict=True)]
            return jnp.pad(buffer, pad)[tuple(slice(size) for size in shape)]

        return LayerCache(resize(self.k, self.order.k), resize(self.v, self.order.v), self.order)

    def positions(self, length: Array) -> Array:
        """The position that each column holds [B, S] in rows of `length` [B] tokens; negative: none."""
        last = length[:, None] - 1
        size = self.columns
        return last - (last - jnp.arange(size)) % size


class KVCache(NamedTuple):
    """One buffer per layer: an unrolled decode updates each in place, where a stacked one would be copied whole."""

    layers: tuple[LayerCache, ...]
    length: Array  # [B] int32, tokens that each row holds


def columns_of(kind: LayerKind, length: int) -> int:
    """Columns that a layer's buffer needs for rows of up to `length` tokens: no more than its window."""
    return length if kind.window is None else min(length, kind.window)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jnp.dtype, order: Order) -> KVCache:
    """A cache for `rows` sequences of up to `length` tokens."""
    layers = []
    for kind in config.pattern:
        zeros = jnp.zeros((rows, columns_of(kind, length), config.num_kv_heads, config.head_dim), dtype)
        layers.append(LayerCache.of(zeros, zeros, order))
    return KVCache(tuple(layers), jnp.zeros(rows, jnp.int32))


def cache_spec(order: Order, rows: str | tuple[str, ...], heads: str | None) -> LayerCache:
    """How a layer's buffers lie on a mesh: a `PartitionSpec` in the place of each."""
    named = {_ROW: rows, _HEAD: heads}
    k, v = (PartitionSpec(*(named.get(axis) for axis in each)) for each in order)
    return LayerCache(k, v, order)
