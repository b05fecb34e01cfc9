"""Reward models: a scalar head trained on pairs of texts, or on texts with labels."""

from collections.abc import Sequence

from jaxtrain.config import RunConfig
from jaxtrain.data.pairs import answer_encoder
from jaxtrain.session.calibration import calibration
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
        model = session.trained_role("reward", config.objective)
        encode = answer_encoder(session.config, session.encoder(model))
        batches = session.training_data(model, encode, encode.bundle_size)
        session.evaluator("held_out", held_out_loss(session, model, config.objective, encode))
        session.evaluator("calibration", calibration(session, model, encode))
        session.restore(model, data=batches)
        for batch in session.steps(batches):
            session.report(reward=model.update(batch))
    return session.outcome
