"""Roles: models with parameters on a mesh. A `Role` is fixed; a `TrainedRole` is changed by `update`.

Roles belong to the main thread. Whoever samples or serves gets a `Snapshot`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxtrain.config import ModelSection, TrainSection
from jaxtrain.lora import join
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import Objective
from jaxtrain.optim import Schedule
from jaxtrain.parallel.batches import local_rows, place_batch
from jaxtrain.parallel.mesh import compiler_options
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.initial import initial_params
from jaxtrain.roles.tokenizer import make_tokenizer
from jaxtrain.train.state import new_state, state_shardings
from jaxtrain.train.step import StepReport, jit_step, make_step, score, token_values
from jaxtrain.types import Batch, Params, TrainState


class Snapshot(NamedTuple):
    """Parameters of a role at one moment, for another thread, device set or process."""

    params: Params  # adapters included; valid until the role's next update, so a receiver copies them
    version: int  # optimizer steps behind them


class Role:
    """A model whose parameters no step changes: a reference, a teacher, a reward model.

    It is declared first; `load` reads its parameters, unless it is given those of another role.
    """

    def __init__(
        self, name: str, section: ModelSection, declared: Declaration, seed: int, params: Params | None = None
    ):
        self.name, self.section, self.declared, self.seed = name, section, declared, seed
        self._params = params
        self._compiled: dict[Any, Any] = {}

    @property
    def model(self) -> Model:
        return self.declared.model

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.declared.mesh

    @cached_property
    def tokenizer(self) -> Any:
        """None where the model has none."""
        return make_tokenizer(self.section)

    @property
    def params(self) -> Params:
        """All parameters."""
        assert self._params is not None, f"role {self.name} has no parameters yet"
        return self._params

    def load(self) -> None:
        """Read, or draw, the parameters that the role begins with."""
        adapters, base = initial_params(self.section, self.declared, self.seed)
        self._params = join(adapters, base)

    def logps(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """Log-probability of every weighted token: float32 [B, T] on the host, 0 elsewhere. `batch` is this host's."""
        model = self.model
        return self._score(("logps", temperature), batch, lambda p, b: score(model, p, b, temperature=temperature).logp)

    def values(self, batch: Batch) -> np.ndarray:
        """What a scalar head says of the state before every weighted token: float32 [B, T]; 0 elsewhere."""
        return self._score("values", batch, lambda p, b: token_values(self.model, p, b))

    def rewards(self, batch: Batch) -> np.ndarray:
        """What a scalar head says of the state at every token: float32 [B, T]."""
        return self._score("rewards", batch, lambda p, b: self.model.values(p, self.model.hidden(p, b)))

    def place(self, batch: Batch) -> Batch:
        """This host's rows of a global batch, on the devices of the role's mesh, if it is on one."""
        if self.model.run.mesh is None:
            return batch
        rows = len(batch.tokens) * jax.process_count()
        return place_batch(batch, self.mesh, local_rows(self.mesh, rows), rows)

    def _score(self, key: Any, batch: Batch, function: Any) -> np.ndarray:
        if key not in self._compiled:
            mesh = self.model.run.mesh
            options = None if mesh is None else compiler_options(mesh)
            self._compiled[key] = jax.jit(function, compiler_options=options)
        return np.asarray(jax.device_get(self._compiled[key](self.params, self.place(batch))))


class TrainedRole(Role):
    """A role that an optimizer updates.

    `frozen` are the weights that it does not touch, the base under LoRA. They are an argument of their own of the
    compiled step and are never donated, so that a reference or an engine may share them. The state is donated by every
    update.
    """

    def __init__(self, name: str, section: ModelSection, declared: Declaration, seed: int, update: Update):
        super().__init__(name, section, declared, seed)
        self._update = update
        self._state: TrainState | None = None
        self.frozen: Params = {}
        self._step: Any = None

    @property
    def state(self) -> TrainState:
        assert self._state is not None, f"role {self.name} has no state: it was not restored, or an update failed"
        return self._state

    @property
    def params(self) -> Params:
        return join(self.state.params, self.frozen)

    @property
    def step(self) -> int:
        """Optimizer steps taken, skipped ones included. Reading it waits for the device."""
        return int(self.state.step)

    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every leaf of the state; uses no memory."""
        shapes = jax.eval_shape(self._new_state, self.declared.trained)._replace(params=self.declared.trained)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, self.mesh),
        )

    def load(self, state: TrainState | None = None) -> None:
        """Take `state` from a checkpoint, or begin at step 0; frozen weights are read, or drawn, in both cases."""
        if state is not None and not self.model.base_frozen:
            self._state = state
        else:
            adapters, base = initial_params(self.section, self.declared, self.seed)
            trained, self.frozen = (adapters, base) if self.model.base_frozen else (join(adapters, base), {})
            self._state = state or self._begin(trained)
        self._step = jit_step(self._make_step(), self.state, self.mesh)

    def update(self, batch: Batch) -> StepReport:
        """Take one optimizer step on a placed batch. The report stays on the device until somebody reads it."""
        state, self._state = self.state, None  # donated: after an exception its buffers are gone
        self._state, report = self._step(state, self.frozen, batch)
        return report

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step for placed batches of this shape, without taking it: `.compile()` gives its use of memory, and the
        updates that follow do not compile it again."""
        return self._step.lower(self.state, self.frozen, batch)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.params, self.step)

    def compilations(self) -> int:
        """How many programs the step was compiled to; more than one means that shapes changed."""
        return self._step._cache_size()

    def _new_state(self, params: Params) -> TrainState:
        return new_state(params, self._update.optimizer, jax.random.key(self.seed))

    def _begin(self, trained: Params) -> TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        # Donated: the parameters move into the state instead of being copied.
        return jax.jit(self._new_state, out_shardings=shardings, donate_argnums=0)(trained)

    def _make_step(self) -> Any:
        return make_step(
            self.model,
            self._update.optimizer,
            self._update.schedule,
            self._update.objective,
            microbatches=self._update.train.microbatches,
            max_grad_norm=self._update.train.max_grad_norm,
        )


class Update(NamedTuple):
    """How a role is trained."""

    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: Schedule
    train: TrainSection
