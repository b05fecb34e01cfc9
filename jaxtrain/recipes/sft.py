"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.config import RunConfig
from jaxtrain.objectives.sft import SFT
from jaxtrain.session.evaluators import exact_match, held_out_loss
from jaxtrain.session.session import Outcome, Session
from jaxtrain.train.preemption import Preemption


def run(
    config: RunConfig,
    *,
    resume: bool = True,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> Outcome:
    """Train as `config` says, writing into `run.dir`; go on from its newest checkpoint unless `resume` is False.

    The arguments and the errors are those of `Session.open`.
    """
    objective = SFT()
    with Session.open(config, resume=resume, allow_change=allow_change, preemption=preemption) as session:
        policy = session.trained_role("policy", objective)
        encode = session.encoder(policy)
        batches = session.training_data(policy, encode)
        session.evaluator("held_out", held_out_loss(session, policy, objective, encode))
        session.evaluator("exact_match", exact_match(session, policy, encode))
        session.restore(policy, data=batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))
    return session.outcome
