"""The prompts of a run, made from the rows of its data."""

from jaxtrain.data.prompts import PromptStream, question_within
from jaxtrain.data.sources import Row
from jaxtrain.rl.privileged import privileged_prompts
from jaxtrain.rl.rollouts import Prompt
from jaxtrain.roles.role import Role
from jaxtrain.session.data import checked_length
from jaxtrain.session.session import Session


def prompt_stream(session: Session, policy: Role) -> PromptStream[Prompt]:
    """The prompts of `data.train`. One that leaves no room for a completion is a bad row.

    Where they end, the steps that they make are counted: `session.num_steps`. Raises ValueError where they end before
    `train.steps`, where these are not given and a source is a stream, and where dynamic sampling draws as many as it
    needs, so that their number is not known.
    """
    config = session.config
    assert config.rl is not None
    encode, limit = session.encoder(policy), config.data.max_length - config.rl.max_completion_length

    privileged = privileged_prompts(session, policy)

    def make(number: int, row: Row) -> Prompt:
        prompt = Prompt(number, *question_within(encode, limit, row))
        if privileged is not None:
            privileged.row(prompt.columns)  # so that one which cannot be made is a bad row, and not a later error
        return prompt

    stream = PromptStream(config.data.train_sources, config.data, make, seed=config.run.seed)
    if config.train.epochs is not None:
        stream.end_after(config.train.epochs)
    stream.check_length(config.train.steps)
    if not config.algorithm.max_refills:
        if stream.finite:
            session.num_steps = checked_length(config, -(-stream.count() // config.rl.prompts) * config.rl.updates)
    elif config.train.steps is None:
        raise ValueError(
            "rl.algorithm.max_refills: dynamic sampling draws as many prompts as it needs, so the steps of an epoch "
            "cannot be counted: give train.steps, or rl.algorithm.max_refills=0"
        )
    return stream
