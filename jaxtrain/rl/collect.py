"""From prompts to scored groups of samples, with dynamic sampling and the overlong punishment; and TRL's metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.config.rl import RLSection
from jaxtrain.rl.advantages import group_statistics, overlong_penalty, samples_needed
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.failures import LostRewardGuard
from jaxtrain.rl.rollouts import LOST_REWARD, Prompt, Sampler, Scorer, Trajectory

log = logging.getLogger(__name__)

OVERLONG = "overlong"  # the name of DAPO's soft punishment among the parts of a reward


class Collected(NamedTuple):
    trajectories: list[Trajectory]  # groups are contiguous; those that must not train have an empty loss mask
    metrics: dict[str, float]
    prompts: int  # drawn for this


class Limits(NamedTuple):
    """Where a sample is cut off, which the overlong punishment is measured against."""

    completion: int  # tokens of the model, in all turns
    conversation: int | None = None  # with an environment: tokens of prompt and completion, the environment's included


def limits_of(section: RLSection, max_length: int) -> Limits:
    """The limits of samples in rows of `max_length` tokens."""
    environment = section.environment
    if environment is None:
        return Limits(section.max_completion_length)
    return Limits(section.max_completion_length * environment.max_turns, environment.max_length(max_length))


class Collector:
    """Callable: the trajectories of one step.

    Dynamic sampling (DAPO, arXiv:2503.14476): groups whose rewards are all equal have no advantages and are replaced by
    others, in at most `algorithm.max_refills` rounds. The rewards compared are those before the overlong punishment,
    since a group that is all right or all wrong would otherwise pass by its lengths. A step may end up with fewer
    groups; if none is left it consists of those of the last round, without loss, so that its metrics are defined.
    """

    def __init__(
        self,
        draw: Callable[[int], list[Prompt]],
        sampler: Sampler,
        scorer: Scorer,
        algorithm: Algorithm,
        *,
        prompts: int,
        samples: int,
        limits: Limits,
    ):
        """`draw(n)` returns the next n prompts, fewer where they are exhausted."""
        self._draw, self._sampler, self._scorer, self._algorithm = draw, sampler, scorer, algorithm
        self._prompts, self._samples, self._limits = prompts, samples, limits
        self._guard = LostRewardGuard(samples_needed(algorithm.advantages))
        self._exhausted = False

    def __call__(self) -> Collected | None:
        """None where the prompts are exhausted. Raises ValueError where every reward is lost, time after time."""
        kept: list[list[Trajectory]] = []
        seen: list[Trajectory] = []
        groups: list[list[Trajectory]] = []
        times = dict.fromkeys(("time/rollout", "time/reward"), 0.0)
        rounds = drawn = 0
        while len(kept) < self._prompts and rounds <= self._algorithm.max_refills:
            prompts = self._next_prompts(self._prompts - len(kept))
            if not prompts:
                break
            rounds, drawn = rounds + 1, drawn + len(prompts)
            start = time.perf_counter()
            sampled = self._sampler.sample(prompts, self._samples)
            middle = time.perf_counter()
            scored = [_checked(t) for t in self._scorer([t for group in sampled for t in group])]
            times["time/rollout"] += middle - start
            times["time/reward"] += time.perf_counter() - middle
            useful = [self._algorithm.max_refills == 0 or _is_mixed(group) for group in self._grouped(scored)]
            shaped = [self._shaped(t) for t in scored]
            groups = self._grouped(shaped)
            seen += shaped
            kept += [group for group, use in zip(groups, useful, strict=True) if use]
        if not seen:
            return None
        no_signal = self._guard.check(seen)
        metrics = rollout_metrics(seen) | times | {"rewards/no_signal": float(no_signal)}
        if self._algorithm.max_refills:
            dropped = len(seen) // self._samples - len(kept)
            metrics |= {"dynamic_sampling/rounds": rounds, "dynamic_sampling/dropped_groups": dropped}
        if not kept:  # only dynamic sampling drops groups
            return Collected([_without_loss(t) for group in groups for t in group], metrics, drawn)
        return Collected([self._masked(t) for group in kept for t in group], metrics, drawn)

    def _next_prompts(self, count: int) -> list[Prompt]:
        prompts = self._draw(count)
        if len(prompts) < count and not self._exhausted:
            self._exhausted = True
            log.warning(
                "the prompts are exhausted: all `epochs` of data.train are over, so the run ends after the samples "
                "that were drawn, even where that is before train.steps"
            )
        return prompts

    def _grouped(self, trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
        starts = range(0, len(trajectories), self._samples)
        return [list(trajectories[start : start + self._samples]) for start in starts]

    def _shaped(self, t: Trajectory) -> Trajectory:
        """With DAPO's soft punishment of a sample that nearly fills its limits, as a part of the reward."""
        share = self._algorithm.overlong_cache
        lengths = [(int(t.loss_mask.sum()), self._limits.completion)]
        if self._limits.conversation is not None:
            lengths.append((len(t.completion_ids), self._limits.conversation - len(t.prompt.ids)))
        penalties = [
            overlong_penalty(length, limit, cache) for length, limit in lengths if (cache := round(share * limit)) > 0
        ]
        if not penalties:
            return t
        return t._replace(rewards={**t.rewards, OVERLONG: min(penalties)}, reward=t.reward + min(penalties))

    def _masked(self, t: Trajectory) -> Trajectory:
        """Without loss where the sample has no reward or, under DAPO's overlong filter, was cut off."""
        if np.isfinite(t.reward) and not (self._algorithm.overlong_filter and t.truncated):
            return t
        return _without_loss(t)


def check_generations(algorithm: Algorithm, generations: int) -> None:
    """Raises ValueError where a group of so many samples can never have an advantage."""
    needed = samples_needed(algorithm.advantages)
    if generations < needed:
        raise ValueError(
            f"rl.generations={generations}: advantages are relative to the other samples of a prompt, so with a single "
            "sample all are 0 and nothing is trained: use rl.generations of 2 or more, or an algorithm that compares "
            "prompts (rl.algorithm=reinforce++ or ppo)"
        )
    if algorithm.max_refills and generations < 2:
        raise ValueError(
            f"rl.generations={generations} with rl.max_refills={algorithm.max_refills}: dynamic sampling drops groups "
            "whose rewards are equal, which a single sample always is: use rl.generations of 2 or more"
        )


def _checked(t: Trajectory) -> Trajectory:
    """A reward that is not finite is no reward, whichever scorer gave it."""
    if np.isfinite(t.reward):
        return t
    info = t.info if LOST_REWARD in t.info else {**t.info, LOST_REWARD: f"the reward is {t.reward}"}
    return t._replace(reward=float("nan"), info=info)


def _without_loss(t: Trajectory) -> Trajectory:
    return t._replace(loss_mask=np.zeros_like(t.loss_mask))


def _is_mixed(group: Sequence[Trajectory]) -> bool:
    rewards = np.array([t.reward for t in group])
    rewards = rewards[np.isfinite(rewards)]
    return len(rewards) > 1 and float(np.ptp(rewards)) > 0


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """TRL's, over all that was sampled, and `rewards/lost_fraction`.

    `reward_std` is the mean over groups. Samples without a reward are left out of the reward's statistics.
    """
    rewards = np.array([t.reward for t in trajectories])
    groups = np.array([t.prompt.number for t in trajectories])
    _, std, _ = group_statistics(rewards, groups)
    _, firsts = np.unique(groups, return_index=True)
    lengths = np.array([t.loss_mask.sum() for t in trajectories], float)
    truncated = np.array([t.truncated for t in trajectories])
    terminated = lengths[~truncated] if not truncated.all() else np.zeros(1)
    metrics = {
        "reward": _mean(rewards),
        "reward_std": float(std[firsts].mean()),
        "frac_reward_zero_std": float((std[firsts] == 0).mean()),
        "rewards/lost_fraction": float((~np.isfinite(rewards)).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(terminated.mean()),
        "completions/min_terminated_length": float(terminated.min()),
        "completions/max_terminated_length": float(terminated.max()),
        "completions/clipped_ratio": float(truncated.mean()),
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
