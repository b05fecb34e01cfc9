"""The choice of experts by sigmoids, against its definition one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.nn.config import MoE
from jaxtrain.nn.router import by_sigmoid

PLAIN = MoE(num_experts=12, experts_per_token=3, intermediate_size=8, renormalise=True, scores="sigmoid")
GROUPS = dataclasses.replace(PLAIN, groups=4, groups_per_token=2, weight_scale=2.5, renormalise=False)


def by_definition(logits, balance, moe):
    scores = 1 / (1 + np.exp(-logits))
    ranks = scores + balance
    groups = ranks.reshape(moe.groups, -1)
    used = np.argsort(-np.sort(groups)[:, -2:].sum(1))[: moe.groups_per_token]
    allowed = np.isin(np.arange(len(logits)) // groups.shape[1], used)
    experts = np.argsort(-np.where(allowed, ranks, -np.inf))[: moe.experts_per_token]
    weights = scores[experts]
    return experts, moe.weight_scale * (weights / weights.sum() if moe.renormalise else weights)


@pytest.mark.parametrize("moe", [PLAIN, GROUPS], ids=["plain", "groups"])
def test_experts_and_weights(moe):
    draws = np.random.default_rng(0)
    logits, balance = draws.normal(0, 2, (2, 40, 12)), draws.normal(0, 1, 12)
    choice = by_sigmoid(jnp.asarray(logits, jnp.float32), jnp.asarray(balance, jnp.float32), moe)
    for at in np.ndindex(logits.shape[:2]):
        experts, weights = by_definition(logits[at], balance, moe)
        np.testing.assert_array_equal(choice.experts[at], experts)
        np.testing.assert_allclose(choice.weights[at], weights, rtol=1e-5)
        np.testing.assert_array_equal(np.flatnonzero(choice.chosen[at]), np.sort(experts))
    np.testing.assert_allclose(choice.shares.sum(-1), 1, rtol=1e-5)


def test_the_balance_has_no_gradient_and_the_weights_do_not_hold_it():
    logits, balance = jnp.linspace(-1, 1, 12)[None, None], jnp.linspace(0.5, 0, 12)

    def total(balance, logits):
        return jnp.sum(by_sigmoid(logits, balance, GROUPS).weights ** 2)

    of_balance, of_logits = jax.grad(total, (0, 1))(balance, logits)
    assert not of_balance.any() and of_logits.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 5}, "groups must be of equal size"),
        ({"groups_per_token": 5}, "groups_per_token=5 of groups=4"),
        ({"groups": 12, "groups_per_token": 3}, "a group must have two experts or more"),
        ({"groups_per_token": 1, "experts_per_token": 4}, "experts_per_token=4 from 1 groups of 3"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUPS, **changes)
