"""Log-probability, entropy and accuracy of tokens, and their divergence from a teacher, computed in chunks: logits
[B, T, V] are never materialised.

The positions whose weight is not zero are gathered to the front (per data shard) and processed in chunks, so prompts
and padding cost nothing and the largest temporary is one chunk of logits. With z = h W, p = softmax(z) and y the token
(and a factor tanh'(z / c) on every column, if logits are soft-capped),

    d logp / d h = W[:, y] - W p         does not depend on the cotangent: computed in the forward pass, scaled in the
                                         backward pass;
    d logp / d W = h (onehot(y) - p)^T   is summed over the tokens, weighted by their cotangents.

If the loss is a sum over tokens (SFT, and policy losses with a ratio per token), the cotangents of a token are a
function of its scores alone. Then the second sum is also taken in the forward pass, as soon as the scores of a chunk
are known: three matrix products instead of four. A frozen head needs two.

If more scores than logp are differentiable (the entropy, or a divergence from a teacher, whose logits are one product
more), the derivatives by z are added before they are multiplied by W and h. With the cotangents known in the forward
pass this takes the same number of products; otherwise the backward pass recomputes the logits.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxtrain.ops.divergence import AnyDivergence, DivergenceStats
from jaxtrain.ops.head_chunks import (
    TOKEN_AXES,
    VOCAB_AXIS,
    Compact,
    Head,
    Heads,
    Plan,
    Stats,
    TokenRows,
    TopK,
    dot,
    joint_derivative,
    logits_of,
    logp_derivative,
    outer,
    stats_of,
    zero_head_gradient,
)
from jaxtrain.parallel.sharding import CONTEXT, FSDP, ROWS, context_shards
from jaxtrain.types import Array, Scores

# Relative difference between the cotangents and the expected ones that counts as rounding of the same formula.
_TOLERANCE = 1e-5


class LossDerivative(NamedTuple):
    """The derivative of a loss by its scores. That of a token must not depend on the scores of other tokens."""

    # (scores [B, T], rows, shared) -> derivatives [B, T], None where the score is None; closes over no traced array
    function: Callable[[Scores, Any, Any], Scores]
    rows: Any  # a tree of arrays [B, T, ...]
    shared: Any  # a tree of arrays without a row axis


class Targets(NamedTuple):
    """The tokens to score."""

    tokens: Array  # [B, T] ids below the head's `vocab_size`
    weights: Array  # [B, T] a token is scored if its weight is not zero; the first column is never scored
    # [B, T, k] the ids that each token was sampled from, padded with negative ids: the probabilities are normalised
    # over these. A token with no id is scored over the whole vocabulary. This scores a sample of top-k, top-p or min-p
    # sampling under the distribution that it was drawn from.
    supports: Array | None = None


class Teacher(NamedTuple):
    """What a divergence compares the student with. It has no gradient.

    Its vocabulary may be padded differently: the divergence is over the ids that both heads have.
    """

    hidden: Array  # [B, T, E] after the final norm
    head: Head  # of width E


class Scoring(NamedTuple):
    """How tokens are scored: compile-time constants."""

    temperature: float = 1.0  # the logits of `logp` and `entropy` are divided by it: that of the sampler
    differentiable_entropy: bool = False  # whether `entropy` has a gradient
    divergence: AnyDivergence | None = None  # needs a teacher; a `SparseDivergence` its `TopK`
    top_k: int | None = None  # how many `top_logps`; at most the head's `vocab_size`
    chunk: int = 512  # tokens of a chunk, on each device: the number of logits in memory is chunk * V


_OF_LOGP = Scoring()


@jax.named_scope("head")
def token_scores(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Targets,
    scoring: Scoring = _OF_LOGP,
    *,
    teacher: Teacher | TopK | None = None,
    loss_derivative: LossDerivative | None = None,
    mesh: Mesh | None = None,
) -> Scores:
    """Score every token whose weight is not zero, given the hidden state of the token before it.

    Args:
        hidden: after the final norm, in the compute dtype; products accumulate in float32.
        head: the projection onto the vocabulary. Its gradient is summed in float32.
        targets: the tokens, with their weights.
        scoring: temperatures, and which scores have a gradient.
        teacher: for `scoring.divergence`.
        loss_derivative: that of the loss which will be computed from these scores: the gradient of the head, and with
            several differentiable scores that of `hidden`, is then computed in the forward pass. The gradient of any
            other loss is also correct, but is computed a second time.
        mesh: with the axes of `make_mesh`. Rows are sharded over `ROWS`, the T of hidden states over `CONTEXT`, the
            head's D over `FSDP`, its Vp over tensor.

    Returns:
        Scores: float32 [B, T], 0 where a token is not scored; `top_logps` and `top_ids` [B, T, top_k]. `logp`,
        `divergence`, `top_logps` and, if it is differentiable, `entropy` have first derivatives by `hidden` and `head`,
        in reverse mode.

    Raises ValueError for `supports` with a divergence: the teacher's distribution is over the whole vocabulary.
    """
    tokens, weights, supports = targets
    assert hidden.shape[:2] == tokens.shape == weights.shape, (hidden.shape, tokens.shape, weights.shape)
    assert supports is None or supports.shape[:2] == tokens.shape, (supports.shape, tokens.shape)
    assert (scoring.divergence is None) == (teacher is None), "a divergence needs a teacher"
    assert scoring.top_k is None or scoring.top_k <= head.vocab_size, (scoring.top_k, head.vocab_size)
    if supports is not None and teacher is not None:
        raise ValueError(
            "the signal `supports` restricts the student's distribution to the ids of filtered sampling, and a "
            "divergence compares it with the teacher's over the whole vocabulary: sample without top_k, top_p and min_p"
        )
    plan = Plan(
        temperature=scoring.temperature,
        chunk=scoring.chunk,
        length=tokens.shape[1],
        parts=context_shards(mesh),
        derivative=loss_derivative and loss_derivative.function,
        differentiable_entropy=scoring.differentiable_entropy,
        divergence=scoring.divergence,
        top_k=scoring.top_k,
        sharded=mesh is not None,
    )
    if isinstance(teacher, Teacher):
        teacher = teacher._replace(head=_with_columns(teacher.head, head.columns))
    inputs = (loss_derivative and loss_derivative.rows, loss_derivative and loss_derivative.shared)
    score = functools.partial(_score_rows, plan)
    if mesh is None:
        return score(hidden, head, targets, teacher, *inputs)
    rows, states, replicated = PartitionSpec(ROWS), PartitionSpec(ROWS, CONTEXT), PartitionSpec()
    of_teacher: Any = rows
    if isinstance(teacher, Teacher):
        of_teacher = teacher._replace(hidden=states, head=_head_spec(teacher.head))
    in_specs = (states, _head_spec(head), rows, of_teacher, rows, replicated)
    return jax.shard_map(score, mesh=mesh, in_specs=in_specs, out_specs=rows)(hidden, head, targets, teacher, *inputs)


def _with_columns(head: Head, columns: int) -> Head:
    """The head padded, or cut, to so many columns, which the shards of both vocabularies must agree in."""
    pad = [(0, 0), (0, 0)]
    pad[head.vocab_axis] = (0, max(columns - head.columns, 0))
    weight = lax.slice_in_dim(jnp.pad(head.weight, pad), 0, columns, axis=head.vocab_axis)
    return head if head.columns == columns else replace(head, weight=weight)


def _head_spec(head: Head) -> Any:
    return replace(head, weight=PartitionSpec(*((VOCAB_AXIS, FSDP) if head.transposed else (FSDP, VOCAB_AXIS))))


def _score_rows(
    plan: Plan, hidden: Array, head: Head, targets: Targets, teacher: Teacher | TopK | None, rows: Any, shared: Any
) -> Scores:
    """Shift tokens by one to align them with the hidden states that predict them, score, and shift the scores back."""
    # Each shard of the vocabulary has a part of the hidden states' gradient: the transpose of `varying` sums them.
    hidden = plan.varying(hidden.reshape(-1, hidden.shape[2]))
    plan = plan._replace(chunk=min(plan.chunk, len(hidden)))
    if isinstance(teacher, Teacher):
        teacher = teacher._replace(hidden=teacher.hidden.reshape(-1, teacher.hidden.shape[2]))
    else:
        teacher = jax.tree.map(plan.shift_left, teacher)
    targets = jax.tree.map(plan.shift_left, targets)
    scores = _scores(plan, hidden, head, targets, teacher, (rows, shared))
    return jax.tree.map(lambda x: plan.from_all_parts(plan.shift_right(x)), scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    plan: Plan, hidden: Array, head: Head, targets: Targets, teacher: Teacher | TopK | None, inputs: Any
) -> Scores:
    """hidden [n, D], targets [n] and [n, k], teacher [n, E] -> scores [n]."""
    compact, rows, heads = _prepared(plan, hidden, head, targets, teacher)
    return _expanded(compact, _walk(plan, compact, rows, heads).stats)


def _prepared(
    plan: Plan, hidden: Array, head: Head, targets: Targets, teacher: Teacher | TopK | None
) -> tuple[Compact, TokenRows, Heads]:
    compact, student = Compact.of(targets.weights, plan.chunk), plan.gather(head, hidden.dtype)
    if isinstance(teacher, Teacher):
        rows = TokenRows(hidden, targets.tokens, targets.supports, teacher.hidden)
        return compact, rows, Heads(student, plan.gather(teacher.head, teacher.hidden.dtype))
    return compact, TokenRows(hidden, targets.tokens, targets.supports, teacher), Heads(student)


def _expanded(compact: Compact, stats: Stats) -> Scores:
    names = ("logp", "entropy", "correct", "divergence", "top_logps", "top_ids")
    return jax.tree.map(compact.expand, stats.scores(*names))


class _Walked(NamedTuple):
    """What one walk over all chunks found."""

    stats: Stats  # [M]
    d_hidden: Any = None  # [M, D]: d logp / d hidden; if the plan is joint, the gradient for `cotangents`
    d_head: Any = None  # [D, V] the gradient for `cotangents`
    cotangents: Scores | None = None  # [M] the expected ones


class _Saved(NamedTuple):
    """The residuals of the forward pass."""

    compact: Compact
    rows: TokenRows
    heads: Heads
    walked: _Walked
    like: Head | None  # empty, with the dtype of the parameter; None if the head is not trained


def _scores_fwd(plan: Plan, *primals):
    train_head = primals[1].weight.perturbed
    hidden, head, targets, teacher, inputs = jax.tree.map(lambda primal: primal.value, primals)
    compact, rows, heads = _prepared(plan, hidden, head, targets, teacher)
    function = plan.derivative if plan.joint or train_head else None
    derivative = function and (lambda scores: function(scores, *inputs))
    walked = _walk(plan, compact, rows, heads, derivative, gradients=True, train_head=train_head)
    like = replace(head, weight=head.weight[:0]) if train_head else None
    return _expanded(compact, walked.stats), _Saved(compact, rows, heads, walked, like)


def _scores_bwd(plan: Plan, saved: _Saved, cotangents: Scores):
    compact, rows, heads, walked, like = saved
    no_gradients = (None,) * 3  # of targets, teacher and the inputs of the loss derivative
    given = {name: getattr(cotangents, name) for name in plan.differentiable}
    if all(isinstance(g, SymbolicZero) for g in given.values()):
        return None, None, *no_gradients

    def array(g: Any) -> Array:
        return jnp.zeros_like(compact.weighted, jnp.float32, shape=g.shape) if isinstance(g, SymbolicZero) else g

    g = Scores(**{name: array(g) for name, g in given.items()})

    def or_recomputed(found: Any, recompute: Callable[[], Any]) -> Any:
        expected = walked.cotangents
        return recompute() if expected is None else lax.cond(_agree(compact, g, expected), lambda: found, recompute)

    if plan.joint:
        recompute = functools.partial(_gradients, plan, compact, rows, heads, walked.stats, g, like is not None)
        d_hidden, d_head = or_recomputed((walked.d_hidden, walked.d_head), recompute)
        d_hidden = compact.expand(d_hidden)
    else:
        d_hidden = compact.expand(walked.d_hidden) * plan.varying(g.logp)[:, None].astype(rows.hidden.dtype)
        recompute = functools.partial(_head_gradient, plan, compact, rows, heads, walked.stats.logsumexp, g.logp)
        d_head = None if like is None else or_recomputed(walked.d_head, recompute)
    return d_hidden, like and plan.scatter(d_head, like), *no_gradients


_scores.defvjp(_scores_fwd, _scores_bwd, symbolic_zeros=True)


def _agree(compact: Compact, g: Scores, expected: Scores) -> Array:
    """Whether the cotangents [n] are the expected ones [M]."""

    def close(g: Array, expected: Array) -> Array:
        # Also relative to the largest: a small derivative may be the difference of two large terms.
        error, size = jnp.abs(compact.all_rows(g) - expected), jnp.abs(expected)
        return jnp.all(error <= _TOLERANCE * jnp.maximum(size, 1e-2 * size.max()))

    return functools.reduce(jnp.logical_and, jax.tree.leaves(jax.tree.map(close, g, expected)))


def _walk(
    plan: Plan,
    compact: Compact,
    rows: TokenRows,
    heads: Heads,
    derivative: Callable[[Scores], Scores] | None = None,
    *,
    gradients: bool = False,
    train_head: bool = False,
) -> _Walked:
    """The scores; with `gradients` also those gradients that are known before the backward pass.

    `derivative` gives the expected cotangents as a function of the scores [B, T].
    """
    chunk, size, dtype = plan.chunk, len(compact.source), rows.hidden.dtype
    hidden_gradient = gradients and (derivative is not None or not plan.joint)
    head_gradient = train_head and derivative is not None

    def body(i: Array, walked: _Walked) -> _Walked:
        stats, d_hidden, d_head, cotangents = walked
        these = compact.rows_of_chunk(i, chunk, rows)
        logits = logits_of(plan, heads, these)
        new, p = stats_of(plan, heads, logits)

        def put(old: Array, values: Array) -> Array:
            return lax.dynamic_update_slice(old, values, (i * chunk, *[0] * (values.ndim - 1)))

        g = None
        if derivative is not None:
            # The cotangents of all tokens, of which only those of this chunk, whose scores are known, are used.
            scores = jax.tree.map(
                lambda x: plan.shift_right(compact.put(i, chunk, x)), new.scores(*plan.differentiable)
            )
            g = compact.rows_of_chunk(i, chunk, jax.tree.map(plan.shift_left, derivative(scores)))
            cotangents = jax.tree.map(put, cotangents, g)
        if hidden_gradient:
            if plan.joint:
                assert g is not None
                d_logits, scale = joint_derivative(plan, heads, logits, new, g).astype(dtype), jnp.ones(chunk)
            else:
                d_logits, scale = logp_derivative(p, logits, dtype), g and g.logp
            d_hidden = put(d_hidden, _times_head(d_logits, heads.student))
            if head_gradient:
                assert scale is not None
                d_head += outer(these.hidden, d_logits, scale)
        return _Walked(jax.tree.map(put, stats, new), d_hidden, d_head, cotangents)

    zeros = plan.varying(jnp.zeros(size), TOKEN_AXES)
    divergence = None if plan.divergence is None else DivergenceStats(*[zeros] * len(DivergenceStats._fields))
    top = None
    if plan.top_k is not None:
        kinds, shape = (jnp.int32, jnp.float32), (size, plan.top_k)
        top = TopK(*(plan.varying(jnp.zeros(shape, kind), TOKEN_AXES) for kind in kinds))
    stats = Stats(zeros, zeros, zeros, zeros, divergence, top)
    initial = _Walked(
        stats,
        plan.varying(jnp.zeros((size, rows.hidden.shape[1]), dtype)) if hidden_gradient else None,
        zero_head_gradient(plan, heads.student) if head_gradient else None,
        None if derivative is None else stats.scores(*plan.differentiable),
    )
    return lax.fori_loop(0, compact.num_chunks, body, initial)


def _times_head(d_logits: Float[Array, "C V"], head: Head) -> Float[Array, "C D"]:
    return dot(d_logits, head.weight, 1, head.vocab_axis).astype(d_logits.dtype)


def _head_gradient(plan: Plan, compact: Compact, rows: TokenRows, heads: Heads, logsumexp: Array, g: Array) -> Array:
    """sum_t g[t] * d logp[t] / d head, [D, V] float32, from recomputed logits."""
    chunk = plan.chunk

    def body(i: Array, d_head: Array) -> Array:
        these, scale = compact.rows_of_chunk(i, chunk, (rows, g))
        lse = lax.dynamic_slice(logsumexp, (i * chunk,), (chunk,))
        logits = logits_of(plan, heads, these)
        p = jnp.exp(logits.student - lse[:, None])
        return d_head + outer(these.hidden, logp_derivative(p, logits, these.hidden.dtype), scale)

    return lax.fori_loop(0, compact.num_chunks, body, zero_head_gradient(plan, heads.student))


def _gradients(
    plan: Plan, compact: Compact, rows: TokenRows, heads: Heads, stats: Stats, g: Scores, train_head: bool
) -> tuple[Array, Array | None]:
    """Gradients of hidden [M, D] and head [D, V] for the cotangents [n] of all scores, from recomputed logits."""
    chunk, dtype = plan.chunk, rows.hidden.dtype

    def body(i: Array, carry: tuple) -> tuple:
        d_hidden, d_head = carry
        these, cotangents = compact.rows_of_chunk(i, chunk, (rows, g))
        known = jax.tree.map(lambda each: lax.dynamic_slice_in_dim(each, i * chunk, chunk), stats)
        logits = logits_of(plan, heads, these)
        d_logits = joint_derivative(plan, heads, logits, known, cotangents).astype(dtype)
        d_hidden = lax.dynamic_update_slice(d_hidden, _times_head(d_logits, heads.student), (i * chunk, 0))
        return d_hidden, None if d_head is None else d_head + outer(these.hidden, d_logits, jnp.ones(chunk))

    initial = (
        plan.varying(jnp.zeros((len(compact.source), rows.hidden.shape[1]), dtype)),
        zero_head_gradient(plan, heads.student) if train_head else None,
    )
    return lax.fori_loop(0, compact.num_chunks, body, initial)
