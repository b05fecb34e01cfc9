"""Held-out evaluation by rewards: of answers to prompts, or of conversations with an environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.prompts import question_within
from jaxtrain.data.sources import Row
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.pass_rates import pass_rates
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.rollouts import Prompt, Sampler, Scorer, Trajectory
from jaxtrain.rl.sampler import trajectory_of
from jaxtrain.rl.scoring import RewardScorer
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.evaluators import answer_prompts, eval_prompts
from jaxtrain.session.session import MetricValues, Session

_FIRST = 1 << 31  # the number of the first held-out prompt, above those of all training prompts


def held_out_questions(session: Session, encode: RowEncoder, limit: int | None = None) -> list[Prompt]:
    """The first `eval.generate` prompts, with their columns; none without `eval.generate`.

    Raises ValueError for unusable data, to which prompts of more than `limit` tokens belong.
    """

    def make(number: int, row: Row) -> Prompt:
        ids, columns = encode.question(row) if limit is None else question_within(encode, limit, row)
        return Prompt(_FIRST + number, ids, columns)

    return eval_prompts(session, make, keep_columns=True)


def eval_rewards(
    session: Session,
    role: TrainedRole,
    encode: RowEncoder,
    scorer: Scorer | None = None,
    metrics: Callable[[], Mapping[str, float]] = dict,
    sampler: Sampler | None = None,
) -> Callable[[], MetricValues] | None:
    """An evaluator of `eval_reward` and `eval_rewards/<name>` over the answers to the first `eval.generate` prompts,
    with `pass_rates` if there are several to a prompt.

    `eval.rewards` judge them, or else `scorer`, of which `metrics` returns those since the last call; they are reported
    with the prefix `eval_`. With `eval.greedy` all of them also of greedy answers, with the prefix `eval_greedy_`.
    `sampler` has the conversations with an environment. None without `eval.generate`.

    Raises ValueError for unusable data, and for greedy conversations with an environment.
    """
    config = session.config
    prompts = held_out_questions(session, encode)
    if not prompts:
        return None
    if config.eval.rewards or scorer is None:
        pool = session.enter(RewardPool(config.eval.rewards, workers=1))
        session.preemption.on_request(pool.interrupt)
        scorer = RewardScorer(config.eval.rewards, pool)
        metrics = scorer.metrics

    deal = Deal.of_run(1 if config.rl is None else config.rl.placement.processes_per_engine)

    converses = sampler is not None and config.rl is not None and config.rl.environment is not None
    if converses and config.eval.greedy:
        raise ValueError("eval.greedy: conversations with an environment always use `sampling`")

    def own_answers(*, greedy: bool) -> list[Trajectory]:
        if converses:
            assert sampler is not None
            sampler.set_params(*role.snapshot())
            return deal.sample(sampler, prompts, config.eval.samples)
        groups = answer_prompts(session, role, [prompt.ids for prompt in prompts], greedy=greedy)
        return [
            trajectory_of(prompt, sample, completion)
            for prompt, group in zip(prompts, groups, strict=True)
            if deal.owns(prompt.number)
            for sample, completion in enumerate(group)
        ]

    def judged(prefix: str, answers: list[Trajectory]) -> MetricValues:
        own = scorer(answers)
        scored = deal.share(own)
        texts = np.array(deal.merge(scored, [t.text for t in own]), object).reshape(len(prompts), -1)
        parts = {f"{prefix}rewards/{name}": name for name in sorted({name for t in scored for name in t.rewards})}
        columns = {f"{prefix}reward": [t.reward for t in scored]}
        columns |= {key: [t.rewards.get(name, np.nan) for t in scored] for key, name in parts.items()}
        found = {f"{prefix}{name}": value for name, value in metrics().items()}
        for key, values in columns.items():
            found |= pass_rates(key, np.array(values).reshape(texts.shape), texts)
        return found

    def evaluate() -> MetricValues:
        found = judged("eval_", own_answers(greedy=False))
        return found | (judged("eval_greedy_", own_answers(greedy=True)) if config.eval.greedy else {})

    return evaluate
