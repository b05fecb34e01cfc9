"""Reinforcement learning: sample, reward, pack, score, advantages, update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from jaxtrain.config import RunConfig
from jaxtrain.nn.heads import LANGUAGE
from jaxtrain.rl.algorithms import find_algorithm
from jaxtrain.rl.collect import Collected, Collector, check_generations, limits_of
from jaxtrain.rl.evaluator import rewards_of_answers
from jaxtrain.rl.experience import Experience, add_advantages, pack_samples, score_samples
from jaxtrain.rl.placement import make_sampler, trainer_devices
from jaxtrain.rl.prompts import prompt_stream
from jaxtrain.rl.reward_models import reward_models
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.roles import critic_role, reference_role
from jaxtrain.rl.rollout_loop import RolloutLoop
from jaxtrain.rl.scoring import RewardScorer
from jaxtrain.rl.sources import make_source
from jaxtrain.rl.trajectories import Replay
from jaxtrain.session.session import Outcome, Session
from jaxtrain.train.preemption import Preemption


def run(
    config: RunConfig,
    *,
    resume: bool = True,
    replay: Path | None = None,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> Outcome:
    """Train as `config` says, writing into `run.dir`; go on from its newest checkpoint unless `resume` is False.

    `replay`: train on the samples that the run in that folder recorded, and sample none.
    The other arguments and the errors are those of `Session.open`.
    """
    section = config.rl
    assert section is not None
    algorithm = find_algorithm(section)
    check_generations(algorithm, section.generations)
    if config.model.head != LANGUAGE:
        raise ValueError(f"model.head={config.model.head} generates no text: recipe rl needs the language-model head")
    with Session.open(
        config,
        resume=resume,
        allow_change=allow_change,
        preemption=preemption,
        devices=partial(trainer_devices, section.placement),
    ) as session:
        if jax.process_count() > 1:
            raise ValueError("recipe rl runs in one process: start one; rl.placement.kind=ray adds others that sample")
        pool = session.enter(RewardPool(section.rewards, section.reward_workers))
        session.preemption.on_request(pool.interrupt)

        policy = session.trained_role("policy", algorithm.objective)
        critic = critic_role(session) if algorithm.critic else None
        prompts = prompt_stream(session, policy)
        rollouts = RolloutLoop(session, prompts)
        session.restore(*([policy, critic] if critic else [policy]), data=rollouts)
        reference = reference_role(policy) if algorithm.needs_reference else None

        sampler = make_sampler(session, policy)
        environment_weight = section.environment.weight if section.environment else 1.0
        reward = RewardScorer(section.rewards, pool, environment_weight, reward_models(session))
        session.evaluator("rewards", rewards_of_answers(session, policy, sampler, reward))
        collect = Collector(
            prompts.draw,
            sampler,
            reward,
            algorithm,
            prompts=section.prompts,
            samples=section.generations,
            limits=limits_of(section, config.data.max_length),
        )
        source = Replay(replay) if replay else make_source(session, collect, sampler, prompts)

        def experience_from(samples: Collected) -> Experience:
            experience = pack_samples(samples, config, policy.mesh)
            score_samples(experience, algorithm, policy, reference, critic)
            add_advantages(experience, algorithm)
            return experience

        counters = (sampler.metrics, reward.metrics)
        for experience in rollouts.experiences(source, policy, experience_from, counters):
            for batch in session.steps(experience):
                session.report(policy=policy.update(batch), critic=critic.update(batch) if critic else None)
    return session.outcome
