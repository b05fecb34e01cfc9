"""Auxiliary losses and metrics of the routers of a mixture of experts."""

import jax.numpy as jnp
from jaxtyping import Float

from jaxtrain.nn.config import MoE, RouterLoss
from jaxtrain.types import Array, Mean, Routing


def router_loss(routing: Routing, moe: MoE, weights: RouterLoss) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The weighted sum of both losses of a (micro)batch, and metrics, weighted by its tokens that are not padding.

    `aux_loss` is the load-balancing loss of Switch Transformer (https://arxiv.org/abs/2101.03961, equations 4 to 6)
    over all layers together, as transformers' `load_balancing_loss_func` has it: E times the dot product of the
    experts' shares of the tokens and their mean probabilities; the number of experts per token where balanced.
    `router_z_loss` keeps router logits small (https://arxiv.org/abs/2202.08906, equation 5).
    `expert_load_max` is the largest load of an expert over the load of each expert in balance, averaged over layers.
    """
    tokens = routing.tokens[0]
    rows = jnp.maximum(jnp.sum(routing.tokens), 1)
    shares, probabilities = jnp.sum(routing.load, 0) / rows, jnp.sum(routing.probability, 0) / rows
    balance = moe.num_experts * jnp.vdot(shares, probabilities)
    z = jnp.sum(routing.z) / rows
    balanced = jnp.maximum(tokens, 1) * moe.experts_per_token / moe.num_experts
    metrics = {
        "aux_loss": Mean(balance * tokens, tokens),
        "router_z_loss": Mean(z * tokens, tokens),
        "expert_load_max": Mean(jnp.mean(jnp.max(routing.load, 1)) / balanced * tokens, tokens),
    }
    return weights.balance * balance + weights.z * z, metrics
