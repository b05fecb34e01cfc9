"""Advantage estimators, in numpy on the host.

An estimator is a function `(Outcomes, Settings) -> Advantages`. Samples without a reward (NaN: their reward function
failed, or none applied) are excluded from all statistics and get advantages of 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Outcomes(NamedTuple):
    """The results of n samples. Arrays [C] run over a sample's completion."""

    rewards: np.ndarray  # [n] float64, including those of an environment; NaN if lost
    groups: np.ndarray  # [n] int, the number of the sample's prompt
    masks: Sequence[np.ndarray]  # n of [C] bool, the model's tokens
    token_rewards: Sequence[np.ndarray]  # n of [C], the part of the reward assigned to a token; mostly 0
    penalties: Sequence[np.ndarray]  # n of [C], beta times the KL estimate if the KL is part of the reward; else 0
    values: Sequence[np.ndarray] | None = None  # n of [C], the critic's value of the state before the token
    last_values: np.ndarray | None = None  # [n], its value of the state after a sample that was cut off; else 0
    # [n] each, whose sum by `weights` is `rewards`; NaN if a part does not apply to a sample
    parts: Mapping[str, np.ndarray] = {}
    weights: Mapping[str, float] = {}  # of the parts


class Settings(NamedTuple):
    """The hyperparameters of estimators."""

    gamma: float
    lam: float
    scale: Literal["group", "batch"] = "group"


class Advantages(NamedTuple):
    advantages: list[np.ndarray]  # n of [C] float32
    returns: list[np.ndarray] | None = None  # n of [C] float32, targets of the critic


Estimator = Callable[[Outcomes, Settings], Advantages]


def group_normalised(outcomes: Outcomes, settings: Settings) -> Advantages:
    """(r - mean) / (std + 1e-4) within the group, unbiased std: GRPO, Shao et al. 2024 (arXiv:2402.03300).

    With scale=batch the std is that of all rewards: Liu et al. 2025, "Tricks or Traps?" (arXiv:2508.08221).
    """
    totals = _totals(outcomes)
    mean, std, _ = group_statistics(totals, outcomes.groups)
    if settings.scale == "batch":
        _, std, _ = group_statistics(totals, np.zeros_like(outcomes.groups))
    return _same_for_all_tokens(outcomes, (totals - mean) / (std + 1e-4))


def separately_normalised(outcomes: Outcomes, settings: Settings) -> Advantages:
    """The sum of the weighted rewards, each normalised in its group, then normalised over the batch.

    GDPO, Liu et al. 2026 (arXiv:2601.05242): sum_k w_k (r_k - mean_k) / (std_k + 1e-4) = a, then (a - mean) / (std +
    1e-4), so that a reward with a wide range does not hide the others. One that does not apply to a sample counts 0.
    """
    total = np.zeros_like(outcomes.rewards)
    for name, part in outcomes.parts.items():
        mean, std, _ = group_statistics(part, outcomes.groups)
        total += outcomes.weights[name] * np.nan_to_num((part - mean) / (std + 1e-4))
    total = np.where(np.isfinite(outcomes.rewards), total, np.nan)
    mean, std, _ = group_statistics(total, np.zeros_like(outcomes.groups))
    return _same_for_all_tokens(outcomes, (total - mean) / (std + 1e-4))


def group_centred(outcomes: Outcomes, settings: Settings) -> Advantages:
    """r - mean within the group, without division by std: Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783)."""
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

    A_t = sum over i >= t of gamma^(i - t) r_i, where r_i is -beta KL_i, with the reward added at the last token; then
    (A - mean) / std. No critic, no groups.
    """
    raw = []
    for index, mask in enumerate(outcomes.masks):
        returns = np.zeros(len(mask))
        returns[mask] = _discounted(_rewards_of_steps(outcomes, index), settings.gamma)
        raw.append(returns)
    return Advantages(_normalised(raw, outcomes))


def gae(outcomes: Outcomes, settings: Settings) -> Advantages:
    """Generalised advantage estimates, normalised over the batch, and the critic's targets: PPO with a critic.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V: Schulman et al. 2015
    (arXiv:1506.02438). The steps are the model's tokens; an environment's tokens between them are part of the state.
    The value after the last token is 0, or that of `last_values`.
    """
    assert outcomes.values is not None, "GAE needs a critic"
    raw, returns = [], []
    for index, mask in enumerate(outcomes.masks):
        rewards, values = _rewards_of_steps(outcomes, index), outcomes.values[index][mask].astype(np.float64)
        following = np.append(values[1:], 0 if outcomes.last_values is None else outcomes.last_values[index])
        deltas = rewards + settings.gamma * following[: len(values)] - values
        estimates = _discounted(deltas, settings.gamma * settings.lam)
        advantages, target = np.zeros(len(mask)), np.zeros(len(mask))
        advantages[mask], target[mask] = estimates, estimates + values
        raw.append(advantages)
        returns.append(target.astype(np.float32))
    return Advantages(_normalised(raw, outcomes), returns)


_GROUP_RELATIVE = (group_normalised, group_centred, leave_one_out, separately_normalised)


def samples_needed(estimator: Estimator | None) -> int:
    """The minimum number of samples with a reward in a group for advantages other than 0."""
    return 2 if estimator in _GROUP_RELATIVE else 1


def group_statistics(totals: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, unbiased standard deviation and count of the rewards in each sample's group, [n] each; NaN is ignored."""
    mean, std, count = np.zeros((3, len(totals)))
    for group in np.unique(groups):
        members = groups == group
        known = totals[members & np.isfinite(totals)]
        count[members] = len(known)
        # Equal rewards are their mean exactly, so that their advantages are 0 and not a rounding error.
        mean[members] = (known[0] if np.ptp(known) == 0 else known.mean()) if len(known) else 0
        std[members] = known.std(ddof=1) if len(known) > 1 else 0
    return mean, std, count


def teacher_terms(
    log_ratios: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, coefficient: float, discount: float
) -> list[np.ndarray]:
    """What a teacher adds to the advantages: n of [C] float32, 0 where the mask is.

    coefficient * sum over i >= t of discount^(i - t) (log q_i - log p_i), over a sample's own tokens: minus the
    estimate of the reverse KL from the student p to the teacher q. "On-Policy Distillation", Thinking Machines 2025.

    Args:
        log_ratios: n of [C], log q - log p of each token.
        masks: n of [C] bool, the model's tokens that are trained.
    """
    terms = []
    for ratio, mask in zip(log_ratios, masks, strict=True):
        term = np.zeros(len(mask), np.float32)
        term[mask] = coefficient * _discounted(ratio[mask].astype(np.float64), discount)
        terms.append(term)
    return terms


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """DAPO's soft overlong penalty, equation 13 of Yu et al. 2025 (arXiv:2503.14476).

    0 up to `limit - cache` tokens, then decreasing linearly to -1 at `limit`.
    """
    return -min(max(length - (limit - cache), 0) / cache, 1.0)


def _totals(outcomes: Outcomes) -> np.ndarray:
    """[n]: rewards minus the KL penalty of all of a sample's tokens."""
    return outcomes.rewards - np.array([float(penalty.sum()) for penalty in outcomes.penalties])


def _discounted(values: np.ndarray, factor: float) -> np.ndarray:
    """At t, the sum over i >= t of factor^(i - t) values_i."""
    sums, carried = np.zeros(len(values)), 0.0
    for step in reversed(range(len(values))):
        carried = values[step] + factor * carried
        sums[step] = carried
    return sums


def _same_for_all_tokens(outcomes: Outcomes, advantages: np.ndarray) -> Advantages:
    known = np.where(np.isfinite(advantages), advantages, 0)  # a sample without a reward has none
    return Advantages([(mask * value).astype(np.float32) for mask, value in zip(outcomes.masks, known, strict=True)])


def _rewards_of_steps(outcomes: Outcomes, index: int) -> np.ndarray:
    """Rewards [steps] of the model's tokens: token rewards minus penalties; the rest of the reward is at the end.

    A reward at a token of the environment is assigned to the model's last token before it.
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
    """(A - mean) / std over the model's tokens of all samples with a reward; 0 for samples without one."""
    counted = [mask & np.isfinite(r) for mask, r in zip(outcomes.masks, outcomes.rewards, strict=True)]
    every = np.concatenate([a[mask] for a, mask in zip(raw, counted, strict=True)])
    mean, std = (every.mean(), every.std()) if len(every) else (0.0, 0.0)
    return [
        np.where(mask, (values - mean) / (std + 1e-8), 0).astype(np.float32)
        for values, mask in zip(raw, counted, strict=True)
    ]
