"""The reward of a trajectory: the weighted sum of what reward functions and its environment say."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.config.rollouts import RewardSection
from jaxtrain.rl.environments import PART
from jaxtrain.rl.reward_models import RewardModel
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.rollouts import Trajectory


class RewardScorer:
    """A `Scorer`: reward functions in a pool, reward models, and the part that an environment has given.

    A sample that a function, its environment or the sampler failed on has the reward NaN, as has one to which no part
    applies: it must not train.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        pool: RewardPool,
        environment_weight: float = 1.0,
        models: Sequence[RewardModel] = (),
    ):
        self._weights = {reward.name: reward.weight for reward in [*rewards, *models]} | {PART: environment_weight}
        self._pool, self._models = pool, models
        self._counts: Counter[str] = Counter()

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
            broken = ~np.isfinite(scores.parts[model.name])
            scores.failures[model.name, "not_finite"] += int(broken.sum())
            scores.lost[broken] = True
        seconds = time.perf_counter() - start
        for (name, kind), count in (+scores.failures).items():
            self._counts[f"rewards/{name}/{kind}"] += count
        scored = []
        for index, t in enumerate(trajectories):
            parts = dict(t.rewards) | {name: float(part[index]) for name, part in scores.parts.items()}
            known = [self._weights[name] * part for name, part in parts.items() if not math.isnan(part)]
            lost = bool(scores.lost[index]) or "error" in t.info or not known
            self._counts["rewards/lost"] += lost
            reward = math.nan if lost else math.fsum(known)
            # Weighted as their sum is, so that the tokens' rewards stay a share of the sample's.
            by_token = None if t.token_rewards is None else self._weights[PART] * t.token_rewards
            timings = {**t.timings, "reward": seconds}
            scored.append(t._replace(rewards=parts, reward=reward, token_rewards=by_token, timings=timings))
        return scored

    def metrics(self) -> dict[str, float]:
        """Samples lost since the last call: `rewards/lost` in all, `rewards/<function>/<kind of failure>`."""
        counts, self._counts = self._counts, Counter()
        return {"rewards/lost": 0.0} | {name: float(count) for name, count in counts.items()}


def _completion(trajectory: Trajectory) -> Any:
    """In TRL's form: messages where the prompt is a conversation, else a string."""
    if "messages" in trajectory.info:
        return trajectory.info["messages"]
    if isinstance(trajectory.prompt.columns.get("prompt"), str):
        return trajectory.text
    return [{"role": "assistant", "content": trajectory.text}]


def conversation_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How conversations went: turns, tool calls (a trajectory), failed ones (a call), samples lost to an error, a
    time limit included."""
    led = [t.info for t in trajectories if "turns" in t.info]
    if not led:
        return {}
    calls = sum(info["tool_calls"] for info in led)
    return {
        "environment/turns": float(np.mean([info["turns"] for info in led])),
        "environment/errors": float(sum("error" in info for info in led)),
        "environment/timeouts": float(sum(info.get("timed_out", False) for info in led)),
        "tools/call_frequency": calls / len(led),
        "tools/failure_frequency": sum(info["tool_failures"] for info in led) / max(calls, 1),
    }
