"""The choice of experts for every token, from the logits of a router, and its statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from jaxtrain.nn.config import MoE
from jaxtrain.types import Array, Routing

_TINY = 1e-20  # in the sum of the weights that renormalisation divides by


class Choice(NamedTuple):
    """The experts of every token."""

    experts: Array  # [B, T, k] int32
    weights: Array  # [B, T, k] float32
    chosen: Array  # [B, T, E] bool
    shares: Array  # [B, T, E] float32, the scores of all experts as shares that sum to 1


def by_softmax(logits: Float[Array, "B T E"], moe: MoE) -> Choice:
    """The experts with the largest logits, weighted by their softmax."""
    scores, experts = lax.top_k(logits, moe.experts_per_token)
    weights = jnp.exp(scores - jax.nn.logsumexp(scores if moe.renormalise else logits, -1, keepdims=True))
    return Choice(experts, weights, logits >= scores[..., -1:], jax.nn.softmax(logits))


def by_sigmoid(logits: Float[Array, "B T E"], balance: Float[Array, " E"], moe: MoE) -> Choice:
    """The experts with the largest sum of sigmoid and `balance`, weighted by the sigmoid alone, times
    `moe.weight_scale` (https://arxiv.org/abs/2412.19437, section 2.1.2).

    With groups, only experts of the `groups_per_token` groups are chosen whose two best ones have the largest sum.
    `balance` gets no gradient.
    """
    scores = jax.nn.sigmoid(logits)
    ranks = lax.stop_gradient(scores + balance)
    if moe.groups > 1:
        grouped = ranks.reshape(*ranks.shape[:-1], moe.groups, -1)
        best = lax.top_k(grouped, 2)[0].sum(-1)
        used = best >= lax.top_k(best, moe.groups_per_token)[0][..., -1:]
        ranks = jnp.where(used[..., None], grouped, -jnp.inf).reshape(ranks.shape)
    tops, experts = lax.top_k(ranks, moe.experts_per_token)
    weights = jnp.take_along_axis(scores, experts, -1)
    if moe.renormalise:
        weights /= weights.sum(-1, keepdims=True) + _TINY
    shares = scores / (scores.sum(-1, keepdims=True) + _TINY)
    return Choice(experts, weights * moe.weight_scale, ranks >= tops[..., -1:], shares)


def routing_of(logits: Float[Array, "B T E"], choice: Choice, real: Bool[Array, "B T"]) -> Routing:
    """The statistics of one layer: of router logits and the experts chosen, over the tokens that are `real`."""

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(real[..., None], x, 0), (0, 1), dtype=jnp.float32)

    z = jax.nn.logsumexp(logits, -1, keepdims=True) ** 2
    return Routing(total(choice.chosen), total(choice.shares), total(z)[0], total(real[..., None])[0])
