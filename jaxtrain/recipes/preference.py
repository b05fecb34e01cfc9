"""Preference optimization: DPO and its relatives on pairs of answers, KTO on answers with labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtrain.config import RunConfig
from jaxtrain.data.pairs import answer_encoder
from jaxtrain.recipes.answers import judged_answers
from jaxtrain.session.evaluators import held_out_loss
from jaxtrain.session.reference import ReferenceLogps, policy_devices
from jaxtrain.session.reference_cache import use_cached_logps
from jaxtrain.session.session import Outcome, Session
from jaxtrain.train.preemption import Preemption


def run(
    config: RunConfig,
    *,
    resume: bool = True,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> Outcome:
    """Train by `config` in `run.dir`, from its newest checkpoint on unless `resume` is False.

    The arguments and the errors are those of `Session.open`.
    """
    with Session.open(
        config,
        resume=resume,
        allow_change=allow_change,
        preemption=preemption,
        devices=partial(policy_devices, config.reference),
    ) as session:
        policy = session.trained_role("policy", config.objective)
        encode = answer_encoder(session.config, session.encoder(policy))
        use_cached_logps(session, policy, encode)
        reference = ReferenceLogps(session, policy)
        batches = session.training_data(policy, encode, encode.bundle_size, reference.other)
        session.evaluator("held_out", held_out_loss(session, policy, config.objective, encode, reference))
        session.evaluator("answers", judged_answers(session, policy, encode))
        session.restore(policy, data=batches)
        reference.load_for(batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(reference(batch)))
    return session.outcome
