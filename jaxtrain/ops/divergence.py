"""Divergences between the next-token distributions of a student and a teacher, and their derivatives.

With the logits z of the student and t of the teacher, both divided by the temperature, p = softmax(z), q = softmax(t)
and m = beta q + (1 - beta) p:

    forward_kl  KL(q || p) = sum q (log q - log p)          d / d z = p - q
    reverse_kl  KL(p || q) = sum p (log p - log q)          d / d z = p (log p - log q - KL(p || q))
    jsd         beta KL(q || m) + (1 - beta) KL(p || m)     d / d z = (1 - beta) p (log p - log m - KL(p || m))

The last one is the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649). The teacher
has no gradient.

A `SparseDivergence` knows only the log q of k columns K. The others are one bucket of probability q_r = 1 - sum_K q and
p_r = 1 - sum_K p, as in TRL's server distillation (`_add_tail_bucket`):

    sum_K q (log q - log p) + q_r (log q_r - log p_r)       d / d z = p - q in K, p - q_r p / p_r elsewhere
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxtrain.objectives.objective import Divergence, SparseDivergence
from jaxtrain.types import Array

AnyDivergence = Divergence | SparseDivergence
UNKNOWN = -1e30  # in place of log q where only the top k are known

_LEAST = 1e-37
_LEAST_REST = 1e-7  # as TRL: q_r is rounding noise where the top k have all of the probability

Reduce = Callable[[Callable[..., Array], Array], Array]


class DivergenceStats(NamedTuple):
    """The divergence of tokens, and what its derivative needs beside the logits: [C] float32."""

    value: Array
    student: Array  # log(sum(exp(z)))
    teacher: Array  # log(sum(exp(t))); log q_r if only the top k are known
    excess: Array  # KL(p || q), or KL(p || m) of jsd; 0 of forward_kl; log p_r if only the top k are known


def divergence_stats(
    of: AnyDivergence, z: Float[Array, "C V"], t: Float[Array, "C V"], reduce: Reduce
) -> DivergenceStats:
    """`t` are log q, or `UNKNOWN`, for a `SparseDivergence`. `reduce(lax.psum or lax.pmax, x)` combines what the shards
    of the vocabulary have."""

    def logsumexp(x: Array) -> Array:
        top = reduce(lax.pmax, x.max(1))
        return top + jnp.log(reduce(lax.psum, jnp.exp(x - top[:, None]).sum(1)))

    def total(terms: Array) -> Array:
        return reduce(lax.psum, terms.sum(1))

    student = logsumexp(z)
    if isinstance(of, SparseDivergence):
        known, q = t > UNKNOWN / 2, jnp.exp(t)
        q_known = total(q)
        log_q_rest = jnp.log(jnp.maximum(1 - q_known, _LEAST_REST))
        log_p_rest = logsumexp(jnp.where(known, UNKNOWN, z)) - student
        value = total(jnp.where(known, q * (t - z), 0)) + q_known * student
        return DivergenceStats(value + jnp.exp(log_q_rest) * (log_q_rest - log_p_rest), student, log_q_rest, log_p_rest)
    teacher = logsumexp(t)
    p, q = jnp.exp(z - student[:, None]), jnp.exp(t - teacher[:, None])
    # The logits are subtracted directly, which needs fewer arrays [C, V] than both log-probabilities.
    if of.kind == "forward_kl":
        value = total(q * (t - z)) + student - teacher
        return DivergenceStats(value, student, teacher, jnp.zeros_like(value))
    if of.kind == "reverse_kl":
        value = total(p * (z - t)) + teacher - student
        return DivergenceStats(value, student, teacher, value)
    log_p, log_q = z - student[:, None], t - teacher[:, None]
    log_m = _log_mixture(of, p, q)
    excess = total(p * (log_p - log_m))
    return DivergenceStats(of.beta * total(q * (log_q - log_m)) + (1 - of.beta) * excess, student, teacher, excess)


def divergence_derivative(
    of: AnyDivergence, z: Float[Array, "C V"], t: Float[Array, "C V"], stats: DivergenceStats
) -> Float[Array, "C V"]:
    """d divergence / d z."""
    _, student, teacher, excess = (each[:, None] for each in stats)
    p = jnp.exp(z - student)
    if isinstance(of, SparseDivergence):
        return p - jnp.exp(jnp.where(t > UNKNOWN / 2, t, teacher + (z - student - excess)))
    if of.kind == "forward_kl":
        return p - jnp.exp(t - teacher)
    if of.kind == "reverse_kl":
        return p * (z - t + (teacher - student - excess))
    return (1 - of.beta) * p * (z - student - _log_mixture(of, p, jnp.exp(t - teacher)) - excess)


def _log_mixture(of: Divergence, p: Array, q: Array) -> Array:
    """Finite where both probabilities underflow to 0, since it is multiplied by these."""
    return jnp.log(jnp.maximum((1 - of.beta) * p + of.beta * q, _LEAST))
