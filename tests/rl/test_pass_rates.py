"""pass@k and maj@k are the shares over all subsets, and the majority's rewards."""

import itertools

import numpy as np
import pytest

from jaxtrain.rl.pass_rates import pass_rates

REWARDS = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], float)
TEXTS = np.array(
    [
        ["The answer is 4", "5", "It is 5", "6"],
        ["#### 8", "8", "9", "8.0"],
        ["none", "nothing", "none", "x"],
        ["2", "so 3", "#### 3", "1"],
    ],
    object,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    metrics = pass_rates("right", REWARDS, TEXTS)
    for k in (1, 2, 4):
        each = [np.mean([max(subset) for subset in itertools.combinations(row, k)]) for row in REWARDS]
        assert metrics[f"right/pass@{k}"] == pytest.approx(np.mean(each))
        assert metrics[f"right/pass@{k}_std_error"] == pytest.approx(np.std(each, ddof=1) / 2)
    assert metrics["right"] == pytest.approx(REWARDS.mean())


def test_the_majority_of_final_numbers_or_texts():
    assert pass_rates("right", REWARDS, TEXTS)["right/maj@4"] == pytest.approx(np.mean([0, 1, 0, 1]))


def test_lost_rewards_and_rewards_that_are_no_verdicts():
    lost = REWARDS.copy()
    lost[0, 2] = np.nan
    assert pass_rates("r", lost, TEXTS)["r"] == pytest.approx(REWARDS[1:].mean())
    assert pass_rates("r", REWARDS * 0.5, TEXTS).keys() == {"r", "r_std_error"}
    assert pass_rates("r", np.full((1, 2), np.nan), TEXTS[:1, :2]) == {}
