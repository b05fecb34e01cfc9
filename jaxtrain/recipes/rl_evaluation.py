"""Held-out evaluation of a policy: the reward of its greedy answers, or of its conversations with an environment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.data.formats import Encoder
from jaxtrain.data.prompts import held_out_prompts
from jaxtrain.data.sources import Row
from jaxtrain.recipes.evaluation import greedy_completions
from jaxtrain.recipes.setup import Policy, as_list, stop_ids
from jaxtrain.rl.controller import Learner
from jaxtrain.rl.rollouts import Prompt, Sampler, Scorer, Trajectory
from jaxtrain.rl.sampler import trajectory_of

_FIRST = 1 << 31  # numbers of held-out prompts, which no training prompt reaches

Evaluation = Callable[[Learner], dict[str, float]]


def make_rl_evaluation(
    config: RunConfig,
    policy: Policy,
    encode: Encoder,
    tokenizer: Any,
    sampler: Sampler,
    scorer: Scorer,
    check: Callable[[], None],
) -> Evaluation | None:
    """`learner -> eval_reward, eval_rewards/<name>` over the first `eval.generate` prompts of `data.eval`, or None.

    `check` is called again and again meanwhile; what it raises ends the evaluation.
    """
    if config.data.eval is None or config.eval.generate == 0:
        return None

    def make(number: int, row: Row) -> Prompt:
        return Prompt(_FIRST + number, *encode.question(row))

    prompts = held_out_prompts(as_list(config.data.eval), config.data, make, count=config.eval.generate)
    stops = stop_ids(config.model, policy, tokenizer)

    def greedy(learner: Learner) -> list[Trajectory]:
        asked, most = [prompt.ids for prompt in prompts], config.eval.max_new_tokens
        answers = greedy_completions(policy.model, learner.params, tokenizer, asked, stops, most, check)
        return [trajectory_of(prompt, 0, completion) for prompt, completion in zip(prompts, answers, strict=True)]

    def of_learner(learner: Learner) -> dict[str, float]:
        if config.rl is not None and config.rl.environment is not None:
            sampler.set_params(learner.params, int(learner.state.step))
            answered = [group[0] for group in sampler.sample(prompts, 1)]
        else:
            answered = greedy(learner)
        scored = scorer(answered)
        names = sorted({name for t in scored for name in t.rewards})
        parts = {f"eval_rewards/{name}": [t.rewards.get(name, math.nan) for t in scored] for name in names}
        columns = {"eval_reward": [t.reward for t in scored], **parts}
        return {name: float(np.nanmean(values)) for name, values in columns.items() if not np.isnan(values).all()}

    return of_learner
