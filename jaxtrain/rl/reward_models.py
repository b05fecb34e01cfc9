"""Reward models: models with a scalar head that score a prompt with its completion."""

from collections.abc import Sequence

import numpy as np

from converters.families.registry import has_scalar_head
from jaxtrain.nn.heads import SCALAR
from jaxtrain.parallel.batches import host_rows, local_row_shares
from jaxtrain.rl.rollouts import Trajectory, pack_parts
from jaxtrain.roles.role import Role
from jaxtrain.session.session import Session


class RewardModel:
    """Callable: returns the head's output at the last token of every sample, [n]. All processes call it together.

    It gets the policy's token ids, so it must have the same tokenizer.
    """

    def __init__(self, role: Role, weight: float, max_length: int):
        """`role` has a scalar head; `max_length` is the maximum length of a sample."""
        self.name, self.weight = role.name, weight
        self._role, self._max_length = role, max_length

    def __call__(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        (packed,) = pack_parts([trajectories], self._max_length, local_row_shares(self._role.model.run.mesh))
        values = host_rows(self._role.rewards(packed.batch._replace(signals={})))
        return np.array([values[span.row, span.stop - 1] for span in packed.spans], np.float64)


def reward_models(session: Session) -> list[RewardModel]:
    """The models of `rl.reward_models`, on the trainer's devices and sharded like the policy.

    Raises ValueError for a folder that is not a reward model.
    """
    config = session.config
    assert config.rl is not None
    models = []
    for section in config.rl.reward_models:
        changes = {"path": section.path, "config": None, "lora": None, "head": SCALAR}
        role = session.role(section.name, config.model.model_copy(update=changes))
        if not has_scalar_head(role.declared.hf):
            raise ValueError(
                f"rl.reward_models: {section.path} is not a reward model (a sequence classifier with one label)"
            )
        role.load()
        models.append(RewardModel(role, section.weight, config.data.max_length))
    return models
