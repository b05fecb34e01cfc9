"""`KVCache`: keys and values of tokens seen before, always an explicit argument."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxtrain.nn.config import LayerKind, ModelConfig
from jaxtrain.types import Array


class LayerCache(NamedTuple):
    """A ring: position p lies in column p mod S. Where S reaches beyond the row, that is column p.

    Heads stand before columns, so that a decode step's products are plain batched ones over whole buffers.
    """

    k: Array  # [B, K, S, H]
    v: Array  # [B, K, S, H]

    def write(self, k: Array, v: Array, positions: Array, segment_ids: Array, length: Array) -> LayerCache:
        """Put k, v [B, T, K, H] at `positions` [B, T]; not padding (segment 0), nor what a ring of rows that are
        then `length` [B] long has no place for."""
        size = self.k.shape[2]
        kept = (segment_ids != 0) & (positions >= length[:, None] - size)
        columns = jnp.where(kept, positions % size, size)  # a column beyond the last is dropped
        rows = jnp.arange(k.shape[0])[:, None]
        put = (rows, slice(None), columns)
        return LayerCache(self.k.at[put].set(k, mode="drop"), self.v.at[put].set(v, mode="drop"))

    def positions(self, length: Array) -> Array:
        """The position that each column holds [B, S] in rows of `length` [B] tokens; negative: none."""
        last = length[:, None] - 1
        size = self.k.shape[2]
        return last - (last - jnp.arange(size)) % size


class KVCache(NamedTuple):
    """One buffer per layer: an unrolled decode updates each in place, where a stacked one would be copied whole."""

    layers: tuple[LayerCache, ...]
    length: Array  # [B] int32, tokens that each row holds


def columns_of(kind: LayerKind, length: int) -> int:
    """Columns that a layer's buffer needs for rows of up to `length` tokens: no more than its window."""
    return length if kind.window is None else min(length, kind.window)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache for `rows` sequences of up to `length` tokens."""
    layers = []
    for kind in config.pattern:
        shape = (rows, config.num_kv_heads, columns_of(kind, length), config.head_dim)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return KVCache(tuple(layers), jnp.zeros(rows, jnp.int32))
