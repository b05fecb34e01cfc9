"""What the head does to one chunk of tokens: logits, their statistics, and the gradients of these.

`Plan` is fixed when the program is compiled, `Compact` brings the weighted tokens to the front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array

VOCAB_AXIS = "tensor"
MESH_AXES = (*ROWS, VOCAB_AXIS)
_REPLICAS = tuple(axis for axis in ROWS if axis != "fsdp")  # each of them holds the whole head

# Logits of the padded vocabulary: finite, so that a probability of exactly 0 times one of them is 0 and no NaN.
_MASKED = -1e30


class Plan(NamedTuple):
    """What is fixed when the program is compiled, and where one device's arithmetic meets the others'."""

    transposed: bool
    vocab_size: int
    padded: bool  # there are columns beyond the vocabulary
    softcap: float | None
    temperature: float
    chunk: int
    length: int  # T
    derivative: Callable[[Array, Any, Any], Array] | None  # of the loss that is foreseen
    differentiable_entropy: bool
    sharded: bool  # inside shard_map

    def gather(self, head: Array, dtype: jnp.dtype) -> Array:
        """The head in the compute dtype, whole but for the vocabulary's split.

        Once, before the loop: trip counts differ between data shards, so no collective may join them inside it.
        """
        head = head.astype(dtype)
        if not self.sharded:
            return head
        return self.varying(lax.all_gather(head, "fsdp", axis=1 if self.transposed else 0, tiled=True))

    def scatter(self, d_head: Array, dtype: jnp.dtype) -> Array:
        """The transpose of `gather` for a float32 gradient [D, V]."""
        d_head = d_head.T if self.transposed else d_head
        if self.sharded:
            axis = 1 if self.transposed else 0
            d_head = lax.psum(lax.psum_scatter(d_head, "fsdp", scatter_dimension=axis, tiled=True), _REPLICAS)
        return d_head.astype(dtype)

    def ahead(self, x: Array) -> Array:
        """[B, T, ...] -> [B * T, ...]: at every position what belongs to the token after it."""
        shifted = jnp.pad(x[:, 1:], ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))
        return shifted.reshape(-1, *x.shape[2:])

    def behind(self, x: Array) -> Array:
        """[B * T] -> [B, T]: `ahead` undone; 0 at the first token of a row."""
        return jnp.pad(x.reshape(-1, self.length)[:, :-1], ((0, 0), (1, 0)))

    def over_vocab(self, reduce: Callable[..., Array], x: Array) -> Array:
        return reduce(x, VOCAB_AXIS) if self.sharded else x

    def varying(self, x: Array, axes: tuple[str, ...] = MESH_AXES) -> Array:
        """Mark `x` as differing between devices along `axes`, as shard_map wants to know."""
        missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying) if self.sharded else ()
        return lax.pcast(x, missing, to="varying") if missing else x


class Compact(NamedTuple):
    """The positions that carry weight, in order, and the way back."""

    source: Array  # [M] position of the i-th weighted token, M a multiple of the chunk; out of range after the last
    rank: Array  # [n] which weighted token a position is
    present: Array  # [n] whether it is one
    trips: Array  # [] chunks that hold a weighted token

    @staticmethod
    def of(weights: Array, chunk: int) -> Compact:
        present = weights != 0
        size = -(-len(weights) // chunk) * chunk
        (source,) = jnp.nonzero(present, size=size, fill_value=len(weights))
        return Compact(source, jnp.cumsum(present) - 1, present, -(-jnp.sum(present) // chunk))

    def take(self, i: Array, chunk: int, *arrays: Array) -> list[Array]:
        """The i-th chunk of arrays [n, ...]; zeros after the last weighted token."""
        source = lax.dynamic_slice(self.source, (i * chunk,), (chunk,))
        return [x.at[source].get(mode="fill", fill_value=0) for x in arrays]

    def take_all(self, x: Array) -> Array:
        """[n] -> [M]; zeros after the last weighted token."""
        return x.at[self.source].get(mode="fill", fill_value=0)

    def put(self, i: Array, chunk: int, values: Array) -> Array:
        """The i-th chunk's values [C] where they belong among zeros [n]."""
        source = lax.dynamic_slice(self.source, (i * chunk,), (chunk,))
        return jnp.zeros_like(self.present, values.dtype).at[source].set(values, mode="drop")

    def expand(self, x: Array) -> Array:
        """[M, ...] -> [n, ...], zero where a position carries no weight."""
        return jnp.where(self.present.reshape(-1, *[1] * (x.ndim - 1)), x[self.rank], 0)


class Stats(NamedTuple):
    """Of weighted tokens, [C] or [M] float32."""

    logp: Array
    entropy: Array
    correct: Array
    logsumexp: Array


def logits_of(plan: Plan, x: Array, head: Array, support: Array | None = None) -> tuple[Array, Array | float]:
    """x [C, D], support [C, k] -> float32 logits [C, V] over this device's part of the vocabulary, and their slope by
    the product x . head."""
    logits, slope = dot(x, head, 1, 1 if plan.transposed else 0), 1 / plan.temperature
    if plan.softcap is not None:
        bent = jnp.tanh(logits / plan.softcap)
        logits, slope = plan.softcap * bent, (1 - bent * bent) * slope
    logits *= 1 / plan.temperature
    if plan.padded:
        end = column_of(plan, jnp.asarray(plan.vocab_size), head)
        logits = jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < end, logits, _MASKED)
    if support is None:
        return logits, slope
    columns = jnp.where(support < 0, -1, column_of(plan, support, head))
    columns = jnp.where(columns < 0, logits.shape[1], columns)  # out of range, where a negative index would not be
    within = jnp.broadcast_to(jnp.all(support < 0, 1)[:, None], logits.shape)
    within = within.at[jnp.arange(len(support))[:, None], columns].set(True, mode="drop")
    return jnp.where(within, logits, _MASKED), slope


def column_of(plan: Plan, token: Array, head: Array) -> Array:
    """Where a token stands in this device's part of the vocabulary; out of range if it is in another's."""
    part = head.shape[0 if plan.transposed else 1]
    return token - lax.axis_index(VOCAB_AXIS) * part if plan.sharded else token


def stats_of(plan: Plan, logits: Array, column: Array) -> tuple[Stats, Array]:
    """Of the tokens at `column` [C], and the probabilities [C, V]."""
    top = plan.over_vocab(lax.pmax, logits.max(1))
    below = logits - top[:, None]
    exps = jnp.exp(below)
    total = plan.over_vocab(lax.psum, exps.sum(1))
    mean_below = plan.over_vocab(lax.psum, (exps * below).sum(1)) / total
    here = (column >= 0) & (column < logits.shape[1])
    target = jnp.take_along_axis(logits, column[:, None], 1, mode="clip")[:, 0]
    target = plan.over_vocab(lax.psum, jnp.where(here, target, 0))
    spread = jnp.log(total)
    correct = (target >= top).astype(jnp.float32)
    stats = Stats(target - top - spread, spread - mean_below, correct, top + spread)
    return stats, exps * (1 / total)[:, None]


def logp_residue(p: Array, column: Array, slope: Array | float, dtype: jnp.dtype) -> Array:
    """d logp / d (x . head) [C, V]."""
    is_target = lax.broadcasted_iota(jnp.int32, p.shape, 1) == column[:, None]
    return (jnp.where(is_target, 1 - p, -p) * slope).astype(dtype)


def entropy_residue(p: Array, logits: Array, logsumexp: Array, entropy: Array, slope: Array | float) -> Array:
    """d entropy / d (x . head) [C, V] float32: -p (log p + entropy), with p = exp(logits - logsumexp)."""
    return -p * (logits - logsumexp[:, None] + entropy[:, None]) * slope


def outer(x: Array, residue: Array, scale: Array) -> Array:
    """sum_t scale[t] x[t] residue[t]^T: [D, V], whichever way the head lies, because this product is the faster one."""
    x = x * scale[:, None].astype(x.dtype)
    return lax.platform_dependent(x, residue, cpu=_outer_on_cpu, default=lambda x, residue: dot(x, residue, 0, 0))


def _outer_on_cpu(x: Array, residue: Array) -> Array:
    """As in `ops.project`: XLA's CPU kernels want rows times columns; the barrier keeps the transpose out of them."""
    return dot(lax.optimization_barrier(x.T), residue, 1, 0)


def no_gradient(plan: Plan, head: Array) -> Array:
    return plan.varying(jnp.zeros(head.shape[::-1] if plan.transposed else head.shape, jnp.float32))


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
