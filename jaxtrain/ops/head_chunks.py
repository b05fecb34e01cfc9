"""The computations of `ops.token_scores` on one chunk of tokens: logits, their statistics, and their derivatives.

`Plan` holds the compile-time constants and the collectives; `Compact` moves the weighted tokens to the front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Integer

from jaxtrain.ops.cpu import matmul as cpu
from jaxtrain.ops.divergence import (
    UNKNOWN,
    AnyDivergence,
    DivergenceStats,
    divergence_derivative,
    divergence_stats,
)
from jaxtrain.ops.varying import varying_over
from jaxtrain.parallel.sharding import CONTEXT, FSDP, ROWS
from jaxtrain.types import Array, Scores

VOCAB_AXIS = "tensor"
TOKEN_AXES = (*ROWS, CONTEXT)
MESH_AXES = (*TOKEN_AXES, VOCAB_AXIS)
_REPLICAS = tuple(axis for axis in TOKEN_AXES if axis not in FSDP)  # the head is replicated over these axes

# Logits of the padded vocabulary: finite, so that their product with a probability of exactly 0 is 0 and not NaN.
_MASKED = -1e30


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["vocab_size", "transposed", "softcap"]
)
@dataclass(frozen=True)
class Head:
    """A projection of hidden states onto a vocabulary. A pytree of its weight; the other fields are static."""

    weight: Any  # [D, Vp], or [Vp, D] if `transposed` (a tied embedding)
    vocab_size: int  # V. Columns from V to Vp have probability 0 and gradient 0
    transposed: bool = False
    softcap: float | None = None  # logits become softcap * tanh(logit / softcap)

    @property
    def vocab_axis(self) -> int:
        """The axis of `weight` that is the vocabulary."""
        return 0 if self.transposed else 1

    @property
    def columns(self) -> int:
        """Vp, or a device's share of it."""
        return self.weight.shape[self.vocab_axis]


class Heads(NamedTuple):
    """The head, and the teacher's where a divergence is computed: both with the same number of columns."""

    student: Head
    teacher: Head | None = None

    @property
    def common(self) -> int:
        """The size of the vocabulary that both have."""
        return min(head.vocab_size for head in self if head is not None)


class TopK(NamedTuple):
    """The most probable ids of a token, in descending order, and their log-probabilities. Those of a teacher are at the
    temperature of the divergence."""

    ids: Array  # [..., k]
    logps: Array  # [..., k]


class TokenRows(NamedTuple):
    """What is known of `n` tokens, or of those of a chunk."""

    hidden: Array  # [n, D] the state that predicts the token
    target: Array  # [n] the token
    support: Array | None = None  # [n, k] the ids that it was sampled from
    teacher: Array | TopK | None = None  # [n, E] the teacher's state that predicts the token, or [n, k] the top k


class Plan(NamedTuple):
    """Compile-time constants of `token_scores`, and its collectives over the shards of rows, head and vocabulary.

    A device has the tokens, weights and signals of its rows, and the hidden states of its part of every row.
    """

    temperature: float
    chunk: int
    length: int  # T
    parts: int  # of a row, over `CONTEXT`
    derivative: Callable[[Scores, Any, Any], Scores] | None  # of the expected loss: see `LossDerivative`
    differentiable_entropy: bool
    divergence: AnyDivergence | None
    top_k: int | None
    sharded: bool  # inside shard_map

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the scores that have a gradient."""
        others = {"entropy": self.differentiable_entropy, "divergence": self.divergence is not None}
        others |= {"top_logps": self.top_k is not None}
        return "logp", *(name for name, has_gradient in others.items() if has_gradient)

    @property
    def joint(self) -> bool:
        """Whether more scores than `logp` have one."""
        return len(self.differentiable) > 1

    def gather(self, head: Head, dtype: jnp.dtype) -> Head:
        """The head in the compute dtype, gathered over `FSDP`; its vocabulary stays sharded.

        Called once, before the loop over chunks: the number of chunks differs between data shards, so the loop must not
        contain collectives over them.
        """
        weight = head.weight.astype(dtype)
        if self.sharded:
            weight = self.varying(lax.all_gather(weight, FSDP, axis=1 - head.vocab_axis, tiled=True))
        return replace(head, weight=weight)

    def scatter(self, d_head: Any, like: Head) -> Head:
        """The transpose of `gather` for a float32 gradient [D, V]: in the dtype of `like`."""
        d_head = d_head.T if like.transposed else d_head
        if self.sharded:
            axis = 1 - like.vocab_axis
            d_head = lax.psum(lax.psum_scatter(d_head, FSDP, scatter_dimension=axis, tiled=True), _REPLICAS)
        return replace(like, weight=d_head.astype(like.weight.dtype))

    def shift_left(self, x: Array) -> Array:
        """[B, T, ...] -> [n, ...]: at every position of this device, the value of the next token."""
        shifted = jnp.pad(x[:, 1:], ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))
        if self.parts > 1:
            shifted = lax.dynamic_slice_in_dim(shifted, self._start(), self.length // self.parts, 1)
        return shifted.reshape(-1, *x.shape[2:])

    def shift_right(self, x: Array) -> Array:
        """[n, ...] -> [B, T, ...]: the inverse of `shift_left`; 0 at the first token of a row, and at those that the
        states of other devices predict."""
        rows = x.reshape(-1, self.length // self.parts, *x.shape[1:])
        if self.parts > 1:
            empty = jnp.zeros((len(rows), self.length, *x.shape[1:]), x.dtype)
            rows = lax.dynamic_update_slice_in_dim(self.varying(empty, TOKEN_AXES), rows, self._start(), 1)
        return jnp.pad(rows[:, :-1], ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 1)))

    def from_all_parts(self, x: Array) -> Array:
        """The sum over the devices that share a row of what `shift_right` returned: the scores of all its tokens."""
        return lax.psum(x, CONTEXT) if self.sharded else x

    def _start(self) -> Array:
        """The first position of this device's part of a row."""
        return lax.axis_index(CONTEXT) * (self.length // self.parts)

    def reduce_over_vocab(self, reduce: Callable[..., Array], x: Array) -> Array:
        return reduce(x, VOCAB_AXIS) if self.sharded else x

    def varying(self, x: Array, axes: tuple[str, ...] = MESH_AXES) -> Array:
        """Mark `x` as varying over the mesh `axes`, as the types of `shard_map` require."""
        return varying_over(x, axes) if self.sharded else x


class Compact(NamedTuple):
    """Indices that move the weighted tokens to the front, and back to their positions."""

    source: Array  # [M] position of the i-th weighted token, M a multiple of the chunk; out of range after the last
    rank: Array  # [n] index among the weighted tokens, where the position has one
    weighted: Array  # [n] bool
    num_chunks: Array  # [] chunks that contain a weighted token

    @staticmethod
    def of(weights: Array, chunk: int) -> Compact:
        weighted = weights != 0
        size = -(-len(weights) // chunk) * chunk
        (source,) = jnp.nonzero(weighted, size=size, fill_value=len(weights))
        return Compact(source, jnp.cumsum(weighted) - 1, weighted, -(-jnp.sum(weighted) // chunk))

    def rows_of_chunk(self, i: Array, chunk: int, arrays: Any) -> Any:
        """The i-th chunk of a tree of arrays [n, ...]; zeros after the last weighted token."""
        source = lax.dynamic_slice(self.source, (i * chunk,), (chunk,))
        return jax.tree.map(lambda x: jnp.asarray(x).at[source].get(mode="fill", fill_value=0), arrays)

    def all_rows(self, x: Array) -> Array:
        """[n, ...] -> [M, ...]; zeros after the last weighted token."""
        return jnp.asarray(x).at[self.source].get(mode="fill", fill_value=0)

    def put(self, i: Array, chunk: int, values: Array) -> Array:
        """The i-th chunk's values [C, ...] at their positions; zeros elsewhere [n, ...]."""
        source = lax.dynamic_slice(self.source, (i * chunk,), (chunk,))
        shape = (*self.weighted.shape, *values.shape[1:])
        return jnp.zeros_like(self.weighted, values.dtype, shape=shape).at[source].set(values, mode="drop")

    def expand(self, x: Array) -> Array:
        """[M, ...] -> [n, ...], zero where a position is not weighted."""
        return jnp.where(self.weighted.reshape(-1, *[1] * (x.ndim - 1)), x[self.rank], 0)


class Stats(NamedTuple):
    """Scores of weighted tokens, [C] or [M] float32; `top` [C, k] or [M, k]."""

    logp: Array
    entropy: Array
    correct: Array
    logsumexp: Array
    divergence: DivergenceStats | None = None
    top: TopK | None = None

    def scores(self, *names: str) -> Scores:
        """The scores of these names; the others, and those that were not computed, are None."""
        found: dict[str, Any] = self._asdict() | {"divergence": self.divergence and self.divergence.value}
        found |= {"top_ids": self.top and self.top.ids, "top_logps": self.top and self.top.logps}
        return Scores(**{name: found[name] for name in names if found[name] is not None})


class Logits(NamedTuple):
    """float32 logits of a chunk over this device's shard of the vocabulary."""

    student: Float[Array, "C V"]  # divided by the temperature of the log-probability
    slope: Float[Array, "C V"] | float  # their derivative by the product x . head
    column: Integer[Array, " C"]  # of the target; out of range if another device has it
    # divided by the temperature of the divergence; of a `TopK` the log-probabilities, `UNKNOWN` at other ids
    teacher: Float[Array, "C V"] | None = None


def logits_of(plan: Plan, heads: Heads, rows: TokenRows) -> Logits:
    """The logits of a chunk, and the teacher's if there is one."""
    student, slope = _logits(plan, rows.hidden, heads.student, plan.temperature)
    if rows.support is not None:
        student = _within(plan, student, rows.support)
    column = _local_column(plan, rows.target, student.shape[1])
    if isinstance(rows.teacher, TopK):
        return Logits(student, slope, column, _scattered(plan, rows.teacher, jnp.full_like(student, UNKNOWN)))
    if plan.divergence is None or heads.teacher is None or rows.teacher is None:
        return Logits(student, slope, column)
    teacher_head = replace(heads.teacher, vocab_size=heads.common)
    teacher, _ = _logits(plan, rows.teacher, teacher_head, plan.divergence.temperature)
    return Logits(student, slope, column, teacher)


def _scattered(plan: Plan, top: TopK, into: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """`into` with the log-probabilities at their columns."""
    columns = _local_column(plan, top.ids, into.shape[1])
    columns = jnp.where(columns < 0, into.shape[1], columns)  # out of range: dropped
    logps = top.logps.astype(into.dtype)
    return jnp.asarray(into).at[jnp.arange(len(columns))[:, None], columns].set(logps, mode="drop")


def _top(plan: Plan, student: Float[Array, "C V"], logsumexp: Float[Array, " C"]) -> TopK | None:
    """The `plan.top_k` most probable ids over all shards of the vocabulary, if they are asked for."""
    if plan.top_k is None:
        return None
    logits, ids = lax.top_k(student, min(plan.top_k, student.shape[1]))
    if plan.sharded:
        shards, shard = lax.axis_size(VOCAB_AXIS), lax.axis_index(VOCAB_AXIS)
        mine = (jnp.arange(shards) == shard)[None, :, None]

        def gathered(x: Array) -> Array:  # a sum, whose result is the same on all shards also for the types
            return lax.psum(jnp.where(mine, x[:, None], 0), VOCAB_AXIS).reshape(len(x), -1)

        ids = gathered(ids + shard * student.shape[1])
        logits, places = lax.top_k(gathered(logits), plan.top_k)
        ids = jnp.take_along_axis(ids, places, 1)
    return TopK(ids, logits - logsumexp[:, None])


def _logits(
    plan: Plan, x: Float[Array, "C D"], head: Head, temperature: float
) -> tuple[Float[Array, "C V"], Float[Array, "C V"] | float]:
    """The logits divided by the temperature, and their derivative by the product x . head."""
    logits, slope = dot(x, head.weight, 1, 1 - head.vocab_axis), 1 / temperature
    if head.softcap is not None:
        tanh = jnp.tanh(logits / head.softcap)
        logits, slope = head.softcap * tanh, (1 - tanh * tanh) * slope
    return _within_vocabulary(plan, logits * (1 / temperature), head.vocab_size), slope


def _within_vocabulary(plan: Plan, logits: Float[Array, "C V"], vocab_size: int) -> Float[Array, "C V"]:
    """Without probability at the columns from `vocab_size` on."""
    shards = lax.axis_size(VOCAB_AXIS) if plan.sharded else 1
    if vocab_size == logits.shape[1] * shards:
        return logits
    end = _local_column(plan, jnp.asarray(vocab_size), logits.shape[1])
    return jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < end, logits, _MASKED)


def _within(plan: Plan, logits: Float[Array, "C V"], support: Integer[Array, "C k"]) -> Float[Array, "C V"]:
    """Without probability outside of the support, if there is one."""
    columns = jnp.where(support < 0, -1, _local_column(plan, support, logits.shape[1]))
    columns = jnp.where(columns < 0, logits.shape[1], columns)  # out of range: dropped
    within = jnp.broadcast_to(jnp.all(support < 0, 1)[:, None], logits.shape)
    within = within.at[jnp.arange(len(support))[:, None], columns].set(True, mode="drop")
    return jnp.where(within, logits, _MASKED)


def _local_column(plan: Plan, token: Integer[Array, "*C"], columns: int) -> Integer[Array, "*C"]:
    """The column of a token in this device's shard of `columns` columns; out of range if another device has it."""
    return token - lax.axis_index(VOCAB_AXIS) * columns if plan.sharded else token


def _student_of_divergence(plan: Plan, heads: Heads, logits: Logits) -> tuple[Array, float]:
    """The student's logits that are compared with the teacher's, and their derivative by `logits.student`."""
    assert plan.divergence is not None
    ratio = plan.temperature / plan.divergence.temperature
    student = logits.student if ratio == 1 else logits.student * ratio
    if heads.common < heads.student.vocab_size:
        student = _within_vocabulary(plan, student, heads.common)
    return student, ratio


def stats_of(plan: Plan, heads: Heads, logits: Logits) -> tuple[Stats, Float[Array, "C V"]]:
    """Scores of the targets, and the student's probabilities."""
    student, column = logits.student, logits.column
    top = plan.reduce_over_vocab(lax.pmax, student.max(1))
    below = student - top[:, None]
    exps = jnp.exp(below)
    total = plan.reduce_over_vocab(lax.psum, exps.sum(1))
    mean_below = plan.reduce_over_vocab(lax.psum, (exps * below).sum(1)) / total
    is_local = (column >= 0) & (column < student.shape[1])
    target = jnp.take_along_axis(student, column[:, None], 1, mode="clip")[:, 0]
    target = plan.reduce_over_vocab(lax.psum, jnp.where(is_local, target, 0))
    log_total = jnp.log(total)
    correct = (target >= top).astype(jnp.float32)
    logsumexp = top + log_total
    found = _top(plan, student, logsumexp)
    stats = Stats(target - top - log_total, log_total - mean_below, correct, logsumexp, top=found)
    if plan.divergence is not None and logits.teacher is not None:
        compared, _ = _student_of_divergence(plan, heads, logits)
        divergence = divergence_stats(plan.divergence, compared, logits.teacher, plan.reduce_over_vocab)
        stats = stats._replace(divergence=divergence)
    return stats, exps * (1 / total)[:, None]


def logp_derivative(p: Float[Array, "C V"], logits: Logits, dtype: Any) -> Float[Array, "C V"]:
    """d logp / d (x . head), where p are the student's probabilities."""
    is_target = lax.broadcasted_iota(jnp.int32, p.shape, 1) == logits.column[:, None]
    return (jnp.where(is_target, 1 - p, -p) * logits.slope).astype(dtype)


def joint_derivative(plan: Plan, heads: Heads, logits: Logits, stats: Stats, cotangents: Scores) -> Float[Array, "C V"]:
    """The derivative by x . head, float32, of the sum of the scores times their cotangents, [C] or [C, k]; None counts
    as 0.

    That of the entropy is -p (log p + entropy).
    """
    log_p = logits.student - stats.logsumexp[:, None]
    p = jnp.exp(log_p)
    derivative = cotangents.logp[:, None] * logp_derivative(p, logits, jnp.float32)
    if cotangents.entropy is not None:
        derivative -= cotangents.entropy[:, None] * p * (log_p + stats.entropy[:, None]) * logits.slope
    if stats.divergence is not None:
        assert plan.divergence is not None and logits.teacher is not None
        compared, ratio = _student_of_divergence(plan, heads, logits)
        of_divergence = divergence_derivative(plan.divergence, compared, logits.teacher, stats.divergence)
        derivative += cotangents.divergence[:, None] * of_divergence * (logits.slope * ratio)
    if stats.top is not None:
        g = cotangents.top_logps
        at_ids = _scattered(plan, TopK(stats.top.ids, g), jnp.zeros_like(p))
        derivative += (at_ids - p * g.sum(1, keepdims=True)) * logits.slope
    return derivative


def outer(x: Float[Array, "C D"], derivative: Float[Array, "C V"], scale: Float[Array, " C"]) -> Float[Array, "D V"]:
    """sum_t scale[t] x[t] derivative[t]^T, for a transposed head as well, since this product is faster."""
    x = x * scale[:, None].astype(x.dtype)
    return lax.platform_dependent(x, derivative, cpu=cpu.outer_product, default=lambda x, y: dot(x, y, 0, 0))


def zero_head_gradient(plan: Plan, head: Head) -> Array:
    """The initial value of a sum of head gradients: float32 [D, V]."""
    shape = head.weight.shape
    return plan.varying(jnp.zeros(shape[::-1] if head.transposed else shape, jnp.float32))


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
