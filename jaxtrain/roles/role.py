"""Roles: models with parameters on a mesh. A `Role` is frozen; a `TrainedRole` is trained by `update`.

Roles are used only on the main thread. Samplers and servers get a `Snapshot`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxtrain.config import ModelSection, TrainSection
from jaxtrain.lora import join
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import Logp, Objective, TopLogps
from jaxtrain.objectives.segments import further_logps, group_probs, to_student
from jaxtrain.observe.compilations import compilations
from jaxtrain.ops.head_chunks import Head, TopK
from jaxtrain.ops.hybrid import MatchedHead
from jaxtrain.ops.token_scores import Scoring, Targets, token_scores
from jaxtrain.optim import Schedule
from jaxtrain.parallel.batches import move_batch, place_batch
from jaxtrain.parallel.mesh import compiler_options
from jaxtrain.parallel.sharding import with_shardings
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.initial import initial_params
from jaxtrain.roles.tokenizer import make_tokenizer
from jaxtrain.train.state import new_state, state_shardings
from jaxtrain.train.step import StepReport, jit_step, make_step, score, scores_of, token_values
from jaxtrain.types import TEACHER_PLACE, TEACHER_TOKENS, Array, Batch, Params, TrainState


class Snapshot(NamedTuple):
    """The current parameters of a role, for another thread, device set or process."""

    params: Params  # including adapters; valid until the role's next update, so the receiver must copy them
    version: int  # number of optimizer steps


class GroupStates(NamedTuple):
    """Of a teacher with another tokenizer, at the student's first token of each group; 0 elsewhere."""

    hidden: Array  # [B, T, E] the state that predicts the teacher's first token of the group
    further: Array  # [B, T] float32, the log-probability of its further tokens


class Role:
    """A model that is not trained: a reference, a teacher, a reward model.

    It is declared first; `load` reads its parameters, unless `params` are given, such as those of another role.
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
        """The tokenizer, or None if the model has none."""
        return make_tokenizer(self.section)

    @property
    def params(self) -> Params:
        """All parameters."""
        assert self._params is not None, f"role {self.name} has no parameters yet"
        return self._params

    def load(self) -> None:
        """Read or initialize the parameters."""
        adapters, base = initial_params(self.section, self.declared, self.seed)
        self._params = join(adapters, base)

    def logps(self, batch: Batch, temperature: float = 1.0) -> Float[jax.Array, "B T"]:
        """Log-probability of every weighted token: float32, 0 elsewhere, on the devices of the role's mesh.

        `batch`: this host's rows, or a placed batch.
        """
        model = self.model
        return self._score(("logps", temperature), batch, lambda p, b: score(model, p, b, temperature=temperature).logp)

    def values(self, batch: Batch) -> Float[jax.Array, "B T"]:
        """The outputs of a scalar head for the state before every weighted token: float32, 0 elsewhere."""
        return self._score("values", batch, lambda p, b: token_values(self.model, p, b))

    def rewards(self, batch: Batch) -> Float[jax.Array, "B T"]:
        """The outputs of a scalar head for the state at every token: float32."""
        return self._score("rewards", batch, lambda p, b: self.model.values(p, self.model.hidden(p, b)))

    def hidden(self, batch: Batch) -> Float[jax.Array, "B T D"]:
        """The hidden states after the final norm, on the devices of the role's mesh."""
        return self._score("hidden", batch, lambda p, b: self.model.hidden(p, b))

    def top_logps(self, batch: Batch, k: int, *, temperature: float, vocab_size: int) -> TopK:
        """The k most probable of the first `vocab_size` ids at every weighted token, with their log-probabilities:
        [B, T, k], 0 elsewhere."""

        def top(params: Params, batch: Batch) -> TopK:
            head = replace(self.model.head(params), vocab_size=vocab_size)
            targets = Targets(batch.tokens, batch.loss_weights)
            scoring = Scoring(temperature, top_k=k, chunk=self.model.run.head_chunk)
            scores = token_scores(self.model.hidden(params, batch), head, targets, scoring, mesh=self.model.run.mesh)
            return TopK(scores.top_ids, scores.top_logps)

        return self._score(("top", k, temperature, vocab_size), batch, top)

    def group_probs(self, batch: Batch, k: int) -> Float[jax.Array, "B T K"]:
        """The signal `teacher_probs` of a batch with `teacher_tokens`: `objectives.segments.group_probs` of this model,
        at the student's tokens.
        """

        def probs(params: Params, batch: Batch) -> Float[Array, "B T K"]:
            places = batch.signals[TEACHER_PLACE]
            mine = batch._replace(
                tokens=batch.signals[TEACHER_TOKENS], loss_weights=(places > 0).astype(jnp.float32), signals={}
            )
            scores = scores_of(self.model, params, self.model.hidden(params, mine), mine, (Logp(), TopLogps(k)))
            return to_student(group_probs(scores, places), batch)

        return self._score(("groups", k), batch, probs)

    def group_states(self, batch: Batch) -> GroupStates:
        """What `HybridDistance` reads of this model as teacher, of a batch with `teacher_tokens`."""

        def states(params: Params, batch: Batch) -> GroupStates:
            places = batch.signals[TEACHER_PLACE]
            mine = batch._replace(
                tokens=batch.signals[TEACHER_TOKENS], loss_weights=(places > 0).astype(jnp.float32), signals={}
            )
            hidden = self.model.hidden(params, mine)
            further = further_logps(scores_of(self.model, params, hidden, mine, (Logp(),)).logp, places)
            before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
            return GroupStates(to_student(before, batch), to_student(further[..., None], batch)[..., 0])

        return self._score("group states", batch, states)

    def head(self) -> Head:
        """The projection onto the vocabulary."""
        return self.model.head(self.params)

    def place(self, batch: Batch) -> Batch:
        """This host's rows of a global batch, on the devices of the role's mesh, if it is on one.

        A batch that is placed on the devices of another mesh is copied to these.
        """
        mesh = self.declared.model.run.mesh
        if mesh is None:
            return batch
        if not isinstance(batch.tokens, jax.Array):
            return place_batch(batch, mesh)
        return move_batch(batch, mesh)

    def _score(self, key: Any, batch: Batch, function: Any) -> Any:
        return self._jitted(key, function)(self.params, self.place(batch))

    def _jitted(self, key: Any, function: Any) -> jax.stages.Wrapped:
        if key not in self._compiled:
            mesh = self.model.run.mesh
            options = None if mesh is None else compiler_options(mesh, self.model.run.compiler_options)
            self._compiled[key] = jax.jit(function, compiler_options=options)
        return self._compiled[key]


def shares_prefixes(bundle_size: int, *readers: Role | None) -> bool:
    """Whether the prompt of a pair is in a row of the training data once: if all models that read it can."""
    return bundle_size == 2 and all(reader.model.shares_prefixes for reader in readers if reader is not None)


class TrainedRole(Role):
    """A role that is trained.

    `frozen` are the weights that are not trained, such as the base under LoRA. They are a separate argument of the
    compiled step and are never donated, so that a reference or an engine may share them. Every update donates the
    state.
    """

    def __init__(self, name: str, section: ModelSection, declared: Declaration, seed: int, update: Update):
        super().__init__(name, section, declared, seed)
        self._update = update
        self._state: TrainState | None = None
        self._on_host = False  # the optimizer's state
        self.frozen: Params = {}
        self.teacher_head: Head | MatchedHead | None = None  # of an objective that requests a divergence
        self._step: Any = None
        self._compilations = 0

    @property
    def state(self) -> TrainState:
        """Parameters, the optimizer's state and counters, all of it on the device."""
        if self._on_host:
            held = self._held
            placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state().opt_state)
            self._state, self._on_host = held._replace(opt_state=_moved(held.opt_state, placed)), False
        assert self._state is not None, f"role {self.name} has no state: it was not restored, or an update failed"
        return self._state

    @property
    def _held(self) -> TrainState:
        assert self._state is not None, f"role {self.name} has no state"
        return self._state

    def wait_on_host(self) -> None:
        """Move the optimizer's state to the host's memory, until something reads `state`, such as the next update."""
        held = self._held
        if not self._on_host:
            placed = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), held.opt_state)
            self._state, self._on_host = held._replace(opt_state=_moved(held.opt_state, placed)), True

    @property
    def restored(self) -> bool:
        """Whether it has parameters."""
        return self._state is not None

    @property
    def params(self) -> Params:
        return join(self._held.params, self.frozen)

    @property
    def step(self) -> int:
        """Number of optimizer steps, including skipped ones. Reading it waits for the device."""
        return int(self._held.step)

    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every leaf of the state; uses no memory."""
        shapes = jax.eval_shape(self._new_state, self.declared.trained)._replace(params=self.declared.trained)
        return with_shardings(shapes, state_shardings(shapes, self.mesh))

    def load(self, state: TrainState | None = None) -> None:
        """Use `state` from a checkpoint, or start at step 0. Frozen weights are read or initialized in both cases."""
        if state is not None and not self.model.base_frozen:
            self._state = state
        else:
            adapters, base = initial_params(self.section, self.declared, self.seed)
            trained, self.frozen = (adapters, base) if self.model.base_frozen else (join(adapters, base), {})
            self._state = state or self._begin(trained)
        self._step = jit_step(self._make_step(), self.state, self.mesh, self.model.run.compiler_options)

    def update(self, batch: Batch) -> StepReport:
        """Take one optimizer step on a placed batch. The report stays on the device until it is read."""
        state, self._state = self.state, None  # donated: its buffers are invalid even after an exception
        before = compilations()
        self._state, report = self._step(state, self.frozen, batch, self.teacher_head)
        self._compilations += compilations() - before
        return report

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """Lower the step for placed batches of this shape without running it.

        `.compile()` gives its memory usage, and later updates do not compile it again. Before `load`, the state and the
        frozen weights are shapes only; so may be the batch.
        """
        if self._state is not None:
            return self._step.lower(self._state, self.frozen, batch, self.teacher_head)
        state = self.abstract_state()
        step = jit_step(self._make_step(), state, self.mesh, self.model.run.compiler_options)
        return step.lower(state, self.declared.frozen, batch, self.teacher_head)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.params, self.step)

    @property
    def microbatches(self) -> int:
        """Of a step."""
        return self._update.train.microbatches

    def compilations(self) -> int:
        """How often updates compiled the step; more than once means that shapes or shardings changed."""
        return self._compilations

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
    """The objective and optimizer of a trained role."""

    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: Schedule
    train: TrainSection


def _moved(tree: Any, shardings: Any) -> Any:
    """The arrays in another kind of memory. The old ones are deleted: JAX donates only within one kind."""
    moved = jax.block_until_ready(jax.device_put(tree, shardings))
    jax.tree.map(lambda leaf: leaf.delete(), tree)
    return moved
