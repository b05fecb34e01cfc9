"""The training step of `jaxtrain train` without its files: batches come from whoever asks."""

from __future__ import annotations

import time
from typing import Any

from jaxtrain.config import RunConfig, parse_config
from jaxtrain.objectives.objective import Objective
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import TrainedRole, Update
from jaxtrain.types import Batch


def trained_role(config: RunConfig, objective: Objective) -> TrainedRole:
    """The role that `Session.trained_role` gives, at step 0 and without a run folder."""
    declared = declare(config.model, make_mesh(config.mesh), config.mesh.preset)
    schedule = make_schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, schedule, declared.trained_axes)
    update = Update(objective, optimizer, schedule, config.train)
    role = TrainedRole("policy", config.model, declared, config.run.seed, update)
    role.load()
    return role


class Trainer:
    """A model with its optimizer. Every shape of batch gets a program of its own, compiled before it is timed."""

    def __init__(self, tree: dict[str, Any]):
        """`tree` is a run's config; `data` may name files that do not exist."""
        self.config = parse_config(tree, "benchmark")
        self._role = trained_role(self.config, SFT())
        self.model = self._role.model
        self._compiled: set[tuple[int, ...]] = set()

    def compile(self, batch: Batch) -> None:
        """Make the program for batches of this shape, unless there is one."""
        if batch.tokens.shape not in self._compiled:
            self._role.lower(self._role.place(batch)).compile()
            self._compiled.add(batch.tokens.shape)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Take a step. Returns its loss and its seconds, the way of the batch to the device included."""
        assert batch.tokens.shape in self._compiled, "compile the program for batches of this shape first"
        start = time.perf_counter()
        report = self._role.update(self._role.place(batch))
        loss = float(report.means["loss"].value)
        return loss, time.perf_counter() - start
