"""The KL divergence between the policy and its reference, estimated from the tokens sampled."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Float

from jaxtrain.types import Array

Estimate = Literal["k1", "k2", "k3"]


def divergence(kind: Estimate, logp: Float[Array, "*tokens"], ref: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Estimates of KL(policy || reference) from samples of the policy: Schulman 2020, "Approximating KL Divergence".

    k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r, with r = p_ref / p. Also for numpy arrays.
    """
    log_ratio = ref - logp
    match kind:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio**2 / 2
        case "k3":
            return jnp.expm1(log_ratio) - log_ratio


def check_kl_in_loss(kind: Estimate, bias_correction: bool) -> None:
    """Raise ValueError for an estimate whose gradient is not that of a KL.

    With y drawn from the policy p, what a loss descends is the mean over y of the derivative of the estimate at y:

        k1           0: the mean of d log p is 0, whatever the reference is
        k2           the gradient of KL(p || reference)
        k3           the gradient of KL(reference || p)
        k1, k3 times p / p_old, differentiated with it: the gradient of KL(p || reference); also off policy, for samples
            of p_old. DeepSeek-V3.2 (arXiv:2512.02556) has it so with k3.
    """
    if kind == "k1" and not bias_correction:
        raise ValueError(
            "kl=k1 in the loss has an expected gradient of 0 with kl_bias_correction=false: use true (the default), or "
            "kl_in=reward"
        )
    if kind == "k2" and bias_correction:
        raise ValueError(
            "kl=k2 needs kl_bias_correction=false, since it has the gradient of KL(policy || reference) without it; "
            "true is for k1 and k3"
        )
