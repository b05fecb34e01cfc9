"""The head that never builds [B, T, V]: log-probabilities of tokens, chunk by chunk.

The positions whose weight is not zero are gathered to the front (per data shard) and walked in chunks, so prompts and
padding cost nothing and the largest temporary is one chunk of logits. With z = h W, p = softmax(z) and y the token
(and a factor tanh'(z / c) on every column, where logits are capped),

    d logp / d h = W[:, y] - W p         needs no cotangent: computed in the forward pass, scaled in the backward pass;
    d logp / d W = h (onehot(y) - p)^T   is summed over the tokens, so it needs their cotangents.

Where a loss is a sum over tokens (SFT, and every policy loss whose ratio is a token's own) the cotangent of a token
follows from its own logp, so that the second sum too is taken in the forward pass, as soon as a chunk's logp are there:
three matrix products instead of four. A frozen head needs two.

The entropy H of p may be differentiated too: d H / d z = -p (log p + H). The backward pass then computes the logits
again and adds both derivatives before it multiplies by W and h: four matrix products.
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

from jaxtrain.ops.head_chunks import (
    VOCAB_AXIS,
    Compact,
    Plan,
    Stats,
    column_of,
    dot,
    entropy_residue,
    logits_of,
    logp_residue,
    no_gradient,
    outer,
    stats_of,
)
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array, Scores

# How far a cotangent may be from the one that was foreseen: two roundings of one formula.
_SAME = 1e-5


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
    differentiable_entropy: bool = False,
) -> Scores:
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
            other loss gets its right gradient too, but pays for that sum a second time. Not with
            `differentiable_entropy`.
        differentiable_entropy: whether `entropy` has a gradient too. Both gradients are then taken in the backward
            pass, from logits that are computed again.

    Returns:
        Scores of [B, T] float32. `logp`, and `entropy` if asked for, are differentiable by `hidden` and `head`, once.
    """
    assert foreseen is None or not differentiable_entropy
    assert hidden.shape[:2] == tokens.shape == weights.shape, (hidden.shape, tokens.shape, weights.shape)
    padded = head.shape[0 if transposed else 1]
    assert supports is None or supports.shape[:2] == tokens.shape, (supports.shape, tokens.shape)
    derivative, *given = foreseen or (None, None, None)
    vocabulary = (transposed, vocab_size, vocab_size < padded, softcap, temperature)
    plan = Plan(*vocabulary, chunk, tokens.shape[1], derivative, differentiable_entropy, mesh is not None)
    score = functools.partial(_score_rows, plan)
    if mesh is None:
        return score(hidden, head, tokens, weights, supports, *given)
    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    head_spec = PartitionSpec(VOCAB_AXIS, "fsdp") if transposed else PartitionSpec("fsdp", VOCAB_AXIS)
    in_specs = (rows, head_spec, rows, rows, rows, rows, whole)
    return jax.shard_map(score, mesh=mesh, in_specs=in_specs, out_specs=rows)(
        hidden, head, tokens, weights, supports, *given
    )


def _score_rows(
    plan: Plan,
    hidden: Array,
    head: Array,
    tokens: Array,
    weights: Array,
    supports: Array | None,
    rows: Any,
    whole: Any,
) -> Scores:
    """Shift, so that a hidden state meets the token after it, and shift the scores back."""
    plan = plan._replace(chunk=min(plan.chunk, tokens.size))
    # Each part of the vocabulary has its share of the hidden states' gradient: the transpose of `varying` sums them.
    hidden = plan.varying(hidden.reshape(-1, hidden.shape[2]))
    supports = None if supports is None else plan.ahead(supports)
    scores: tuple[Array, ...] = _scores(
        plan, hidden, head, plan.ahead(tokens), plan.ahead(weights), supports, rows, whole
    )
    return Scores(*map(plan.behind, scores))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    plan: Plan,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    supports: Array | None,
    rows: Any,
    whole: Any,
) -> tuple[Array, Array, Array]:
    """hidden [n, D], targets and weights [n], supports [n, k] -> logp, entropy, correct [n]."""
    compact = Compact.of(weights, plan.chunk)
    stats, *_ = _walk(plan, compact, hidden, plan.gather(head, hidden.dtype), targets, supports, want_hidden=False)
    return tuple(map(compact.expand, stats[:3]))


def _scores_fwd(plan: Plan, *primals):
    train_head = primals[1].perturbed
    hidden, head, targets, weights, supports, rows, whole = jax.tree.map(lambda primal: primal.value, primals)
    compact = Compact.of(weights, plan.chunk)
    gathered = plan.gather(head, hidden.dtype)
    if plan.differentiable_entropy:
        stats, *_ = _walk(plan, compact, hidden, gathered, targets, supports, want_hidden=False)
        again = (hidden, gathered, targets, supports, stats, head[:0] if train_head else None)
        return tuple(map(compact.expand, stats[:3])), (compact, again)
    derivative = plan.derivative
    foreseen = (lambda logp: derivative(logp, rows, whole)) if derivative and train_head else None
    stats, d_hidden, d_head, used = _walk(
        plan, compact, hidden, gathered, targets, supports, foreseen, want_hidden=True
    )
    # An empty array carries the parameter's dtype.
    again = (hidden, gathered, targets, supports, stats.logsumexp, used, head[:0]) if train_head else None
    return tuple(map(compact.expand, stats[:3])), (compact, d_hidden, d_head, again)


def _scores_bwd(plan: Plan, residuals, cotangents):
    nothing = (None,) * 5  # to targets, weights, supports and what the foreseen loss needs
    if plan.differentiable_entropy:
        compact, again = residuals
        return *_both_gradients(plan, compact, again, cotangents[:2]), *nothing
    compact, d_hidden, d_head, again = residuals
    g = cotangents[0]
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
    plan: Plan,
    compact: Compact,
    hidden: Array,
    head: Array,
    targets: Array,
    supports: Array | None,
    foreseen: Callable[[Array], Array] | None = None,
    *,
    want_hidden: bool,
) -> tuple[Stats, Array | None, Array | None, Array | None]:
    """Stats [M]; d logp / d hidden [M, D] if wanted; d head [D, V] for the `foreseen` cotangents, and these [M]."""
    chunk, size, width = plan.chunk, len(compact.source), hidden.shape[1]

    def body(i: Array, carry: tuple) -> tuple:
        stats, d_hidden, d_head, used = carry
        x, y, *support = compact.take(i, chunk, hidden, targets, *_given(supports))
        (logits, slope), column = logits_of(plan, x, head, *support), column_of(plan, y, head)
        new, p = stats_of(plan, logits, column)
        stats = Stats(*(lax.dynamic_update_slice(old, s, (i * chunk,)) for old, s in zip(stats, new, strict=True)))
        if want_hidden:
            residue = logp_residue(p, column, slope, x.dtype)
            dx = dot(residue, head, 1, 0 if plan.transposed else 1).astype(x.dtype)
            d_hidden = lax.dynamic_update_slice(d_hidden, dx, (i * chunk, 0))
            if foreseen is not None:
                # Of all tokens, of which only this chunk's see their own logp: no others are asked for.
                of_all = foreseen(plan.behind(compact.put(i, chunk, new.logp)))
                (g,) = compact.take(i, chunk, plan.ahead(of_all))
                used = lax.dynamic_update_slice(used, g, (i * chunk,))
                d_head += outer(x, residue, g)
        return stats, d_hidden, d_head, used

    nothing = plan.varying(jnp.zeros(size), ROWS)
    start = (
        Stats(*[nothing] * len(Stats._fields)),
        plan.varying(jnp.zeros((size, width), hidden.dtype)) if want_hidden else None,
        no_gradient(plan, head) if foreseen is not None else None,
        nothing if foreseen is not None else None,
    )
    return lax.fori_loop(0, compact.trips, body, start)


def _head_gradient(plan: Plan, compact: Compact, hidden, head, targets, supports, g, logsumexp) -> Array:
    """sum_t g[t] * d logp[t] / d head, [D, V] float32, from logits computed again."""
    chunk = plan.chunk

    def body(i: Array, d_head: Array) -> Array:
        x, y, scale, *support = compact.take(i, chunk, hidden, targets, g, *_given(supports))
        lse = lax.dynamic_slice(logsumexp, (i * chunk,), (chunk,))
        logits, slope = logits_of(plan, x, head, *support)
        p = jnp.exp(logits - lse[:, None])
        return d_head + outer(x, logp_residue(p, column_of(plan, y, head), slope, x.dtype), scale)

    return lax.fori_loop(0, compact.trips, body, no_gradient(plan, head))


def _both_gradients(plan: Plan, compact: Compact, again: tuple, cotangents: Any) -> tuple[Array, Array | None]:
    """To hidden [n, D] and head, of log-probabilities and entropies whose cotangents [n] are given."""
    hidden, head, targets, supports, stats, like = again
    chunk = plan.chunk
    of_logp, of_entropy = (
        jnp.zeros_like(compact.present, jnp.float32) if isinstance(g, SymbolicZero) else g for g in cotangents
    )

    def body(i: Array, carry: tuple) -> tuple:
        d_hidden, d_head = carry
        x, y, g, h, *support = compact.take(i, chunk, hidden, targets, of_logp, of_entropy, *_given(supports))
        lse, entropy = (lax.dynamic_slice(each, (i * chunk,), (chunk,)) for each in (stats.logsumexp, stats.entropy))
        logits, slope = logits_of(plan, x, head, *support)
        p = jnp.exp(logits - lse[:, None])
        residue = g[:, None] * logp_residue(p, column_of(plan, y, head), slope, jnp.float32)
        residue = (residue + h[:, None] * entropy_residue(p, logits, lse, entropy, slope)).astype(x.dtype)
        dx = dot(residue, head, 1, 0 if plan.transposed else 1).astype(x.dtype)
        d_hidden = lax.dynamic_update_slice(d_hidden, dx, (i * chunk, 0))
        return d_hidden, None if d_head is None else d_head + outer(x, residue, jnp.ones_like(g))

    start = (
        plan.varying(jnp.zeros((len(compact.source), hidden.shape[1]), hidden.dtype)),
        None if like is None else no_gradient(plan, head),
    )
    d_hidden, d_head = lax.fori_loop(0, compact.trips, body, start)
    return compact.expand(d_hidden), None if like is None else plan.scatter(d_head, like.dtype)


def _given(supports: Array | None) -> tuple[Array, ...]:
    return () if supports is None else (supports,)
