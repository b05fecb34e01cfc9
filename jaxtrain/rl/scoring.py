"""The reward of a trajectory: the weighted sum of reward functions, reward models and its environment's rewards."""

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxtrain.config.rl_parts import RewardSection
from jaxtrain.rl.environments import MAX_REWARD, REWARD_PART
from jaxtrain.rl.failures import FailureLog
from jaxtrain.rl.reward_models import RewardModel
from jaxtrain.rl.reward_pool import Failure, RewardPool
from jaxtrain.rl.rollouts import EXTRA, LOST_REWARD, Trajectory
from jaxtrain.train.agree import gather_values, on_all


class RewardScorer:
    """A `Scorer`: reward functions in a pool, reward models, and the rewards of environments.

    A reward is lost (NaN, with the reason in `info[LOST_REWARD]`) if a function, a model, the environment or the
    sampler failed on the sample, if no part applies to it, or if the sum is not finite. They do not train.

    All processes call it together, each with its own samples, unless `together` is False.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        pool: RewardPool,
        environment_weight: float = 1.0,
        models: Sequence[RewardModel] = (),
        max_steps: int | None = None,
        *,
        together: bool = True,
        workers: int | None = None,
    ):
        """`max_steps`: optimizer steps of the run, which functions may read in `trainer_state`.

        `together`: False for a thread of each process that scores when it likes to, without models of several devices.
        `workers`: processes of the pool that a call uses at a time at most.
        """
        self.weights = {reward.name: reward.weight for reward in [*rewards, *models]} | {
            REWARD_PART: environment_weight
        }
        self._pool, self._models = pool, models
        self._counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}
        self._counting = threading.Lock()  # of another thread than that which asks for metrics
        self._max_steps, self._together, self._workers = max_steps, together, workers
        self._log = FailureLog()

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        start = time.perf_counter()
        columns = dict.fromkeys(name for t in trajectories for name in t.prompt.columns if name != "prompt")
        prompts = [t.prompt.columns.get("prompt") for t in trajectories]
        completions = [_completion(t) for t in trajectories]
        ids = [t.completion_ids[t.loss_mask].tolist() for t in trajectories]
        given: dict[str, Sequence[Any]] = {name: [t.prompt.columns.get(name) for t in trajectories] for name in columns}
        state = {
            "global_step": max((int(t.versions.max(initial=0)) for t in trajectories), default=0),
            "max_steps": self._max_steps,
        }
        score = partial(self._pool.score, prompts, completions, ids, given, state, self._workers)
        scores = on_all(score) if self._together else score()
        for model in self._models:
            scores.parts[model.name] = model(trajectories)
            for index in np.flatnonzero(~np.isfinite(scores.parts[model.name])).tolist():
                scores.failures[model.name, "not_finite"] += 1
                scores.reasons.setdefault(index, f"{model.name}: not finite: {scores.parts[model.name][index]}")
                scores.parts[model.name][index] = np.nan
        seconds = time.perf_counter() - start
        scored: list[Trajectory] = []
        all_reasons: list[str] = []
        lost = 0
        for index, t in enumerate(trajectories):
            parts = dict(t.rewards) | {name: float(part[index]) for name, part in scores.parts.items()}
            reward, problem = self._total(parts)
            # The first error counts: the functions saw only a part of a conversation that failed.
            reasons = [reason for reason in (_error(t), scores.reasons.get(index)) if reason]
            if problem and not reasons:
                reasons.append(problem)
            lost += bool(reasons)
            all_reasons += reasons
            # Weighted like their sum, so that the rewards of tokens remain parts of the sample's reward.
            by_token = None if t.token_rewards is None else self.weights[REWARD_PART] * t.token_rewards
            info = {**t.info, LOST_REWARD: reasons[0]} if reasons else t.info
            if scores.extra:
                info = {**info, EXTRA: {column: given[index] for column, given in scores.extra.items()}}
            scored.append(
                t._replace(
                    rewards=parts,
                    reward=math.nan if reasons else reward,
                    token_rewards=by_token,
                    timings={**t.timings, "reward": seconds},
                    info=info,
                )
            )
        self._log.report(all_reasons, len(scored))
        self._count(scores.metrics, scores.failures, lost)
        return scored

    def _count(
        self, metrics: Mapping[str, tuple[float, int]], failures: Mapping[tuple[str, Failure], int], lost: int
    ) -> None:
        """Count for `metrics`."""
        with self._counting:
            for name, (total, number) in metrics.items():
                before, counted = self._logged.get(name, (0.0, 0))
                self._logged[name] = before + total, counted + number
            for (name, kind), count in failures.items():
                self._counts[f"rewards/{name}/{kind}"] += count
            self._counts["rewards/lost"] += lost

    def _total(self, parts: Mapping[str, float]) -> tuple[float, str]:
        """The weighted sum of the parts that apply, or why there is none."""
        if not parts:
            return 0.0, ""  # only a teacher judges the samples
        known = [self.weights[name] * part for name, part in parts.items() if not math.isnan(part)]
        if not known:
            return math.nan, f"{', '.join(parts)}: None: no reward applies to the sample"
        total = float(sum(known))
        if not abs(total) <= MAX_REWARD:
            return math.nan, f"{', '.join(parts)}: not finite: the weighted sum is {total}"
        return total, ""

    def metrics(self) -> dict[str, float]:
        """Of the samples of all processes since the last call: the means of what functions gave to `log_metric`, under
        its names; `rewards/lost` samples in total, and `rewards/<function>/<kind of failure>`.

        All processes call it together.
        """
        with self._counting:
            counts, self._counts = self._counts, Counter()
            logged, self._logged = self._logged, {}
        totals: Counter[str] = Counter({"rewards/lost": 0})
        sums: dict[str, tuple[float, int]] = {}
        for their_counts, their_logged in gather_values((counts, logged)):
            totals.update(their_counts)
            for name, (total, number) in their_logged.items():
                before, counted = sums.get(name, (0.0, 0))
                sums[name] = before + total, counted + number
        means = {name: total / number for name, (total, number) in sums.items()}
        return means | {name: float(count) for name, count in totals.items()}


def _error(trajectory: Trajectory) -> str:
    """The error of the environment or the sampler, or an empty string."""
    if "error" not in trajectory.info:
        return ""
    return f"{REWARD_PART if 'turns' in trajectory.info else 'sampler'}: {trajectory.info['error']}"


def _completion(trajectory: Trajectory) -> Any:
    """The completion in TRL's format: messages if the prompt is a conversation, else a string."""
    if "messages" in trajectory.info:
        return trajectory.info["messages"]
    if isinstance(trajectory.prompt.columns.get("prompt"), str):
        return trajectory.text
    return [{"role": "assistant", "content": trajectory.text}]


def conversation_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Metrics of conversations: turns and tool calls per trajectory, failures per call, errors and timeouts."""
    infos = [t.info for t in trajectories if "turns" in t.info]
    if not infos:
        return {}
    calls = sum(info["tool_calls"] for info in infos)
    return {
        "environment/turns": float(np.mean([info["turns"] for info in infos])),
        "environment/errors": float(sum("error" in info for info in infos)),
        "environment/timeouts": float(sum(info.get("timed_out", False) for info in infos)),
        "tools/call_frequency": calls / len(infos),
        "tools/failure_frequency": sum(info["tool_failures"] for info in infos) / max(calls, 1),
    }
