"""The training step of `jaxtrain train` without a run folder, for batches that a benchmark provides."""

from __future__ import annotations

import time
from typing import Any

from jaxtrain.config import RunConfig, parse_config
from jaxtrain.objectives.objective import Objective
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.reference import reference_role
from jaxtrain.roles.role import TrainedRole, Update
from jaxtrain.types import REF_LOGPS, Batch

_STEPS = 1000  # of the schedule, where the config names none


def trained_role(config: RunConfig, objective: Objective) -> TrainedRole:
    """The role of `Session.trained_role`, at step 0 and without a run folder."""
    declared = declare(config.model, make_mesh(config.mesh), config.mesh.preset)
    schedule = make_schedule(config.optimizer, config.train.steps or _STEPS)
    optimizer = make_optimizer(config.optimizer, schedule, declared.trained_axes)
    update = Update(objective, optimizer, schedule, config.train)
    role = TrainedRole("policy", config.model, declared, config.run.seed, update)
    role.load()
    return role


class Trainer:
    """A model with its optimizer. The program for each batch shape is compiled before it is timed."""

    def __init__(self, tree: dict[str, Any], objective: Objective | None = None):
        """`tree` is the config of a run; the files of `data` need not exist. `objective`: SFT by default. One that
        reads a reference gets the initial model, whose forward pass is part of a step."""
        self.config, objective = parse_config(tree, "benchmark"), objective or SFT()
        self._role = trained_role(self.config, objective)
        self._reference = reference_role(self._role) if REF_LOGPS in objective.signals else None
        self.model = self._role.model
        self._compiled: set[tuple[int, ...]] = set()

    def compile(self, batch: Batch) -> None:
        """Compile the program for batches of this shape, unless it is compiled already."""
        if batch.tokens.shape not in self._compiled:
            self._role.lower(self._placed(batch)).compile()
            self._compiled.add(batch.tokens.shape)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Take a step. Returns its loss and its seconds, including the transfer of the batch to the device."""
        assert batch.tokens.shape in self._compiled, "compile the program for batches of this shape first"
        start = time.perf_counter()
        report = self._role.update(self._placed(batch))
        loss = float(report.means["loss"].value)
        return loss, time.perf_counter() - start

    def _placed(self, batch: Batch) -> Batch:
        batch = self._role.place(batch)
        if self._reference is None:
            return batch
        return batch._replace(signals={**batch.signals, REF_LOGPS: self._reference.logps(batch)})
