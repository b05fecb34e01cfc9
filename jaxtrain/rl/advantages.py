"""From rewards to advantages: numpy, on the host, a few numbers per sample.

An estimator is a function `(Outcomes, Settings) -> Advantages`. Samples without a reward (NaN: their reward
function hung or raised, or none applied) are left out of all statistics and get advantages of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Outcomes(NamedTuple):
    """The results of n samples. Arrays [C] run over a sample's completion."""

    rewards: np.ndarray  # [n] float64 of a sample, an environment's included; NaN where there is none
    groups: np.ndarray  # [n] int, the prompt's number, which samples of a prompt share
    masks: Sequence[np.ndarray]  # n of [C] bool, the model's own tokens
    token_rewards: Sequence[np.ndarray]  # n of [C], the part of the reward that belongs to a token; mostly 0
    penalties: Sequence[np.ndarray]  # n of [C], beta times the KL estimate where the KL belongs to the reward; else 0
    values: Sequence[np.ndarray] | None = None  # n of [C], the critic's, of the state before the token


class Settings(NamedTuple):
    """The numbers that estimators need."""

    gamma: float = 1.0
    lam: float = 0.95


class Advantages(NamedTuple):
    advantages: list[np.ndarray]  # n of [C] float32
    returns: list[np.ndarray] | None = None  # n of [C] float32, targets of the critic


Estimator = Callable[[Outcomes, Settings], Advantages]


def group_normalised(outcomes: Outcomes, settings: Settings) -> Advantages:
    """(r - mean) / (std + 1e-4) within the group, unbiased std: GRPO, Shao et al. 2024 (arXiv:2402.03300)."""
    totals = _totals(outcomes)
    mean, std, _ = group_statistics(totals, outcomes.groups)
    return _same_for_all_tokens(outcomes, (totals - mean) / (std + 1e-4))


def group_centred(outcomes: Outcomes, settings: Settings) -> Advantages:
    """r - mean within the group, not divided: Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783)."""
    totals = _totals(outcomes)
    mean, _, _ = group_statistics(totals, outcomes.groups)
    return _same_for_all_tokens(outcomes, totals - mean)


def leave_one_out(outcomes: Outcomes, settings: Settings) -> Advantages:
    """r minus the mean of the group's other samples: RLOO, Ahmadian et al. 2024 (arXiv:2402.14740).

    A sample alone in its group has no baseline and gets 0.
    """
    totals = _totals(outcomes)
    mean, _, count = group_statistics(totals, outcomes.groups)
    return _same_for_all_tokens(outcomes, (totals - mean) * count / np.maximum(count - 1, 1))


def globally_normalised(outcomes: Outcomes, settings: Settings) -> Advantages:
    """The return from each token on, normalised over all tokens of the batch: REINFORCE++, Hu 2025 (arXiv:2501.03262).

    A_t = r - sum over i >= t of beta KL_i, then (A - mean) / std. No critic, no groups.
    """
    raw = []
    for index, mask in enumerate(outcomes.masks):
        rewards = _rewards_of_steps(outcomes, index)
        returns = np.zeros(len(mask))
        returns[mask] = np.cumsum(rewards[::-1])[::-1]
        raw.append(returns)
    return Advantages(_normalised(raw, outcomes))


def gae(outcomes: Outcomes, settings: Settings) -> Advantages:
    """Generalised advantage estimates, normalised over the batch, and the critic's targets: PPO with a critic.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V: Schulman et al. 2015
    (arXiv:1506.02438). The steps are the model's own tokens; what an environment writes between them is state.
    """
    assert outcomes.values is not None, "GAE needs a critic"
    raw, returns = [], []
    for index, mask in enumerate(outcomes.masks):
        rewards, values = _rewards_of_steps(outcomes, index), outcomes.values[index][mask].astype(np.float64)
        following = np.append(values[1:], 0)
        deltas = rewards + settings.gamma * following - values
        estimates, carried = np.zeros(len(deltas)), 0.0
        for step in reversed(range(len(deltas))):
            carried = deltas[step] + settings.gamma * settings.lam * carried
            estimates[step] = carried
        advantages, target = np.zeros(len(mask)), np.zeros(len(mask))
        advantages[mask], target[mask] = estimates, estimates + values
        raw.append(advantages)
        returns.append(target.astype(np.float32))
    return Advantages(_normalised(raw, outcomes), returns)


_GROUP_RELATIVE = (group_normalised, group_centred, leave_one_out)


def samples_needed(estimator: Estimator) -> int:
    """How many samples of a group must have a reward for any of them to have an advantage other than 0."""
    return 2 if estimator in _GROUP_RELATIVE else 1


def group_statistics(totals: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, unbiased standard deviation and number of the rewards in each sample's group, [n] each; NaN is left out."""
    mean, std, count = np.zeros((3, len(totals)))
    for group in np.unique(groups):
        members = groups == group
        known = totals[members & np.isfinite(totals)]
        count[members] = len(known)
        mean[members] = known.mean() if len(known) else 0
        std[members] = known.std(ddof=1) if len(known) > 1 else 0
    return mean, std, count


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """DAPO's soft overlong punishment, equation 13 of Yu et al. 2025 (arXiv:2503.14476).

    0 up to `limit - cache` tokens, then falling to -1 at `limit`.
    """
    return -min(max(length - (limit - cache), 0) / cache, 1.0)


def _totals(outcomes: Outcomes) -> np.ndarray:
    """[n]: rewards, less the KL penalty of all of a sample's tokens."""
    return outcomes.rewards - np.array([float(penalty.sum()) for penalty in outcomes.penalties])


def _same_for_all_tokens(outcomes: Outcomes, advantages: np.ndarray) -> Advantages:
    known = np.where(np.isfinite(advantages), advantages, 0)  # a sample without a reward has none
    return Advantages([(mask * value).astype(np.float32) for mask, value in zip(outcomes.masks, known, strict=True)])


def _rewards_of_steps(outcomes: Outcomes, index: int) -> np.ndarray:
    """Rewards [steps] of the model's own tokens: what an environment gave, less the penalties, the rest at the end.

    A reward at a token of the environment's goes to the model's last token before it.
    """
    mask, given = outcomes.masks[index], outcomes.token_rewards[index].astype(np.float64)
    steps = int(mask.sum())
    rewards = -outcomes.penalties[index][mask].astype(np.float64)
    total = outcomes.rewards[index]
    if not steps or not np.isfinite(total):
        return np.zeros(steps)
    np.add.at(rewards, np.maximum(np.cumsum(mask) - 1, 0), given)
    rewards[-1] += total - given.sum()
    return rewards


def _normalised(raw: list[np.ndarray], outcomes: Outcomes) -> list[np.ndarray]:
    """(A - mean) / std over the model's own tokens of all samples that have a reward; 0 for those that have none."""
    counted = [mask & np.isfinite(r) for mask, r in zip(outcomes.masks, outcomes.rewards, strict=True)]
    every = np.concatenate([a[mask] for a, mask in zip(raw, counted, strict=True)])
    mean, std = (every.mean(), every.std()) if len(every) else (0.0, 0.0)
    return [
        np.where(mask, (values - mean) / (std + 1e-8), 0).astype(np.float32)
        for values, mask in zip(raw, counted, strict=True)
    ]
