"""The prompts of a run, of rows of its data."""

from __future__ import annotations

from jaxtrain.data.prompts import PromptStream
from jaxtrain.data.sources import Row
from jaxtrain.rl.rollouts import Prompt
from jaxtrain.roles.role import Role
from jaxtrain.session.session import Session


def prompt_stream(session: Session, policy: Role) -> PromptStream[Prompt]:
    """The prompts of `data.train`. One that leaves no room for a completion is a bad row."""
    config = session.config
    assert config.rl is not None
    encode, limit = session.encoder(policy), config.data.max_length - config.rl.max_completion_length

    def make(number: int, row: Row) -> Prompt:
        ids, columns = encode.question(row)
        if not 0 < len(ids) <= limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; data.max_length - rl.max_completion_length leaves room for {limit}"
            )
        return Prompt(number, ids, columns)

    return PromptStream(config.data.train_sources, config.data, make, seed=config.run.seed)
