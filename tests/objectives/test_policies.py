from dataclasses import dataclass, fields
from inspect import isabstract

import jax
import numpy as np
import pytest

from jaxtrain.objectives import policies
from jaxtrain.objectives.policies import CISPO, ClippedPolicy
from jaxtrain.objectives.policy import PolicyObjective, Tokens
from jaxtrain.types import Batch, Norm, Scores

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


def score_gradients(objective, advantages):
    """Of the loss by the scores, for two samples of three tokens close to the old policy."""
    rng = np.random.default_rng(0)
    logp, noise, sampler, ref, entropy = rng.normal(size=(5, 1, 6)).astype(np.float32)
    old = logp + 1e-5 * noise  # within all bounds
    ids, ones = np.array([[1, 1, 1, 2, 2, 2]], np.int32), np.ones((1, 6), np.float32)
    signals = {"advantages": advantages, "sampler_logps": sampler, "old_logps": old, "ref_logps": ref}
    signals |= {"entropy_coefficients": ones, "top_entropy": ones, "versions": np.zeros((1, 6), np.int32)}
    batch, norm = Batch(ids, ids, ids, ones, signals, ids, None), Norm(6.0, 2.0, 2.0, 6.0)
    return jax.grad(lambda logp, entropy: objective(Scores(logp=logp, entropy=entropy), batch, norm)[0], (0, 1))(
        logp, entropy
    )


@pytest.mark.parametrize("named", [each for each in NAMED if not isabstract(each)], ids=lambda each: each.__name__)
def test_where_zeros_may_be_left_out_they_have_no_gradient(named):
    objective = named() if named(beta=0.0).beta == named().beta else named(kl_in="reward")
    assert objective.zeros_have_no_gradient
    advantages = np.array([[0, 0, 0, 1.0, 1.0, 1.0]], np.float32)
    logp, entropy = score_gradients(objective, advantages)
    assert not logp[:, :3].any() and logp[:, 3:].any() and not entropy.any()


@pytest.mark.parametrize("changes", [{"beta": 0.1}, {"entropy_coefficient": 0.1}], ids=lambda each: next(iter(each)))
def test_a_kl_or_an_entropy_bonus_keeps_the_zeros(changes):
    objective = policies.GRPO(**changes)
    assert not objective.zeros_have_no_gradient
    assert any(part.any() for part in score_gradients(objective, np.zeros((1, 6), np.float32)))
    assert not policies.GRPO(top_entropy=0.5).zeros_have_no_gradient  # the quantile is of all tokens


def test_a_class_with_its_own_surrogate_says_itself_whether_zeros_may_be_left_out():
    @dataclass(frozen=True, kw_only=True)
    class Own(ClippedPolicy):
        def surrogate(self, tokens):
            return super().surrogate(tokens) - 0.1 * tokens.logp

    @dataclass(frozen=True, kw_only=True)
    class Said(Own):
        proportional = True

    @dataclass(frozen=True, kw_only=True)
    class Renamed(ClippedPolicy):
        more: float = 1.0

    assert not Own().zeros_have_no_gradient and Said().zeros_have_no_gradient and Renamed().zeros_have_no_gradient
