"""Reward models: a scalar head reads prompt and completion and gives the reward of the sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from converters.families.registry import has_scalar_head
from jaxtrain.nn.heads import SCALAR
from jaxtrain.rl.rollouts import Trajectory, pack_parts
from jaxtrain.roles.role import Role
from jaxtrain.sample.placement import row_shares
from jaxtrain.session.session import Session


class RewardModel:
    """Callable: the head's value at the last token of every sample [n].

    It reads the policy's ids, so it must have the policy's tokenizer.
    """

    def __init__(self, role: Role, weight: float, max_length: int):
        """`role` has a scalar head; `max_length` holds the longest sample."""
        self.name, self.weight = role.name, weight
        self._role, self._max_length = role, max_length

    def __call__(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        (packed,) = pack_parts([trajectories], self._max_length, row_shares(self._role.model))
        values = self._role.rewards(packed.batch._replace(signals={}))
        return np.array([values[span.row, span.stop - 1] for span in packed.spans], np.float64)


def reward_models(session: Session) -> list[RewardModel]:
    """Those of `rl.reward_models`, on the trainer's devices and sharded as the policy is.

    Raises ValueError for a folder that holds no reward model.
    """
    config = session.config
    assert config.rl is not None
    models = []
    for section in config.rl.reward_models:
        changes = {"path": section.path, "config": None, "lora": None, "head": SCALAR}
        role = session.role(section.name, config.model.model_copy(update=changes))
        if not has_scalar_head(role.declared.hf):
            raise ValueError(f"rl.reward_models: {section.path} is no reward model: it has no head of one label")
        role.load()
        models.append(RewardModel(role, section.weight, config.data.max_length))
    return models
