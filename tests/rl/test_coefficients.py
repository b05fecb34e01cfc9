"""The coefficients of KL and entropy move towards their targets, from rollout to rollout."""

import json

import pytest

from jaxtrain.objectives.distill import Distill
from jaxtrain.objectives.policies import GRPO
from jaxtrain.rl.coefficients import Coefficients

KL = GRPO(beta=0.1, kl_in="reward", kl_target=0.5)
ENTROPY = GRPO(entropy_coefficient=0.02, entropy_target=1.0, entropy_step=0.01, entropy_max=0.03)


@pytest.mark.parametrize(("kl", "factor"), [(0.5, 1.0), (0.55, 1.01), (5.0, 1.02), (0.45, 0.99), (-3.0, 0.98)])
def test_beta_follows_the_kl_within_a_fifth_of_the_target(kl, factor):
    """Ziegler et al. 2019: beta (1 + 0.1 clip(kl / target - 1, -0.2, 0.2))."""
    coefficients = Coefficients.initial(KL)
    coefficients.update(KL, kl, 1.0)
    assert coefficients.beta == pytest.approx(0.1 * factor) and coefficients.entropy == 0


def test_the_entropy_coefficient_moves_by_steps_within_its_bounds_and_is_off_above_the_target():
    """Skywork-OR1: alpha_k = c_k 1[e_k <= target]; c grows by the step where e_k is at most the target."""
    coefficients, seen = Coefficients.initial(ENTROPY), []
    for entropy in (0.9, 1.0, 0.5, 1.1, 2.0, 2.0, 2.0, 0.5):
        seen.append(ENTROPY.coefficient_at(entropy, coefficients.entropy))
        coefficients.update(ENTROPY, 0.0, entropy)
    assert seen == pytest.approx([0.02, 0.03, 0.03, 0, 0, 0, 0, 0])
    assert coefficients.entropy == pytest.approx(0.01) and coefficients.beta == 0


def test_without_targets_they_stay_and_a_state_is_json():
    fixed = GRPO(beta=0.1, entropy_coefficient=0.02, entropy_target=1.0)
    coefficients = Coefficients.initial(fixed)
    coefficients.update(fixed, 9.0, 0.1)
    assert coefficients == Coefficients(0.1, 0.02)
    other = Coefficients(0.0, 0.0)
    other.set_state(json.loads(json.dumps(coefficients.get_state())))
    assert other == coefficients


def test_a_divergence_from_a_teacher_has_none():
    assert Coefficients.initial(Distill(kind="jsd")) == Coefficients(0.0, 0.0)
