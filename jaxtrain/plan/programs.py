"""The programs of a config, lowered from shapes: those that the run itself would compile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.config import RunConfig
from jaxtrain.hub import local_folder
from jaxtrain.lora import join, split_adapters
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import TEACHER_FURTHER, TEACHER_HIDDEN, TopLogps
from jaxtrain.observe.flops import train_flops
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import MatchedHead, MatchedIds
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import context_shards, row_shares
from jaxtrain.plan.batches import data_batch, with_signal
from jaxtrain.rl.teachers import student_devices
from jaxtrain.roles.reference import bare_declaration
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.session.reference import other_reference, policy_devices
from jaxtrain.session.roles import RunRoles
from jaxtrain.session.teacher import on_mesh, teacher_role
from jaxtrain.types import REF_LOGPS, TEACHER_PROBS, Batch, Params

_UNKNOWN_STEPS = 1000  # of a run whose data would have to be counted; a constant in the program


class Program(NamedTuple):
    """A program that was lowered and not compiled."""

    name: str
    lowered: jax.stages.Lowered
    inputs: Mapping[str, Any]  # kind -> a tree of shapes with shardings, which the program reads
    mesh: jax.sharding.Mesh
    flops: float  # of one run on all devices, by our count
    rows: int  # of one run
    tokens: int
    trips: Callable[[str], int | None]  # of a loop whose number depends on the data, by its source lines
    times: float = 1  # runs in a step
    never: frozenset[str] = frozenset()  # functions whose conditionals are false
    grouped_rows: int | None = None  # of a product of experts, that belong to an expert; None: all of them
    gradients: Params | None = None  # the trained parameters, of each of which the program makes a gradient


class _ScoreLowered(Exception):  # in the place of a score
    def __init__(self, lowered: jax.stages.Lowered):
        self.lowered = lowered


class AbstractRole(Role):
    """A role without weights, whose scores are lowered instead of computed."""

    def place(self, batch: Batch) -> Batch:
        return batch

    def head(self) -> Head:
        return jax.eval_shape(self.model.head, self.params)

    def lower_score(self, score: Callable[[Role, Batch], Any], batch: Batch) -> jax.stages.Lowered:
        """The program that a method of `Role` runs for a score."""
        try:
            score(self, batch)
        except _ScoreLowered as made:
            return made.lowered
        raise AssertionError(f"{score} computed no score")

    def _score(self, key: Any, batch: Batch, function: Any) -> Any:
        raise _ScoreLowered(self._jitted(key, function).lower(self.params, batch))


def without_weights(config: RunConfig) -> RunConfig:
    """The config with local folders in place of names on the hub and URLs, of which no weights were fetched."""
    if config.model.path is None:
        return config
    folder = str(local_folder(config.model.path, weights=False))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": folder})})


def run_roles(config: RunConfig, devices: Sequence[Any]) -> RunRoles:
    """The roles of a run on `devices`. Raises ValueError for a mesh that does not divide them."""
    trains = devices
    if config.recipe == "preference":
        trains = policy_devices(config.reference, devices)
    elif config.recipe == "distill":
        trains = policy_devices(config.teacher, devices)
    elif config.rl is not None:
        trains = student_devices(config.rl.placement, config.teacher, devices)
    roles = RunRoles(config, make_mesh(config.mesh, trains), devices)
    if config.train.steps is None:
        roles.num_steps = _UNKNOWN_STEPS
    return roles


def data_programs(config: RunConfig, devices: Sequence[Any]) -> list[Program]:
    """The programs of a recipe that trains on data: the update, and before it the reference's or the teacher's."""
    roles = run_roles(config, devices)
    policy = roles.trained_role("reward" if config.recipe == "reward" else "policy", config.objective)
    other = config.reference is not None and config.reference.path is not None
    batch = data_batch(config, policy, other_reference(roles, policy) if other else None)
    before: list[Program] = []
    if REF_LOGPS in config.objective.signals:
        if config.reference is None or config.reference.cache is None:
            before.append(_reference_program(roles, policy, batch))
        signal = jax.ShapeDtypeStruct(batch.tokens.shape, np.float32, sharding=batch.loss_weights.sharding)  # type: ignore[union-attr]
        batch = with_signal(batch, REF_LOGPS, signal)
    if TEACHER_HIDDEN in config.objective.signals or TEACHER_PROBS in config.objective.signals:
        program, batch = teacher_program(roles, policy, batch)
        before.append(program)
    return [*before, update_program("update", policy, batch)]


def policy_parameters(policy: TrainedRole) -> dict[str, Any]:
    """Of a trained role, by kind."""
    return {"parameters": policy.abstract_state().params, "frozen parameters": policy.declared.frozen}


def update_program(name: str, role: TrainedRole, batch: Batch, times: float = 1) -> Program:
    """The step of a trained role."""
    declared, state = role.declared, role.abstract_state()
    microbatches = role.microbatches
    of = "" if name == "update" else f"{role.name}'s "
    inputs: dict[str, Any] = {f"{of}parameters": state.params, f"{of}frozen parameters": declared.frozen}
    inputs[f"{of}optimizer"] = state.opt_state
    if role.teacher_head is not None:
        inputs["teacher's head"] = role.teacher_head
    return Program(
        name,
        role.lower(batch),
        {**inputs, "batch": batch},
        role.mesh,
        train_flops(role.model.config, *_counted(batch), role.model.lora),
        *batch_size(batch),
        head_trips(batch, role, microbatches),
        times,
        grouped_rows=grouped_rows(role.model, role.mesh, batch_size(batch)[1] // microbatches),
        gradients=state.params,
    )


def scoring_program(
    name: str, role: AbstractRole, batch: Batch, score: Callable[[Role, Batch], Any], held: Mapping[str, Any]
) -> Program:
    """A forward pass of an abstract role. `held`: its parameters by kind; those of a kind are in memory once."""
    segments, weights = _counted(batch)
    lowered = role.lower_score(score, _moved(batch, role.mesh))
    flops = train_flops(role.model.config, segments, weights) / 3
    inputs = {**held, "batch": batch}
    grouped = grouped_rows(role.model, role.mesh, batch_size(batch)[1])
    trips = head_trips(batch, role)
    return Program(name, lowered, inputs, role.mesh, flops, *batch_size(batch), trips, grouped_rows=grouped)


def abstract_role(role: Role, params: Params | None = None) -> AbstractRole:
    """`role` with shapes for parameters: those of its declaration, unless `params` are given."""
    declared = role.declared
    if params is None:
        params = join(declared.trained, declared.frozen)
    return AbstractRole(role.name, role.section, declared, role.seed, params)


def initial_reference(policy: TrainedRole) -> tuple[AbstractRole, dict[str, Any]]:
    """The model that the run starts from, and its parameters by kind: see `roles.reference.reference_role`."""
    declared = policy.declared
    lora = policy.section.lora
    if not policy.model.base_frozen:
        return abstract_role(policy), {"reference's parameters": declared.trained}
    shared = {"frozen parameters": declared.frozen}
    if lora is not None and lora.path is not None:
        return abstract_role(policy), {**shared, "reference's parameters": declared.trained}
    full = split_adapters(policy.model.split(declared.target)[0])[1]
    bare = Role("reference", policy.section, bare_declaration(policy), policy.seed)
    return abstract_role(bare, join(full, declared.frozen)), {**shared, "reference's parameters": full}


def batch_size(batch: Batch) -> tuple[int, int]:
    """Rows and tokens."""
    return batch.tokens.shape[0], math.prod(batch.tokens.shape)


def head_trips(batch: Batch, role: Role, microbatches: int = 1) -> Callable[[str], int | None]:
    """Chunks of the head of `role`, of whose tokens all are taken to have a weight."""
    tokens = batch_size(batch)[1] / row_shares(role.mesh) / context_shards(role.mesh) / microbatches
    chunks = max(1, round(tokens / role.model.run.head_chunk))
    return lambda place: chunks if "ops/token_scores.py" in place else None


def grouped_rows(model: Model, mesh: jax.sharding.Mesh, tokens: int) -> int | None:
    """Of the products of a device's experts for `tokens` of all devices, if experts are chosen equally often."""
    moe, shares = model.config.moe, row_shares(mesh) * context_shards(mesh)
    return None if moe is None else -(-tokens * moe.experts_per_token // shares)


def _counted(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and loss weights by which FLOPs are counted: every row is full, and one segment."""
    return np.ones(batch.tokens.shape, np.int32), np.ones(batch.tokens.shape, np.float32)


def _reference_program(roles: RunRoles, policy: TrainedRole, batch: Batch) -> Program:
    section = roles.config.reference
    if section is None or not (section.devices or section.path):
        role, held = initial_reference(policy)
    else:
        role = abstract_role(other_reference(roles, policy))
        held = {"reference's parameters": role.params}
    return scoring_program("reference", role, batch, Role.logps, held)


def teacher_program(roles: RunRoles, student: TrainedRole, batch: Batch) -> tuple[Program, Batch]:
    """The teacher's forward pass, and the batch with what it adds."""
    role = abstract_role(teacher_role(roles))
    held = {"teacher's parameters": role.params}
    signals, mesh, preset = roles.config.objective.signals, student.mesh, roles.config.mesh.preset
    if TEACHER_FURTHER in signals:
        names = (TEACHER_HIDDEN, TEACHER_FURTHER)
        program = scoring_program("teacher", role, batch, lambda role, batch: role.group_states(batch), held)
        student.teacher_head = MatchedHead(on_mesh(role.head(), mesh, preset), _all_matched(student, role))
    elif TEACHER_HIDDEN in signals:
        names, program = (TEACHER_HIDDEN,), scoring_program("teacher", role, batch, Role.hidden, held)
        student.teacher_head = on_mesh(role.head(), mesh, preset)
    else:
        (ranks,) = (request.k for request in roles.config.objective.needs if isinstance(request, TopLogps))
        names = (TEACHER_PROBS,)
        program = scoring_program("teacher", role, batch, lambda role, batch: role.group_probs(batch, ranks), held)
    sharding = batch.loss_weights.sharding  # type: ignore[union-attr]
    for name, made in zip(names, jax.tree.leaves(program.lowered.out_info), strict=True):
        batch = with_signal(batch, name, jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=sharding))
    return program, batch


def _all_matched(student: Role, teacher: Role) -> MatchedIds:
    """Ids as shapes: the smaller vocabulary is taken to be a part of the larger one, as no tokenizer is read."""
    sizes = [role.model.config.vocab_size for role in (student, teacher)]
    counts = (min(sizes), min(sizes), *(size - min(sizes) for size in sizes))
    replicated = NamedSharding(student.mesh, PartitionSpec())
    shapes: list[Any] = [jax.ShapeDtypeStruct((count,), np.int32, sharding=replicated) for count in counts]
    return MatchedIds(*shapes)


def _moved(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The batch on another mesh."""
    sharding = jax.sharding.NamedSharding(mesh, batch.tokens.sharding.spec)  # type: ignore[union-attr]
    return batch.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))  # type: ignore[return-value]
