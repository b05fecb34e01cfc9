"""Each estimator against its paper's formula, written down in numpy sample by sample."""

import numpy as np
import pytest

from jaxtrain.rl.advantages import (
    Outcomes,
    Settings,
    gae,
    globally_normalised,
    group_centred,
    group_normalised,
    leave_one_out,
    overlong_penalty,
)

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.25])
GROUPS = np.array([7, 7, 7, 9, 9, 9])
LENGTHS = [2, 3, 1, 4, 2, 3]


def outcomes(rewards=REWARDS, penalties=None, **changes):
    zeros = [np.zeros(n) for n in LENGTHS]
    made = Outcomes(rewards, GROUPS, [np.ones(n, bool) for n in LENGTHS], zeros, penalties or zeros)
    return made._replace(**changes)


def first_of(result):
    for advantages in result.advantages:
        assert (advantages == advantages[0]).all()
    return np.array([advantages[0] for advantages in result.advantages])


def test_group_estimators():
    estimators = (group_normalised, group_centred, leave_one_out)
    grpo, centred, rloo = (first_of(estimator(outcomes(), Settings())) for estimator in estimators)
    for i, reward in enumerate(REWARDS):
        group = REWARDS[GROUPS[i] == GROUPS]
        variance = sum((r - group.mean()) ** 2 for r in group) / (len(group) - 1)
        assert grpo[i] == pytest.approx((reward - group.mean()) / (variance**0.5 + 1e-4), rel=1e-5)
        assert centred[i] == pytest.approx(reward - group.mean(), abs=1e-7)
        others = [REWARDS[j] for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]
        assert rloo[i] == pytest.approx(reward - np.mean(others), rel=1e-5)


def test_a_penalty_of_the_kl_counts_against_the_samples_reward():
    penalties = [np.full(n, 0.1) for n in LENGTHS]
    penalised = REWARDS - 0.1 * np.array(LENGTHS)
    for estimator in (group_normalised, leave_one_out):
        actual = first_of(estimator(outcomes(penalties=penalties), Settings()))
        np.testing.assert_allclose(actual, first_of(estimator(outcomes(penalised), Settings())), rtol=1e-5)


@pytest.mark.parametrize("estimator", [group_normalised, group_centred, leave_one_out, globally_normalised, gae])
def test_a_lost_reward_costs_its_sample_alone(estimator):
    values = [np.zeros(n) for n in LENGTHS]
    lost = REWARDS.copy()
    lost[1] = np.nan
    result = estimator(outcomes(lost, values=values), Settings()).advantages
    assert not result[1].any()
    assert all(np.isfinite(advantages).all() for advantages in result)
    if estimator is group_normalised:
        r = np.array([1.0, 0.0])
        assert result[0][0] == pytest.approx((1 - r.mean()) / (r.std(ddof=1) + 1e-4), rel=1e-5)


def test_reinforce_plus_plus():
    """A_t = r - beta sum over i >= t of KL_i, normalised over the batch's tokens."""
    penalties = [np.random.default_rng(i).random(n) for i, n in enumerate(LENGTHS)]
    actual = globally_normalised(outcomes(penalties=penalties), Settings()).advantages
    raw = [[r - sum(kl[t:]) for t in range(len(kl))] for r, kl in zip(REWARDS, penalties, strict=True)]
    every = np.concatenate(raw)
    for mine, theirs in zip(actual, raw, strict=True):
        np.testing.assert_allclose(mine, (np.array(theirs) - every.mean()) / every.std(), rtol=1e-4, atol=1e-6)


def test_gae_is_the_exponentially_weighted_sum_of_td_errors():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=n) for n in LENGTHS]
    penalties = [rng.random(n) * 0.1 for n in LENGTHS]
    gamma, lam = 0.9, 0.8
    actual = gae(outcomes(penalties=penalties, values=values), Settings(gamma, lam))
    raw = []
    for i, (v, kl) in enumerate(zip(values, penalties, strict=True)):
        n = len(v)
        r = -kl
        r[-1] += REWARDS[i]
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0) - v[t] for t in range(n)]
        raw.append(np.array([sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]))
    every = np.concatenate(raw)
    assert actual.returns is not None
    for mine, returns, theirs, v in zip(actual.advantages, actual.returns, raw, values, strict=True):
        np.testing.assert_allclose(mine, (theirs - every.mean()) / every.std(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(returns, theirs + v, rtol=1e-5)


def test_gae_steps_over_what_an_environment_wrote():
    """Turn rewards reach the model's last token before them; the rest of the sample's reward comes at the end."""
    mask = np.array([1, 1, 0, 0, 1], bool)
    token_rewards = np.array([0, 0, 0.25, 0, 0])
    values = np.array([0.1, 0.2, 9, 9, 0.3])
    alone = Outcomes(np.array([1.0]), np.array([0]), [mask], [token_rewards], [np.zeros(5)], [values])
    result = gae(alone, Settings(1.0, 1.0))
    assert result.returns is not None
    np.testing.assert_allclose(result.returns[0], [1.0, 1.0, 0, 0, 0.75], rtol=1e-6)
    assert not result.advantages[0][2:4].any()


def test_overlong_punishment_is_dapos_equation_13():
    most, cache = 20480, 4096

    def paper(length):
        if length <= most - cache:
            return 0
        return ((most - cache) - length) / cache if length <= most else -1

    for length in (1, 16384, 16385, 18000, 20480, 30000):
        assert overlong_penalty(length, most, cache) == pytest.approx(paper(length))
