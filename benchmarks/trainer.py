"""The training step of `jaxtrain train` without its files: random weights, batches from whoever asks."""

from __future__ import annotations

import time
from typing import Any

import jax
from jax.stages import Compiled

from jaxtrain.config import parse_config
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.batches import local_rows, place_batch
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipes.setup import base_params, make_policy
from jaxtrain.train.state import new_state
from jaxtrain.train.step import jit_step, make_step
from jaxtrain.types import Batch


class Trainer:
    """A model with its optimizer. Every shape of batch gets a program of its own, compiled before it is timed."""

    def __init__(self, tree: dict[str, Any]):
        """`tree` is a run's config; `data` may name files that do not exist."""
        self.config = parse_config(tree, "benchmark")
        self._mesh = make_mesh(self.config.mesh)
        policy = make_policy(self.config, self._mesh)
        self.model = policy.model
        schedule = make_schedule(self.config.optimizer, self.config.train.steps)
        tx = make_optimizer(self.config.optimizer, schedule, policy.trained_axes)
        step = make_step(
            policy.model,
            tx,
            schedule,
            SFT(),
            microbatches=self.config.train.microbatches,
            max_grad_norm=self.config.train.max_grad_norm,
        )
        params = base_params(self.config.model, policy, self.config.run.seed)
        begin = jax.jit(lambda params, key: new_state(params, {}, tx, key), donate_argnums=0)
        self._state = begin(params, jax.random.key(0))
        self._step = jit_step(step, self._state, self._mesh)
        self._compiled: dict[tuple[int, ...], Compiled] = {}

    def compile(self, batch: Batch) -> None:
        """Make the program for batches of this shape, unless there is one."""
        if batch.tokens.shape not in self._compiled:
            placed = self._place(batch)
            self._compiled[batch.tokens.shape] = self._step.lower(self._state, placed).compile()

    def step(self, batch: Batch) -> tuple[float, float]:
        """Take a step. Returns its loss and its seconds, the way of the batch to the device included."""
        program = self._compiled[batch.tokens.shape]
        start = time.perf_counter()
        self._state, report = program(self._state, self._place(batch))
        loss = float(report.means["loss"].value)
        return loss, time.perf_counter() - start

    def _place(self, batch: Batch) -> Batch:
        rows = len(batch.tokens)
        return place_batch(batch, self._mesh, local_rows(self._mesh, rows), rows)
