"""How a run that is not reinforcement learning judges its answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable

from jaxtrain.data.encoder import RowEncoder
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.evaluators import exact_match
from jaxtrain.session.session import MetricValues, Session


def judged_answers(session: Session, role: TrainedRole, encode: RowEncoder) -> Callable[[], MetricValues] | None:
    """An evaluator of the answers to `eval.generate` prompts: by `eval.rewards`, or else by exact match.

    None without `eval.generate`. Raises ValueError for unusable data.
    """
    if not session.config.eval.rewards:
        return exact_match(session, role, encode)
    from jaxtrain.rl.evaluator import eval_rewards  # only where it is used: recipes load little

    return eval_rewards(session, role, encode)
