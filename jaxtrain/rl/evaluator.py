"""Held-out evaluation of a policy: the rewards of its greedy answers, or of its conversations with an environment."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxtrain.data.prompts import held_out_prompts
from jaxtrain.data.sources import Row
from jaxtrain.rl.rollouts import Prompt, Sampler, Scorer, Trajectory
from jaxtrain.rl.sampler import trajectory_of
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.evaluators import greedy_completions
from jaxtrain.session.session import Metrics, Session

_FIRST = 1 << 31  # numbers of held-out prompts, above those of all training prompts


def rewards_of_answers(
    session: Session, policy: TrainedRole, sampler: Sampler, scorer: Scorer
) -> Callable[[], Metrics] | None:
    """An evaluator: `eval_reward` and `eval_rewards/<name>` over the first `eval.generate` prompts of `data.eval`.

    None where there are none.
    """
    config, encode = session.config, session.encoder(policy)
    if config.data.eval is None or config.eval.generate == 0:
        return None

    def make(number: int, row: Row) -> Prompt:
        ids, columns = encode.question(row)
        return Prompt(_FIRST + number, ids, columns)

    prompts = held_out_prompts(config.data.eval_sources, config.data, make, count=config.eval.generate)
    stops, limit = session.stop_ids(policy), config.eval.max_new_tokens

    def answers() -> list[Trajectory]:
        if config.rl is not None and config.rl.environment is not None:
            sampler.set_params(*policy.snapshot())
            return [group[0] for group in sampler.sample(prompts, 1)]
        completions = greedy_completions(session, policy, [prompt.ids for prompt in prompts], stops, limit)
        return [trajectory_of(prompt, 0, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def evaluate() -> Metrics:
        scored = scorer(answers())
        names = sorted({name for t in scored for name in t.rewards})
        parts = {f"eval_rewards/{name}": [t.rewards.get(name, math.nan) for t in scored] for name in names}
        columns = {"eval_reward": [t.reward for t in scored], **parts}
        return {name: float(np.nanmean(values)) for name, values in columns.items() if not np.isnan(values).all()}

    return evaluate
