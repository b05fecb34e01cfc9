"""Compares each estimator with its paper's formula in numpy, sample by sample."""

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
    separately_normalised,
    teacher_terms,
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
    grpo, centred, rloo = (first_of(estimator(outcomes(), Settings(1.0, 0.95))) for estimator in estimators)
    for i, reward in enumerate(REWARDS):
        group = REWARDS[GROUPS[i] == GROUPS]
        variance = sum((r - group.mean()) ** 2 for r in group) / (len(group) - 1)
        assert grpo[i] == pytest.approx((reward - group.mean()) / (variance**0.5 + 1e-4), rel=1e-5)
        assert centred[i] == pytest.approx(reward - group.mean(), abs=1e-7)
        others = [REWARDS[j] for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]
        assert rloo[i] == pytest.approx(reward - np.mean(others), rel=1e-5)


def test_scale_batch_divides_by_the_std_of_all_rewards():
    found = first_of(group_normalised(outcomes(), Settings(1.0, 0.95, "batch")))
    for i, reward in enumerate(REWARDS):
        mean = REWARDS[GROUPS[i] == GROUPS].mean()
        assert found[i] == pytest.approx((reward - mean) / (np.std(REWARDS, ddof=1) + 1e-4), rel=1e-5)


def test_gdpo_normalises_each_reward_in_its_group_and_the_sum_over_the_batch():
    wide, narrow = np.array([90.0, -40, 10, 0, 0, 50]), np.array([0.1, 0.2, 0.0, np.nan, 0.4, 0.1])
    rewards = 2 * wide + 0.5 * np.nan_to_num(narrow)
    rewards[2] = np.nan  # its reward was lost
    parts = {"wide": np.where(np.isfinite(rewards), wide, np.nan), "narrow": narrow}
    parts["narrow"][2] = np.nan
    weights = {"wide": 2.0, "narrow": 0.5}
    found = separately_normalised(outcomes(rewards, parts=parts, weights=weights), Settings(1.0, 0.95))
    sums = np.zeros(6)
    for name, part in parts.items():
        for i, value in enumerate(part):
            group = part[(GROUPS[i] == GROUPS) & np.isfinite(part)]
            if np.isfinite(value):
                sums[i] += weights[name] * (value - group.mean()) / (group.std(ddof=1) + 1e-4)
    known = np.delete(sums, 2)
    expected = (sums - known.mean()) / (known.std(ddof=1) + 1e-4)
    expected[2] = 0
    np.testing.assert_allclose(first_of(found), expected, rtol=1e-5)


def test_a_kl_penalty_is_subtracted_from_the_reward():
    penalties = [np.full(n, 0.1) for n in LENGTHS]
    penalised = REWARDS - 0.1 * np.array(LENGTHS)
    for estimator in (group_normalised, leave_one_out):
        actual = first_of(estimator(outcomes(penalties=penalties), Settings(1.0, 0.95)))
        np.testing.assert_allclose(actual, first_of(estimator(outcomes(penalised), Settings(1.0, 0.95))), rtol=1e-5)


ESTIMATORS = [group_normalised, group_centred, leave_one_out, separately_normalised, globally_normalised, gae]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_lost_reward_affects_only_its_sample(estimator):
    values = [np.zeros(n) for n in LENGTHS]
    lost = REWARDS.copy()
    lost[1] = np.nan
    result = estimator(outcomes(lost, values=values), Settings(1.0, 0.95)).advantages
    assert not result[1].any()
    assert all(np.isfinite(advantages).all() for advantages in result)
    if estimator is group_normalised:
        r = np.array([1.0, 0.0])
        assert result[0][0] == pytest.approx((1 - r.mean()) / (r.std(ddof=1) + 1e-4), rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(gamma):
    """A_t = gamma^(T - t) r - beta sum over i >= t of gamma^(i - t) KL_i, normalised over the batch's tokens."""
    penalties = [np.random.default_rng(i).random(n) for i, n in enumerate(LENGTHS)]
    actual = globally_normalised(outcomes(penalties=penalties), Settings(gamma, 0.95)).advantages
    raw = []
    for r, kl in zip(REWARDS, penalties, strict=True):
        n = len(kl)
        raw.append([gamma ** (n - 1 - t) * r - sum(gamma ** (i - t) * kl[i] for i in range(t, n)) for t in range(n)])
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


def test_gae_goes_on_from_the_value_after_a_sample_that_was_cut_off():
    values, last = [np.full(n, 0.5) for n in LENGTHS], np.array([0, 0, 2.0, 0, -1.0, 0])
    returns = gae(outcomes(values=values, last_values=last), Settings(0.9, 1.0)).returns
    assert returns is not None
    for found, reward, after, length in zip(returns, REWARDS, last, LENGTHS, strict=True):
        steps = np.arange(length)[::-1]
        np.testing.assert_allclose(found, 0.9**steps * (reward + 0.9 * after), rtol=1e-5)


def test_gae_steps_over_what_an_environment_wrote():
    """Rewards of turns are at the model's last token before them; the rest of the sample's reward is at the end."""
    mask = np.array([1, 1, 0, 0, 1], bool)
    token_rewards = np.array([0, 0, 0.25, 0, 0])
    values = np.array([0.1, 0.2, 9, 9, 0.3])
    alone = Outcomes(np.array([1.0]), np.array([0]), [mask], [token_rewards], [np.zeros(5)], [values])
    result = gae(alone, Settings(1.0, 1.0))
    assert result.returns is not None
    np.testing.assert_allclose(result.returns[0], [1.0, 1.0, 0, 0, 0.75], rtol=1e-6)
    assert not result.advantages[0][2:4].any()


def test_overlong_penalty_is_dapos_equation_13():
    most, cache = 20480, 4096

    def paper(length):
        if length <= most - cache:
            return 0
        return ((most - cache) - length) / cache if length <= most else -1

    for length in (1, 16384, 16385, 18000, 20480, 30000):
        assert overlong_penalty(length, most, cache) == pytest.approx(paper(length))


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_a_teachers_terms_are_minus_the_discounted_log_ratios_of_the_students_own_tokens(discount):
    """Thinking Machines: the reward of a token is log q - log p, discounted over the tokens that follow."""
    rng = np.random.default_rng(0)
    p, q = ([rng.normal(size=n) for n in LENGTHS] for _ in range(2))
    masks = [rng.random(n) < 0.7 for n in LENGTHS]
    ratios = [theirs - own for theirs, own in zip(q, p, strict=True)]
    found = teacher_terms(ratios, masks, coefficient=2.0, discount=discount)
    for own, theirs, mask, terms in zip(p, q, masks, found, strict=True):
        sampled = np.flatnonzero(mask)
        expected = np.zeros(len(mask))
        for number, token in enumerate(sampled):
            later = sampled[number:]
            expected[token] = -2.0 * sum(discount**n * (own[t] - theirs[t]) for n, t in enumerate(later))
        np.testing.assert_allclose(terms, expected, rtol=1e-6, atol=1e-6)
        assert terms.dtype == np.float32
