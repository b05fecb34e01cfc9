"""`ModelCache`: what each layer keeps of earlier tokens, always an explicit argument.

`LayerState` is the interface of all kinds of layers: the engine resizes, copies and shards the state of a layer through
it, and the layer alone knows what is in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Integer

from jaxtrain.nn.config import DeltaNet, LayerKind, ModelConfig
from jaxtrain.parallel.mesh import platform_of
from jaxtrain.parallel.sharding import ROWS
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


def over_tensor(heads: int, mesh: Mesh) -> str | None:
    """The mesh axis that this number of heads is sharded over, if it is divisible."""
    return None if heads % mesh.shape["tensor"] else "tensor"


def order_on(mesh: Mesh | None) -> Order:
    """The order for the platform of `mesh`."""
    return ON_TPU if platform_of(mesh) == "tpu" else OFF_TPU


class LayerState(ABC):
    """What a layer keeps of the earlier tokens of each row: a pytree whose leaves have rows as their first axis."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Columns of the buffers; 0 if their size does not depend on the number of tokens."""

    @abstractmethod
    def resized(self, rows: int, columns: int) -> LayerState:
        """The state with this many rows and columns: cut off, or padded with zeros."""

    @abstractmethod
    def kept(self, columns: int, length: Integer[Array, ""]) -> LayerState:
        """Of a single row of `length` tokens, what buffers with this many columns keep."""

    @abstractmethod
    def specs(self, mesh: Mesh) -> LayerState:
        """The sharding of the buffers: the same record with a `PartitionSpec` in the place of each leaf. Rows are over
        `ROWS`, heads over "tensor" if they are divisible."""


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("order",))
@dataclass(frozen=True)
class LayerCache(LayerState):
    """Keys and values in a ring buffer: position p is stored in column p mod S (in column p, if S is at least the
    length of the row).

    A token of latent attention has one vector, which is both: `k` holds it as that of one head, and `v` has width 0.
    """

    # Arrays [B, S, K, H], axes permuted by `order`; or other leaves, such as shardings, in trees of this structure.
    k: Any
    v: Any
    order: Order

    @classmethod
    def of(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K V"], order: Order) -> LayerCache:
        """Keys and values as a layer computes them."""
        return cls(k.transpose(order.k), v.transpose(order.v), order)

    @property
    def columns(self) -> int:
        return self.v.shape[self.order.v.index(_COLUMN)]

    def all(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
        """Keys and values with the axes that layers compute with."""
        return self.k.transpose(np.argsort(self.order.k)), self.v.transpose(np.argsort(self.order.v))

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
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

    def kept(self, columns: int, length: Integer[Array, ""]) -> LayerCache:
        """See `LayerState`: the last tokens, in the columns of a smaller ring."""
        if columns >= self.columns:
            return self
        held = jnp.maximum(_held(columns, length[None])[0], 0)
        k, v = (
            jnp.take(each, held, order.index(_COLUMN)) for each, order in zip((self.k, self.v), self.order, strict=True)
        )
        return LayerCache(k, v, self.order)

    def specs(self, mesh: Mesh) -> LayerCache:
        """See `LayerState`."""
        named = {_ROW: ROWS, _HEAD: over_tensor(self.k.shape[self.order.k.index(_HEAD)], mesh)}
        k, v = (PartitionSpec(*(named.get(axis) for axis in each)) for each in self.order)
        return LayerCache(k, v, self.order)

    def resized(self, rows: int, columns: int) -> LayerCache:
        """See `LayerState`."""

        def resize(buffer: Array, order: tuple[int, ...]) -> Array:
            shape = list(buffer.shape)
            shape[0], shape[order.index(_COLUMN)] = rows, columns
            pad = [(0, max(new - old, 0)) for new, old in zip(shape, buffer.shape, strict=True)]
            return jnp.pad(buffer, pad)[tuple(slice(size) for size in shape)]

        return LayerCache(resize(self.k, self.order.k), resize(self.v, self.order.v), self.order)

    def positions(self, length: Integer[Array, " B"]) -> Integer[Array, "B S"]:
        """The position that each column holds in rows of `length` tokens; negative for an empty column."""
        return _held(self.columns, length)


def _held(columns: int, length: Integer[Array, " B"]) -> Integer[Array, "B S"]:
    """The position that each column of a ring holds in rows of `length` tokens; negative for an empty one."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(columns)) % columns


@partial(jax.tree_util.register_dataclass, data_fields=("state", "q", "k", "v"), meta_fields=())
@dataclass(frozen=True)
class RecurrentState(LayerState):
    """The state of a gated delta net, and the tokens that its short convolution still covers, before that."""

    state: Any  # [B, K, G, I, J] float32: see `ops.delta_rule`
    q: Any  # [B, W - 1, K, I] as projected
    k: Any  # [B, W - 1, K, I]
    v: Any  # [B, W - 1, K * G, J]

    @classmethod
    def empty(cls, sizes: DeltaNet, rows: int, dtype: jnp.dtype) -> RecurrentState:
        """That of rows without tokens."""
        state = (rows, sizes.key_heads, sizes.groups, sizes.key_width, sizes.value_width)
        keys = (rows, sizes.conv_width - 1, sizes.key_heads, sizes.key_width)
        values = (rows, sizes.conv_width - 1, sizes.value_heads, sizes.value_width)
        # Each has a buffer of its own, which may be donated.
        tails = (jnp.zeros(shape, dtype) for shape in (keys, keys, values))
        return cls(jnp.zeros(state, jnp.float32), *tails)

    @property
    def tails(self) -> tuple[Array, Array, Array]:
        return self.q, self.k, self.v

    @property
    def columns(self) -> int:
        return 0

    def kept(self, columns: int, length: Integer[Array, ""]) -> RecurrentState:
        """See `LayerState`: all of it, which is that after the last token."""
        return self

    def resized(self, rows: int, columns: int) -> RecurrentState:
        """See `LayerState`."""

        def resize(leaf: Array) -> Array:
            return jnp.pad(leaf, [(0, max(rows - len(leaf), 0)), *[(0, 0)] * (leaf.ndim - 1)])[:rows]

        return jax.tree.map(resize, self)

    def specs(self, mesh: Mesh) -> RecurrentState:
        """See `LayerState`."""
        heads = over_tensor(self.state.shape[1], mesh)
        tail = PartitionSpec(ROWS, None, heads)
        return RecurrentState(PartitionSpec(ROWS, heads), tail, tail, tail)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclass(frozen=True)
class NoState(LayerState):
    """That of a layer which reuses the keys and values of another one: nothing."""

    @property
    def columns(self) -> int:
        return 0

    def kept(self, columns: int, length: Integer[Array, ""]) -> NoState:
        """See `LayerState`."""
        return self

    def resized(self, rows: int, columns: int) -> NoState:
        """See `LayerState`."""
        return self

    def specs(self, mesh: Mesh) -> NoState:
        """See `LayerState`."""
        return self


class ModelCache(NamedTuple):
    """One state per layer: an unrolled decode step updates each in place; it would copy a stacked buffer entirely."""

    layers: tuple[LayerState, ...]
    length: Array  # [B] int32, tokens in each row


def columns_of(kind: LayerKind, length: int) -> int:
    """Columns of a layer's buffer for rows of up to `length` tokens: at most its window, and 0 of a recurrent layer and
    of one that reuses those of another."""
    if kind.mixer == "delta" or kind.reuses:
        return 0
    return length if kind.window is None else min(length, kind.window)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: jnp.dtype, order: Order) -> ModelCache:
    """A cache for `rows` sequences of up to `length` tokens."""

    def empty(kind: LayerKind) -> LayerState:
        if kind.mixer == "delta":
            assert config.delta is not None
            return RecurrentState.empty(config.delta, rows, dtype)
        if kind.reuses:
            return NoState()
        columns = columns_of(kind, length)
        if config.latent is not None:
            held = jnp.zeros((rows, columns, 1, config.latent.rank + config.latent.rope_width), dtype)
            return LayerCache.of(held, held[..., :0], order)
        zeros = jnp.zeros((rows, columns, *config.heads_of(kind)), dtype)
        return LayerCache.of(zeros, zeros, order)

    return ModelCache(tuple(map(empty, config.pattern)), jnp.zeros(rows, jnp.int32))
