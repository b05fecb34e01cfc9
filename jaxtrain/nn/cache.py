"""`KVCache`: keys and values of tokens seen before, always an explicit argument."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Array


class LayerCache(NamedTuple):
    k: Array  # [B, S, K, H]; column s holds position s
    v: Array  # [B, S, K, H]

    def write(self, k: Array, v: Array, positions: Array) -> LayerCache:
        """Put k, v [B, T, K, H] at the columns `positions` [B, T]."""
        rows = jnp.arange(k.shape[0])[:, None]
        return LayerCache(self.k.at[rows, positions].set(k), self.v.at[rows, positions].set(v))


class KVCache(NamedTuple):
    """One buffer per layer: an unrolled decode updates each in place, where a stacked one would be copied whole."""

    layers: tuple[LayerCache, ...]
    segment_ids: Array  # [B, S] int32, 0 where nothing is stored

    def mark(self, segment_ids: Array, positions: Array) -> KVCache:
        """Take note that the columns `positions` [B, T] hold tokens of `segment_ids` [B, T]."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return self._replace(segment_ids=self.segment_ids.at[rows, positions].set(segment_ids))


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache for `rows` sequences of up to `length` tokens."""
    shape = (rows, length, config.num_kv_heads, config.head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
    return KVCache(layers, jnp.zeros((rows, length), jnp.int32))
