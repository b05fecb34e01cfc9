"""`RunRoles`: the models of a run, declared from its config on a mesh. Nothing is read, opened or computed.

A `Session` is one that also has data, a folder and checkpoints. `jaxtrain plan` has only this, and so compiles the
programs of the run itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxtrain.config import MeshSection, ModelSection, OptimizerSection, RunConfig
from jaxtrain.objectives.objective import Objective
from jaxtrain.optim import Schedule, make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import Role, TrainedRole, Update
from jaxtrain.roles.torch_model import TorchModel


class RunRoles:
    """The roles that `config` describes, on `mesh`."""

    def __init__(self, config: RunConfig, mesh: jax.sharding.Mesh, devices: Sequence[Any]):
        """`devices`: all of the run; the last of them may hold models that are not trained, and are not in `mesh`."""
        self.config, self.mesh, self.devices = config, mesh, devices
        self._num_steps = config.train.steps  # None until the data has been counted

    def trained_role(
        self,
        name: str,
        objective: Objective,
        *,
        model: ModelSection | None = None,
        optimizer: OptimizerSection | None = None,
    ) -> TrainedRole:
        """A role that is trained by `objective`; `model` and `optimizer` default to the config's sections."""
        section, optimizer = model or self.config.model, optimizer or self.config.optimizer
        declared = declare(section, self.mesh, self.config.mesh.preset)
        if isinstance(declared.model, TorchModel) and (self.config.recipe != "sft" or self.config.eval.generate):
            raise ValueError("model.backend=torchax cannot decode: it supports only recipe sft without eval.generate")
        schedule = self._schedule(optimizer)
        tx = make_optimizer(optimizer, schedule, declared.trained_axes)
        update = Update(objective, tx, schedule, self.config.train)
        return TrainedRole(name, section, declared, self.config.run.seed, update)

    def role(self, name: str, model: ModelSection, mesh: jax.sharding.Mesh | None = None) -> Role:
        """A role whose parameters are not trained, on `mesh` (default: the run's)."""
        return Role(name, model, declare(model, mesh or self.mesh, self.config.mesh.preset), self.config.run.seed)

    def frozen_mesh(self, count: int) -> jax.sharding.Mesh:
        """A mesh of the last `count` devices, with parameters and rows split over all of them, and the tokens of a row
        over as many as on the run's own mesh."""
        alone: MeshSection = self.config.mesh.model_copy(update={"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
        return make_mesh(alone, self.devices[-count:])

    def _schedule(self, optimizer: OptimizerSection) -> Schedule:
        """The schedule over `num_steps`, which are known before the first step is traced."""
        if self._num_steps is not None:
            return make_schedule(optimizer, self._num_steps)
        return lambda step: make_schedule(optimizer, self.num_steps)(step)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the complete run: `train.steps`, or the number that was counted when the data was opened.

        Raises ValueError if the data must be counted and has not been opened.
        """
        if self._num_steps is None:
            raise ValueError("the number of steps is not known yet: open the data before `restore`, or set train.steps")
        return self._num_steps

    @num_steps.setter
    def num_steps(self, steps: int) -> None:
        self._num_steps = steps
