"""Distillation: a student is trained towards the distributions of a teacher on the tokens of the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtrain.config import RunConfig
from jaxtrain.recipes.answers import judged_answers
from jaxtrain.session.evaluators import held_out_loss
from jaxtrain.session.reference import policy_devices
from jaxtrain.session.session import Outcome, Session
from jaxtrain.session.teacher import batch_teacher
from jaxtrain.session.teacher_cache import CachedLogps
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
    assert config.teacher is not None
    with Session.open(
        config,
        resume=resume,
        allow_change=allow_change,
        preemption=preemption,
        devices=partial(policy_devices, config.teacher),
    ) as session:
        student = session.trained_role("policy", config.objective)
        teacher = (batch_teacher if config.teacher.cache is None else CachedLogps)(session, student)
        batches = session.training_data(student, teacher.encode)
        session.evaluator("held_out", held_out_loss(session, student, config.objective, teacher.encode, teacher))
        session.evaluator("answers", judged_answers(session, student, session.encoder(student)))
        session.restore(student, data=batches)
        teacher.load()
        for batch in session.steps(batches):
            session.report(policy=student.update(teacher(batch)))
    return session.outcome
