"""Reinforcement learning and on-policy distillation: sample, reward, pack, score, advantages, update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jaxtrain.config import RunConfig
from jaxtrain.nn.heads import LANGUAGE
from jaxtrain.rl.coefficients import Coefficients
from jaxtrain.rl.collect import Collected, Collector, check_generations, length_limits
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.evaluator import eval_rewards
from jaxtrain.rl.experience import Experience, add_advantages, pack_samples, score_samples
from jaxtrain.rl.placement import make_sampler
from jaxtrain.rl.reward_models import reward_models
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.roles import critic_role
from jaxtrain.rl.rollout_loop import RolloutLoop
from jaxtrain.rl.run_prompts import prompt_stream
from jaxtrain.rl.sample_sources import make_source
from jaxtrain.rl.scoring import RewardScorer
from jaxtrain.rl.teachers import TeacherLogps, held_out_teacher, make_teacher, sample_encoder, student_devices
from jaxtrain.rl.trajectories import Replay
from jaxtrain.roles.reference import reference_role
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
    """Train by `config` in `run.dir`, from its newest checkpoint on unless `resume` is False.

    `replay`: the folder of a run whose recorded samples are trained on, instead of new ones.
    The other arguments and the errors are those of `Session.open`.
    """
    section = config.rl
    assert section is not None
    algorithm = config.algorithm
    if section.rewarded or algorithm.overlong_cache:
        check_generations(algorithm, section.generations)
    if config.model.head != LANGUAGE:
        raise ValueError(
            f"model.head={config.model.head} cannot generate text: recipe rl needs the language-model head"
        )
    with Session.open(
        config,
        resume=resume,
        allow_change=allow_change,
        preemption=preemption,
        devices=partial(student_devices, section.placement, config.teacher),
    ) as session:
        pool = session.enter(RewardPool(section.rewards, section.reward_workers))
        session.preemption.on_request(pool.interrupt)

        policy = session.trained_role("policy", algorithm.objective)
        critic = critic_role(session) if algorithm.critic else None
        trained = [policy, critic] if critic else [policy]
        prompts = prompt_stream(session, policy)
        coefficients = Coefficients.initial(algorithm.objective)
        rollouts = RolloutLoop(session, prompts, coefficients)
        session.restore(*trained, data=rollouts)
        reference = reference_role(policy) if algorithm.needs_reference else None
        teacher = make_teacher(session, policy) if algorithm.needs_teacher else None
        add_signals = None if isinstance(teacher, TeacherLogps) else teacher
        encode_samples = sample_encoder(session, teacher)

        deal = Deal.of_run(section.placement.processes_per_engine)
        sampler = make_sampler(session, policy, trained)
        environment_weight = section.environment.weight if section.environment else 1.0
        models = reward_models(session, policy)
        scorer = partial(RewardScorer, section.rewards, pool, environment_weight, models, session.num_steps)
        each = 1 if section.scorers > 1 else None  # process of the pool for a group
        reward, held_out = scorer(together=section.placement.staleness == 0, workers=each), scorer()
        encode = session.encoder(policy)
        if section.rewarded or config.eval.rewards:
            session.evaluator("rewards", eval_rewards(session, policy, encode, held_out, held_out.metrics, sampler))
        if teacher:
            session.evaluator("teacher", held_out_teacher(session, policy, sampler, teacher, encode_samples))
        collect = Collector(
            prompts.draw,
            sampler,
            reward,
            algorithm,
            prompts=section.prompts,
            samples=section.generations,
            limits=length_limits(section, config.data.max_length),
            deal=deal,
        )
        source = Replay(replay) if replay else make_source(session, collect, prompts, trained)

        def experience_from(samples: Collected) -> Experience:
            experience = pack_samples(samples, config, policy.mesh, deal, reward.weights, encode_samples)
            if teacher is None or isinstance(teacher, TeacherLogps):
                score_samples(experience, algorithm, policy, reference, critic, teacher)
                add_advantages(experience, algorithm, reward.weights, coefficients)
            return experience

        counters = (sampler.metrics, reward.metrics)
        for experience in rollouts.experiences(source, policy, experience_from, counters):
            for batch in session.steps(experience):
                batch = add_signals(batch) if add_signals else batch
                session.report(policy=policy.update(batch), critic=critic.update(batch) if critic else None)
    return session.outcome
