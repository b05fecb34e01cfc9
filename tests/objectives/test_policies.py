from dataclasses import fields
from inspect import isabstract

import jax
import numpy as np
import pytest

from jaxtrain.objectives import policies
from jaxtrain.objectives.policies import CISPO, ClippedPolicy
from jaxtrain.objectives.policy import PolicyObjective, Tokens

NAMED = [each for each in vars(policies).values() if isinstance(each, type) and issubclass(each, PolicyObjective)]
ADVANTAGES = np.array([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]], np.float32)
RATIOS = np.array([[0.5, 1.0, 3.0, 0.5, 1.0, 3.0]], np.float32)


def derivative(objective):
    """Of the surrogate's sum by the log-probabilities, at the ratios."""

    def total(logp):
        ones = np.ones_like(ADVANTAGES)
        return objective.surrogate(Tokens(logp, logp, ADVANTAGES, ones, ones.astype(np.int32), ones)).sum()

    return jax.grad(total)(np.log(RATIOS))


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    expected = np.where([[1, 1, 0, 0, 1, 1]], -RATIOS * ADVANTAGES, 0)
    np.testing.assert_allclose(derivative(ClippedPolicy()), expected, rtol=1e-5)


def test_a_dual_clip_bounds_the_loss_of_negative_advantages():
    expected = np.where([[1, 1, 0, 0, 1, 0]], -RATIOS * ADVANTAGES, 0)
    np.testing.assert_allclose(derivative(ClippedPolicy(dual_clip=2.0)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"dual_clip=1\.0 must be more than 1"):
        ClippedPolicy(dual_clip=1.0)


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    expected = -np.minimum(RATIOS, 1 + 1.5) * ADVANTAGES
    np.testing.assert_allclose(derivative(CISPO(epsilon_high=1.5)), expected, rtol=1e-5)


@pytest.mark.parametrize("named", [each for each in NAMED if not isabstract(each)], ids=lambda each: each.__name__)
def test_every_named_objective_is_a_frozen_value_that_requests_log_probabilities(named):
    objective = named(temperature=0.5)
    assert hash(objective) == hash(named(temperature=0.5)) and objective != named()
    assert objective.needs[0].temperature == 0.5
    assert ("ref_logps" in objective.signals) == (objective.beta > 0 and objective.kl_in == "loss")
    assert {"epsilon_low", "epsilon_high"} <= {field.name for field in fields(named)}
