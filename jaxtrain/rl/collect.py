"""From prompts to scored groups, with dynamic sampling; and what TRL says of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.rl.advantages import group_statistics, overlong_penalty
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.rollouts import Prompt, Sampler, Scorer, Trajectory

OVERLONG = "overlong"  # the reward part that DAPO's soft punishment becomes


class Collected(NamedTuple):
    trajectories: list[Trajectory]  # groups stand together; those that must not train have no loss mask left
    metrics: dict[str, float]
    prompts: int  # drawn for this


class Collect:
    """Callable: the trajectories of one step.

    Dynamic sampling (DAPO, arXiv:2503.14476): groups whose rewards are all alike teach nothing and are replaced by
    others, in at most `algorithm.max_refills` rounds. If groups are missing even then, the step has fewer; if all are,
    it has those of the last round, so that its metrics are not of nothing.
    """

    def __init__(
        self,
        take: Callable[[int], list[Prompt]],
        sampler: Sampler,
        scorer: Scorer,
        algorithm: Algorithm,
        *,
        prompts: int,
        samples: int,
        max_completion_length: int,
    ):
        self._take, self._sampler, self._scorer, self._algorithm = take, sampler, scorer, algorithm
        self._prompts, self._samples, self._most = prompts, samples, max_completion_length

    def __call__(self) -> Collected | None:
        """None where the prompts have run dry."""
        kept: list[list[Trajectory]] = []
        seen: list[Trajectory] = []
        latest: list[list[Trajectory]] = []
        times = dict.fromkeys(("time/rollout", "time/reward"), 0.0)
        rounds = asked = 0
        while len(kept) < self._prompts and rounds <= self._algorithm.max_refills:
            drawn = self._take(self._prompts - len(kept))
            if not drawn:
                break
            rounds, asked = rounds + 1, asked + len(drawn)
            start = time.perf_counter()
            groups = self._sampler.sample(drawn, self._samples)
            middle = time.perf_counter()
            scored = self._shape(self._scorer([t for group in groups for t in group]))
            times["time/rollout"] += middle - start
            times["time/reward"] += time.perf_counter() - middle
            seen += scored
            latest = [scored[at : at + self._samples] for at in range(0, len(scored), self._samples)]
            kept += [group for group in latest if self._algorithm.max_refills == 0 or _is_mixed(group)]
        if not seen:
            return None
        metrics = rollout_metrics(seen) | times
        if self._algorithm.max_refills:
            dropped = len(seen) // self._samples - len(kept)
            metrics |= {"dynamic_sampling/rounds": rounds, "dynamic_sampling/dropped_groups": dropped}
        trajectories = [self._masked(t) for group in kept or latest for t in group]
        return Collected(trajectories, metrics, asked)

    def _shape(self, scored: Sequence[Trajectory]) -> list[Trajectory]:
        """DAPO's soft punishment of what nearly fills the limit, as a part of the reward."""
        cache = round(self._algorithm.overlong_cache * self._most)
        if not cache:
            return list(scored)
        shaped = []
        for t in scored:
            penalty = overlong_penalty(int(t.loss_mask.sum()), self._most, cache)
            shaped.append(t._replace(rewards={**t.rewards, OVERLONG: penalty}, reward=t.reward + penalty))
        return shaped

    def _masked(self, t: Trajectory) -> Trajectory:
        """A sample without a reward teaches nothing; nor, under DAPO's overlong filter, does one that was cut off."""
        if np.isfinite(t.reward) and not (self._algorithm.overlong_filter and t.truncated):
            return t
        return t._replace(loss_mask=np.zeros_like(t.loss_mask))


def _is_mixed(group: Sequence[Trajectory]) -> bool:
    rewards = np.array([t.reward for t in group])
    rewards = rewards[np.isfinite(rewards)]
    return len(rewards) > 1 and float(np.ptp(rewards)) > 0


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """TRL's, over all that was sampled. `reward_std` is the mean of the groups'; lost samples count nowhere."""
    rewards = np.array([t.reward for t in trajectories])
    groups = np.array([t.prompt.number for t in trajectories])
    _, std, _ = group_statistics(rewards, groups)
    _, firsts = np.unique(groups, return_index=True)
    lengths = np.array([t.loss_mask.sum() for t in trajectories], float)
    cut_off = np.array([t.truncated for t in trajectories])
    ended = lengths[~cut_off] if not cut_off.all() else np.zeros(1)
    metrics = {
        "reward": _mean(rewards),
        "reward_std": float(std[firsts].mean()),
        "frac_reward_zero_std": float((std[firsts] == 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
        "completions/clipped_ratio": float(cut_off.mean()),
    }
    for name in sorted({name for t in trajectories for name in t.rewards}):
        part = np.array([t.rewards.get(name, np.nan) for t in trajectories])
        known = part[np.isfinite(part)]
        metrics[f"rewards/{name}/mean"] = _mean(part)
        metrics[f"rewards/{name}/std"] = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return metrics


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
