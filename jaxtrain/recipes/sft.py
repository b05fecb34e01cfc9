"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.config import RunConfig
from jaxtrain.recipes.answers import judged_answers
from jaxtrain.session.evaluators import held_out_loss
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
    with Session.open(config, resume=resume, allow_change=allow_change, preemption=preemption) as session:
        policy = session.trained_role("policy", config.objective)
        encode = session.encoder(policy)
        batches = session.training_data(policy, encode)
        session.evaluator("held_out", held_out_loss(session, policy, config.objective, encode))
        session.evaluator("answers", judged_answers(session, policy, encode))
        session.restore(policy, data=batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))
    return session.outcome
