"""The reward of a trajectory: the weighted sum of what reward functions, reward models and its environment give."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.config.rollouts import RewardSection
from jaxtrain.rl.environments import MAX_REWARD, REWARD_PART
from jaxtrain.rl.failures import FailureLog
from jaxtrain.rl.reward_models import RewardModel
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.rollouts import LOST_REWARD, Trajectory


class RewardScorer:
    """A `Scorer`: reward functions in a pool, reward models, and the part that an environment has given.

    A sample is lost, with the reward NaN and the reason in `info[LOST_REWARD]`, where a function, a model, its
    environment or the sampler failed on it, where no part applies to it, and where the sum is not finite: it must not
    train.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        pool: RewardPool,
        environment_weight: float = 1.0,
        models: Sequence[RewardModel] = (),
    ):
        self._weights = {reward.name: reward.weight for reward in [*rewards, *models]} | {
            REWARD_PART: environment_weight
        }
        self._pool, self._models = pool, models
        self._counts: Counter[str] = Counter()
        self._log = FailureLog()

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        start = time.perf_counter()
        columns = dict.fromkeys(name for t in trajectories for name in t.prompt.columns if name != "prompt")
        scores = self._pool.score(
            [t.prompt.columns.get("prompt") for t in trajectories],
            [_completion(t) for t in trajectories],
            [t.completion_ids[t.loss_mask].tolist() for t in trajectories],
            {name: [t.prompt.columns.get(name) for t in trajectories] for name in columns},
        )
        for model in self._models:
            scores.parts[model.name] = model(trajectories)
            for index in np.flatnonzero(~np.isfinite(scores.parts[model.name])).tolist():
                scores.failures[model.name, "not_finite"] += 1
                scores.reasons.setdefault(index, f"{model.name}: not finite: {scores.parts[model.name][index]}")
                scores.parts[model.name][index] = np.nan
        seconds = time.perf_counter() - start
        for (name, kind), count in (+scores.failures).items():
            self._counts[f"rewards/{name}/{kind}"] += count
        scored: list[Trajectory] = []
        all_reasons: list[str] = []
        for index, t in enumerate(trajectories):
            parts = dict(t.rewards) | {name: float(part[index]) for name, part in scores.parts.items()}
            reward, problem = self._total(parts)
            # What happened first counts: of a conversation that broke off, the functions saw only a part.
            reasons = [reason for reason in (_error(t), scores.reasons.get(index)) if reason]
            if problem and not reasons:
                reasons.append(problem)
            self._counts["rewards/lost"] += bool(reasons)
            all_reasons += reasons
            # Weighted as their sum is, so that the tokens' rewards stay a share of the sample's.
            by_token = None if t.token_rewards is None else self._weights[REWARD_PART] * t.token_rewards
            info = {**t.info, LOST_REWARD: reasons[0]} if reasons else t.info
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
        return scored

    def _total(self, parts: Mapping[str, float]) -> tuple[float, str]:
        """The weighted sum of the parts that apply, or why there is none."""
        known = [self._weights[name] * part for name, part in parts.items() if not math.isnan(part)]
        if not known:
            return math.nan, f"{', '.join(parts)}: None: no reward applies to the sample"
        total = float(sum(known))
        if not abs(total) <= MAX_REWARD:
            return math.nan, f"{', '.join(parts)}: not finite: the weighted sum is {total}"
        return total, ""

    def metrics(self) -> dict[str, float]:
        """Samples lost since the last call: `rewards/lost` in all, `rewards/<function>/<kind of failure>`."""
        counts, self._counts = self._counts, Counter()
        return {"rewards/lost": 0.0} | {name: float(count) for name, count in counts.items()}


def _error(trajectory: Trajectory) -> str:
    """What the environment or the sampler failed on, if they did."""
    if "error" not in trajectory.info:
        return ""
    return f"{REWARD_PART if 'turns' in trajectory.info else 'sampler'}: {trajectory.info['error']}"


def _completion(trajectory: Trajectory) -> Any:
    """In TRL's form: messages where the prompt is a conversation, else a string."""
    if "messages" in trajectory.info:
        return trajectory.info["messages"]
    if isinstance(trajectory.prompt.columns.get("prompt"), str):
        return trajectory.text
    return [{"role": "assistant", "content": trajectory.text}]


def conversation_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Of conversations: turns and tool calls per trajectory, failures per call, and samples lost to an error."""
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
