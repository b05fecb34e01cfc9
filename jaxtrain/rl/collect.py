"""Collects scored groups of samples, with dynamic sampling and the overlong penalty; computes TRL's metrics."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.config.rl import RLSection
from jaxtrain.rl.advantages import group_statistics, overlong_penalty, samples_needed
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.failures import LostRewardGuard
from jaxtrain.rl.rollouts import LOST_REWARD, Prompt, Sampler, Scorer, Trajectory
from jaxtrain.train.agree import gather_values

log = logging.getLogger(__name__)

OVERLONG = "overlong"  # the name of DAPO's soft overlong penalty among the parts of a reward


class Collected(NamedTuple):
    # Of all processes, those of others in outline. Groups are contiguous; samples that must not train are `left_out`.
    trajectories: list[Trajectory]
    metrics: dict[str, float]
    prompts: int  # number of prompts that were drawn


class LengthLimits(NamedTuple):
    """The maximum lengths of a sample, to which the overlong penalty is relative."""

    completion: int  # tokens of the model, in all turns
    conversation: int | None = None  # with an environment: tokens of prompt and completion, the environment's included


def length_limits(section: RLSection, max_length: int) -> LengthLimits:
    """The limits of samples in rows of `max_length` tokens."""
    environment = section.environment
    if environment is None:
        return LengthLimits(section.max_completion_length)
    return LengthLimits(section.max_completion_length * environment.max_turns, environment.max_length(max_length))


class ScoredGroup(NamedTuple):
    """The samples of a prompt, with rewards and penalties."""

    samples: list[Trajectory]
    useful: bool  # for dynamic sampling: not all its rewards are equal


class Collector:
    """Callable: returns the trajectories of one step. All processes call it together.

    Dynamic sampling (DAPO, arXiv:2503.14476): groups whose rewards are all equal have no advantages and are replaced in
    up to `algorithm.max_refills` further rounds. The comparison uses the rewards before the overlong penalty, which
    would otherwise distinguish samples that are all right or all wrong by their lengths. A step may have fewer groups
    than requested; if none is left, it has those of the last round without loss, so that its metrics are defined.
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
        limits: LengthLimits,
        deal: Deal = Deal(),  # noqa: B008 - immutable
    ):
        """`draw(n)` returns the next n prompts, the same on all processes, or fewer if they are exhausted."""
        self._draw, self._scorer, self._limits = draw, scorer, limits
        self.sampler, self.algorithm, self.deal = sampler, algorithm, deal
        self.prompts, self.samples = prompts, samples  # of a step, and of a prompt
        self._guard = LostRewardGuard(samples_needed(algorithm.advantages))
        self._exhausted = False

    def __call__(self) -> Collected | None:
        """Returns None if the prompts are exhausted. Raises ValueError if all rewards are lost repeatedly."""
        kept: list[list[Trajectory]] = []
        seen: list[Trajectory] = []
        groups: list[ScoredGroup] = []
        times = dict.fromkeys(("time/rollout", "time/reward"), 0.0)
        rounds = 0
        while len(kept) < self.prompts and rounds <= self.algorithm.max_refills:
            prompts = self.next_prompts(self.prompts - len(kept))
            if not prompts:
                break
            rounds += 1
            start = time.perf_counter()
            sampled = self.deal.sample(self.sampler, prompts, self.samples)
            middle = time.perf_counter()
            groups = self.groups(self.deal.share(self.score(sampled)))
            times["time/rollout"] += middle - start
            times["time/reward"] += time.perf_counter() - middle
            seen += [t for group in groups for t in group.samples]
            kept += [group.samples for group in groups if group.useful]
        if not seen:
            return None
        times = {name: max(each[name] for each in gather_values(times)) for name in times}  # of the slowest process
        refilled = {"dynamic_sampling/rounds": float(rounds)} if self.algorithm.max_refills else {}
        return self.collected(seen, kept, [group.samples for group in groups], times | refilled)

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next prompts, or fewer if they are exhausted, which is logged once."""
        prompts = self._draw(count)
        if len(prompts) < count and not self._exhausted:
            self._exhausted = True
            log.warning(
                "the prompts are exhausted after all `epochs` of data.train: the run ends after the current samples, "
                "even before train.steps"
            )
        return prompts

    def score(self, sampled: Sequence[Trajectory]) -> list[Trajectory]:
        """The samples of this process with their rewards."""
        return [_checked(t) for t in self._scorer(sampled)]

    def groups(self, scored: Sequence[Trajectory]) -> list[ScoredGroup]:
        """The groups of contiguous samples with rewards, of which some are useless for dynamic sampling."""
        starts = range(0, len(scored), self.samples)
        groups = [scored[start : start + self.samples] for start in starts]
        every = self.algorithm.max_refills == 0
        return [ScoredGroup([self._shaped(t) for t in group], every or _is_mixed(group)) for group in groups]

    def collected(
        self,
        seen: Sequence[Trajectory],
        kept: Sequence[Sequence[Trajectory]],
        last: Sequence[Sequence[Trajectory]],
        metrics: dict[str, float],
    ) -> Collected:
        """The samples of a step, of all processes, with metrics beside the given ones.

        `seen`: all whose rewards are known since the step before; `kept`: the groups that train; `last`: those that
        take their place if there is none. Raises ValueError if all rewards are lost repeatedly.
        """
        no_signal = self._guard.check(seen)
        metrics = rollout_metrics(seen) | metrics | {"rewards/no_signal": float(no_signal)}
        drawn = len(seen) // self.samples
        if self.algorithm.max_refills:
            metrics["dynamic_sampling/dropped_groups"] = drawn - len(kept)
        if not kept:  # only dynamic sampling drops groups
            return Collected([t._replace(left_out=True) for group in last for t in group], metrics, drawn)
        return Collected([t._replace(left_out=not self._trains(t)) for group in kept for t in group], metrics, drawn)

    def _shaped(self, t: Trajectory) -> Trajectory:
        """Add DAPO's soft overlong penalty to the reward of a sample that is close to its limits."""
        share = self.algorithm.overlong_cache
        lengths = [(int(t.loss_mask.sum()), self._limits.completion)]
        if self._limits.conversation is not None:
            lengths.append((len(t.completion_ids), self._limits.conversation - len(t.prompt.ids)))
        penalties = [
            overlong_penalty(length, limit, cache) for length, limit in lengths if (cache := round(share * limit)) > 0
        ]
        if not penalties:
            return t
        return t._replace(rewards={**t.rewards, OVERLONG: min(penalties)}, reward=t.reward + min(penalties))

    def _trains(self, t: Trajectory) -> bool:
        """Not if it has no reward or no token of the model, or if DAPO's overlong filter is on and it was cut off."""
        filtered = self.algorithm.overlong_filter and t.truncated
        return bool(np.isfinite(t.reward) and t.loss_mask.any()) and not filtered


def check_generations(algorithm: Algorithm, generations: int) -> None:
    """Raises ValueError if a group of `generations` samples can never have an advantage."""
    needed = samples_needed(algorithm.advantages)
    if generations < needed:
        raise ValueError(
            f"rl.generations={generations}: advantages are relative to the other samples of a prompt, so those of a "
            "single sample are 0: use rl.generations of 2 or more, or an algorithm that compares prompts "
            "(rl.algorithm=reinforce++ or ppo)"
        )
    if algorithm.max_refills and generations < 2:
        raise ValueError(
            f"rl.generations={generations} with rl.algorithm.max_refills={algorithm.max_refills}: dynamic sampling "
            "drops groups with equal rewards, which a group of one sample always has: use rl.generations of 2 or more"
        )


def _checked(t: Trajectory) -> Trajectory:
    """Count a non-finite reward as lost, whichever scorer returned it."""
    if np.isfinite(t.reward):
        return t
    info = t.info if LOST_REWARD in t.info else {**t.info, LOST_REWARD: f"the reward is {t.reward}"}
    return t._replace(reward=float("nan"), info=info)


def _is_mixed(group: Sequence[Trajectory]) -> bool:
    rewards = np.array([t.reward for t in group])
    rewards = rewards[np.isfinite(rewards)]
    return len(rewards) > 1 and float(np.ptp(rewards)) > 0


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """TRL's metrics over all samples, and `rewards/lost_fraction`.

    `frac_reward_zero_std` is the share of samples whose group has equal rewards, two or more of them. Statistics of
    rewards exclude samples without a reward.
    """
    rewards = np.array([t.reward for t in trajectories])
    groups = np.array([t.prompt.number for t in trajectories])
    _, std, count = group_statistics(rewards, groups)
    lengths = np.array([t.loss_mask.sum() for t in trajectories], float)
    truncated = np.array([t.truncated for t in trajectories])
    terminated = lengths[~truncated] if not truncated.all() else np.zeros(1)
    metrics = {
        "reward": _mean(rewards),
        "reward_std": _std(rewards),
        "frac_reward_zero_std": float(((std < 1e-8) & (count > 1)).mean()),
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
        metrics[f"rewards/{name}/mean"] = _mean(part)
        metrics[f"rewards/{name}/std"] = _std(part)
    return metrics


def _std(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
