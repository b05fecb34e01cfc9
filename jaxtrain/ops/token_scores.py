"""The head that never builds [B, T, V]: log-probabilities of tokens, chunk by chunk.

The positions whose weight is not zero are gathered to the front (per data shard) and walked in chunks, so prompts and
padding cost nothing and the largest temporary is one chunk of logits. With z = h W, p = softmax(z) and y the token
(and a factor tanh'(z / c) on every column, where logits are capped),

    d logp / d h = W[:, y] - W p         needs no cotangent: computed in the forward pass, scaled in the backward pass;
    d logp / d W = h (onehot(y) - p)^T   is summed over the tokens, so it needs their cotangents.

Where a loss is a sum over tokens (SFT, and every policy loss whose ratio is a token's own) the cotangent of a token
follows from its own logp, so that the second sum too is taken in the forward pass, as soon as a chunk's logp are there:
three matrix products instead of four. A frozen head needs two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.ops.cpu import matmul as cpu
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array, TokenScores

VOCAB_AXIS = "tensor"
MESH_AXES = (*ROWS, VOCAB_AXIS)
_REPLICAS = tuple(axis for axis in ROWS if axis != "fsdp")  # each of them holds the whole head

# How far a cotangent may be from the one that was foreseen: two roundings of one formula.
_SAME = 1e-5

# Logits of the padded vocabulary: finite, so that a probability of exactly 0 times one of them is 0 and no NaN.
_MASKED = -1e30


class Foreseen(NamedTuple):
    """The derivative of a loss by `logp`, for a loss in which that of a token depends on no other token's `logp`."""

    derivative: Callable[[Array, Any, Any], Array]  # (logp [B, T], rows, whole) -> [B, T]; closes over no traced array
    rows: Any  # arrays [B, T, ...] that it needs
    whole: Any  # and what is the same for all rows


def token_scores(
    hidden: Array,
    head: Array,
    tokens: Array,
    weights: Array,
    *,
    transposed: bool,
    vocab_size: int,
    supports: Array | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    chunk: int = 512,
    foreseen: Foreseen | None = None,
) -> TokenScores:
    """Score every token whose weight is not zero by the hidden state before it.

    Args:
        hidden: [B, T, D], after the final norm, in the compute dtype; products accumulate in float32.
        head: [D, Vp], or [Vp, D] where `transposed` (a tied embedding). Its gradient is summed in float32.
        tokens: [B, T] integers below `vocab_size`.
        weights: [B, T] float32. The scores only ask whether it is zero; the first column counts as zero.
        transposed: which of the two shapes `head` has.
        vocab_size: V. Columns from V to Vp have no probability and get no gradient.
        supports: [B, T, k] int32, the ids among which the token was drawn, which then share all probability; a negative
            id is none, and no id at all means the whole vocabulary. So a sample that top-k, top-p or min-p filtered is
            scored under the distribution that it came from.
        softcap: logits are bent as softcap * tanh(logit / softcap).
        temperature: divides the logits, as it did when the token was drawn.
        mesh: with the axes of `make_mesh`. Rows lie over `ROWS`, the head's D over fsdp, its Vp over tensor.
        chunk: tokens whose logits exist at once, on each device.
        foreseen: the loss that will be taken of these scores, so that the head's gradient is summed while scoring. Any
            other loss gets its right gradient too, but pays for that sum a second time.

    Returns:
        TokenScores of [B, T] float32. `logp` is differentiable by `hidden` and `head`, once.
    """
    assert hidden.shape[:2] == tokens.shape == weights.shape, (hidden.shape, tokens.shape, weights.shape)
    padded = head.shape[0 if transposed else 1]
    assert supports is None or supports.shape[:2] == tokens.shape, (supports.shape, tokens.shape)
    derivative, *given = foreseen or (None, None, None)
    vocabulary = (transposed, vocab_size, vocab_size < padded, softcap, temperature)
    plan = _Plan(*vocabulary, chunk, tokens.shape[1], derivative, mesh is not None)
    score = functools.partial(_score_rows, plan)
    if mesh is None:
        return score(hidden, head, tokens, weights, supports, *given)
    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    head_spec = PartitionSpec(VOCAB_AXIS, "fsdp") if transposed else PartitionSpec("fsdp", VOCAB_AXIS)
    in_specs = (rows, head_spec, rows, rows, rows, rows, whole)
    return jax.shard_map(score, mesh=mesh, in_specs=in_specs, out_specs=rows)(
        hidden, head, tokens, weights, supports, *given
    )


class _Plan(NamedTuple):
    """What is fixed when the program is compiled, and where one device's arithmetic meets the others'."""

    transposed: bool
    vocab_size: int
    padded: bool  # there are columns beyond the vocabulary
    softcap: float | None
    temperature: float
    chunk: int
    length: int  # T
    derivative: Callable[[Array, Any, Any], Array] | None  # of the loss that is foreseen
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


def _score_rows(
    plan: _Plan,
    hidden: Array,
    head: Array,
    tokens: Array,
    weights: Array,
    supports: Array | None,
    rows: Any,
    whole: Any,
) -> TokenScores:
    """Shift, so that a hidden state meets the token after it, and shift the scores back."""
    plan = plan._replace(chunk=min(plan.chunk, tokens.size))
    # Each part of the vocabulary has its share of the hidden states' gradient: the transpose of `varying` sums them.
    hidden = plan.varying(hidden.reshape(-1, hidden.shape[2]))
    supports = None if supports is None else plan.ahead(supports)
    scores: tuple[Array, ...] = _scores(
        plan, hidden, head, plan.ahead(tokens), plan.ahead(weights), supports, rows, whole
    )
    return TokenScores(*map(plan.behind, scores))


class _Compact(NamedTuple):
    """The positions that carry weight, in order, and the way back."""

    source: Array  # [M] position of the i-th weighted token, M a multiple of the chunk; out of range after the last
    rank: Array  # [n] which weighted token a position is
    present: Array  # [n] whether it is one
    trips: Array  # [] chunks that hold a weighted token

    @staticmethod
    def of(weights: Array, chunk: int) -> _Compact:
        present = weights != 0
        size = -(-len(weights) // chunk) * chunk
        (source,) = jnp.nonzero(present, size=size, fill_value=len(weights))
        return _Compact(source, jnp.cumsum(present) - 1, present, -(-jnp.sum(present) // chunk))

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


class _Stats(NamedTuple):
    """Of weighted tokens, [C] or [M] float32."""

    logp: Array
    entropy: Array
    correct: Array
    logsumexp: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    plan: _Plan,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    supports: Array | None,
    rows: Any,
    whole: Any,
) -> tuple[Array, Array, Array]:
    """hidden [n, D], targets and weights [n], supports [n, k] -> logp, entropy, correct [n]."""
    compact = _Compact.of(weights, plan.chunk)
    stats, *_ = _walk(plan, compact, hidden, plan.gather(head, hidden.dtype), targets, supports, want_hidden=False)
    return tuple(map(compact.expand, stats[:3]))


def _scores_fwd(plan: _Plan, *primals):
    train_head = primals[1].perturbed
    hidden, head, targets, weights, supports, rows, whole = jax.tree.map(lambda primal: primal.value, primals)
    compact = _Compact.of(weights, plan.chunk)
    gathered = plan.gather(head, hidden.dtype)
    derivative = plan.derivative
    foreseen = (lambda logp: derivative(logp, rows, whole)) if derivative and train_head else None
    stats, d_hidden, d_head, used = _walk(
        plan, compact, hidden, gathered, targets, supports, foreseen, want_hidden=True
    )
    # An empty array carries the parameter's dtype.
    again = (hidden, gathered, targets, supports, stats.logsumexp, used, head[:0]) if train_head else None
    return tuple(map(compact.expand, stats[:3])), (compact, d_hidden, d_head, again)


def _scores_bwd(plan: _Plan, residuals, cotangents):
    compact, d_hidden, d_head, again = residuals
    g = cotangents[0]
    nothing = (None,) * 5  # to targets, weights, supports and what the foreseen loss needs
    if isinstance(g, SymbolicZero):
        return None, None, *nothing
    d_hidden = compact.expand(d_hidden) * plan.varying(g)[:, None].astype(d_hidden.dtype)
    if again is None:
        return d_hidden, None, *nothing
    hidden, gathered, targets, supports, logsumexp, used, like = again
    recompute = functools.partial(_head_gradient, plan, compact, hidden, gathered, targets, supports, g, logsumexp)
    if d_head is None:
        d_head = recompute()
    else:
        # Relative to the largest as well: a small derivative may be what is left of two large terms.
        error, size = jnp.abs(compact.take_all(g) - used), jnp.abs(used)
        as_foreseen = jnp.all(error <= _SAME * jnp.maximum(size, 1e-2 * size.max()))
        d_head = lax.cond(as_foreseen, lambda: d_head, recompute)
    return d_hidden, plan.scatter(d_head, like.dtype), *nothing


_scores.defvjp(_scores_fwd, _scores_bwd, symbolic_zeros=True)


def _walk(
    plan: _Plan,
    compact: _Compact,
    hidden: Array,
    head: Array,
    targets: Array,
    supports: Array | None,
    foreseen: Callable[[Array], Array] | None = None,
    *,
    want_hidden: bool,
) -> tuple[_Stats, Array | None, Array | None, Array | None]:
    """Stats [M]; d logp / d hidden [M, D] if wanted; d head [D, V] for the `foreseen` cotangents, and these [M]."""
    chunk, size, width = plan.chunk, len(compact.source), hidden.shape[1]

    def body(i: Array, carry: tuple) -> tuple:
        stats, d_hidden, d_head, used = carry
        x, y, *support = compact.take(i, chunk, hidden, targets, *_given(supports))
        (logits, slope), column = _logits(plan, x, head, *support), _column(plan, y, head)
        new, p = _stats(plan, logits, column)
        stats = _Stats(*(lax.dynamic_update_slice(old, s, (i * chunk,)) for old, s in zip(stats, new, strict=True)))
        if want_hidden:
            residue = _residue(p, column, slope, x.dtype)
            dx = _dot(residue, head, 1, 0 if plan.transposed else 1).astype(x.dtype)
            d_hidden = lax.dynamic_update_slice(d_hidden, dx, (i * chunk, 0))
            if foreseen is not None:
                # Of all tokens, of which only this chunk's see their own logp: no others are asked for.
                of_all = foreseen(plan.behind(compact.put(i, chunk, new.logp)))
                (g,) = compact.take(i, chunk, plan.ahead(of_all))
                used = lax.dynamic_update_slice(used, g, (i * chunk,))
                d_head += _outer(x, residue, g)
        return stats, d_hidden, d_head, used

    nothing = plan.varying(jnp.zeros(size), ROWS)
    start = (
        _Stats(*[nothing] * len(_Stats._fields)),
        plan.varying(jnp.zeros((size, width), hidden.dtype)) if want_hidden else None,
        _no_gradient(plan, head) if foreseen is not None else None,
        nothing if foreseen is not None else None,
    )
    return lax.fori_loop(0, compact.trips, body, start)


def _head_gradient(plan: _Plan, compact: _Compact, hidden, head, targets, supports, g, logsumexp) -> Array:
    """sum_t g[t] * d logp[t] / d head, [D, V] float32, from logits computed again."""
    chunk = plan.chunk

    def body(i: Array, d_head: Array) -> Array:
        x, y, scale, *support = compact.take(i, chunk, hidden, targets, g, *_given(supports))
        lse = lax.dynamic_slice(logsumexp, (i * chunk,), (chunk,))
        logits, slope = _logits(plan, x, head, *support)
        p = jnp.exp(logits - lse[:, None])
        return d_head + _outer(x, _residue(p, _column(plan, y, head), slope, x.dtype), scale)

    return lax.fori_loop(0, compact.trips, body, _no_gradient(plan, head))


def _given(supports: Array | None) -> tuple[Array, ...]:
    return () if supports is None else (supports,)


def _logits(plan: _Plan, x: Array, head: Array, support: Array | None = None) -> tuple[Array, Array | float]:
    """x [C, D], support [C, k] -> float32 logits [C, V] over this device's part of the vocabulary, and their slope by
    the product x . head."""
    logits, slope = _dot(x, head, 1, 1 if plan.transposed else 0), 1 / plan.temperature
    if plan.softcap is not None:
        bent = jnp.tanh(logits / plan.softcap)
        logits, slope = plan.softcap * bent, (1 - bent * bent) * slope
    logits *= 1 / plan.temperature
    if plan.padded:
        end = _column(plan, jnp.asarray(plan.vocab_size), head)
        logits = jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < end, logits, _MASKED)
    if support is None:
        return logits, slope
    columns = jnp.where(support < 0, -1, _column(plan, support, head))
    columns = jnp.where(columns < 0, logits.shape[1], columns)  # out of range, where a negative index would not be
    within = jnp.broadcast_to(jnp.all(support < 0, 1)[:, None], logits.shape)
    within = within.at[jnp.arange(len(support))[:, None], columns].set(True, mode="drop")
    return jnp.where(within, logits, _MASKED), slope


def _column(plan: _Plan, token: Array, head: Array) -> Array:
    """Where a token stands in this device's part of the vocabulary; out of range if it is in another's."""
    part = head.shape[0 if plan.transposed else 1]
    return token - lax.axis_index(VOCAB_AXIS) * part if plan.sharded else token


def _stats(plan: _Plan, logits: Array, column: Array) -> tuple[_Stats, Array]:
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
    stats = _Stats(target - top - spread, spread - mean_below, correct, top + spread)
    return stats, exps * (1 / total)[:, None]


def _residue(p: Array, column: Array, slope: Array | float, dtype: jnp.dtype) -> Array:
    """d logp / d (x . head) [C, V]."""
    is_target = lax.broadcasted_iota(jnp.int32, p.shape, 1) == column[:, None]
    return (jnp.where(is_target, 1 - p, -p) * slope).astype(dtype)


def _outer(x: Array, residue: Array, scale: Array) -> Array:
    """sum_t scale[t] x[t] residue[t]^T: [D, V], whichever way the head lies, because this product is the faster one."""
    x = x * scale[:, None].astype(x.dtype)
    return lax.platform_dependent(x, residue, cpu=cpu.outer, default=lambda x, residue: _dot(x, residue, 0, 0))


def _no_gradient(plan: _Plan, head: Array) -> Array:
    return plan.varying(jnp.zeros(head.shape[::-1] if plan.transposed else head.shape, jnp.float32))


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
