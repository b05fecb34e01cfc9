"""Supervised fine-tuning."""

from __future__ import annotations

from jaxtrain.config import RunConfig
from jaxtrain.losses.sft import sft_loss
from jaxtrain.nn.heads import SCALAR
from jaxtrain.session.evaluators import exact_match, held_out_loss
from jaxtrain.session.session import Outcome, Session


def run(config: RunConfig, *, resume: bool = True) -> Outcome:
    """Train as `config` says, writing into `run.dir`; go on from its newest checkpoint unless `resume` is False.

    Raises ValueError for what the user can correct (config, data, checkpoint); NonFiniteError where training diverges.
    """
    if config.model.head == SCALAR:
        raise ValueError("model.head=scalar gives numbers, no tokens: recipe sft needs a head over the vocabulary")
    with Session.open(config, resume=resume) as session:
        policy = session.trained_role("policy", sft_loss)
        encode = session.encoder(policy)
        batches = session.training_data(policy)
        session.evaluator("held_out", held_out_loss(session, policy, sft_loss, encode))
        session.evaluator("exact_match", exact_match(session, policy, encode))
        session.restore(policy, data=batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))
    return session.outcome
