"""The programs of recipe rl: the updates, what is scored before them, and those of the engine that samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.lora import split_adapters
from jaxtrain.nn.model import Model
from jaxtrain.objectives.policy import ENTROPY_COEFFICIENTS
from jaxtrain.observe.flops import train_flops
from jaxtrain.parallel.sharding import ROWS, replicated, row_shares, with_shardings
from jaxtrain.plan.batches import abstract_batch
from jaxtrain.plan.programs import (
    AbstractRole,
    Program,
    abstract_role,
    grouped_rows,
    initial_reference,
    policy_parameters,
    run_roles,
    scoring_program,
    teacher_program,
    update_program,
)
from jaxtrain.rl.placement import sampling_meshes
from jaxtrain.rl.roles import critic_role
from jaxtrain.rl.rollouts import SUPPORTS, common_rows
from jaxtrain.rl.sync import merge, rollout_model
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.sample import decode as engine
from jaxtrain.sample.buffers import MIN_PROMPT, bucket_for, bucket_lengths, prefill_rows
from jaxtrain.sample.capacity import cast_matrices, empty_buffers, lay_out, serving_shardings
from jaxtrain.sample.constraints import join_tries
from jaxtrain.sample.requests import EngineLimits
from jaxtrain.sample.samples import default_settings
from jaxtrain.session.roles import RunRoles
from jaxtrain.types import ALIGNED, Batch, Params

SAMPLING = ("merge", "reshard", "prefill", "decode")
"""The programs of the phase in which an engine gets the weights and samples."""

_UNASKED = frozenset({"constrain", "forbid_stops"})  # conditionals of what a rollout does not use


def rl_programs(config: RunConfig, devices: Sequence[Any]) -> list[Program]:
    """The programs of one step: weights to the sampler, prompts, tokens, scores, and the updates.

    Every sample is taken to be as long as it may be, and to fill a row.
    """
    roles = run_roles(config, devices)
    policy = roles.trained_role("policy", config.algorithm.objective)
    sampling = _sampling_programs(config, policy, devices)
    batch, scoring, critic = _scoring_programs(roles, policy)
    section = config.rl
    assert section is not None
    updates = [update_program("update", policy, batch, section.updates)]
    if critic is not None:
        updates.append(update_program("critic update", critic, batch, section.updates))
    return [*sampling, *scoring, *updates]


def _scoring_programs(roles: RunRoles, policy: TrainedRole) -> tuple[Batch, list[Program], TrainedRole | None]:
    """The batch of an update, and the programs that give it its signals: see `rl.experience.score_samples`."""
    config, algorithm = roles.config, roles.config.algorithm
    section, objective = config.rl, algorithm.objective
    assert section is not None
    samples = -(-section.prompts * section.generations // section.minibatches)
    multiple = row_shares(policy.mesh) * config.train.microbatches
    rows, length = common_rows([range(samples)], multiple), config.data.tokens_per_row()
    if algorithm.advantages is None:
        signals: dict[str, tuple[int, ...]] = dict.fromkeys(ALIGNED if algorithm.aligns else (), ())
        batch = abstract_batch(policy.mesh, rows, length, signals, left_out=True)
        program, batch = teacher_program(roles, policy, batch)
        return batch, [program._replace(times=section.updates)], None
    signals = {"sampler_logps": (), "versions": ()}
    if config.sampling.filtered and section.support:
        signals[SUPPORTS] = (min(section.support, policy.model.config.vocab_size),)
    batch = partial(abstract_batch, policy.mesh, rows, length, left_out=True)
    programs: list[Program] = []
    logps = partial(Role.logps, temperature=objective.temperature)
    times = section.minibatches

    def add(name: str, role: AbstractRole, score: Any, held: dict[str, Any], signal: str | None) -> None:
        programs.append(scoring_program(name, role, batch(signals), score, held)._replace(times=times))
        if signal is not None:
            signals[signal] = ()

    if section.updates > 1 or algorithm.kl_in_reward or algorithm.needs_teacher:
        add("score", abstract_role(policy), logps, policy_parameters(policy), "old_logps")
    if algorithm.needs_reference:
        role, held = initial_reference(policy)
        add("reference", role, logps, held, "ref_logps")
    if algorithm.needs_teacher:
        assert config.teacher is not None
        if config.teacher.path is None and not config.teacher.devices:
            role, held = initial_reference(policy)
        else:
            role = abstract_role(_other_teacher(roles, policy))
            held = {"teacher's parameters": role.params}
        add("teacher", role, logps, held, None)
    critic = critic_role(roles) if algorithm.critic else None
    if critic is not None:
        held = {f"critic's {kind}": tree for kind, tree in policy_parameters(critic).items()}
        add("values", abstract_role(critic), Role.values, held, "values")
        if algorithm.bootstrap:
            add("last values", abstract_role(critic), Role.rewards, held, None)
        signals["returns"] = ()
    signals["advantages"] = ()
    if ENTROPY_COEFFICIENTS in objective.signals:
        signals[ENTROPY_COEFFICIENTS] = ()
    return batch(signals), programs, critic


def _other_teacher(roles: RunRoles, policy: TrainedRole) -> Role:
    from jaxtrain.session.teacher import teacher_role

    section = roles.config.teacher
    assert section is not None
    if section.path is None:
        return roles.role("teacher", policy.section, roles.frozen_mesh(section.devices))
    return teacher_role(roles)


def _sampling_programs(config: RunConfig, policy: TrainedRole, devices: Sequence[Any]) -> list[Program]:
    """Of one engine; there may be one on the devices of every process, all of which work at the same time."""
    section = config.rl
    assert section is not None
    meshes = sampling_meshes(section.placement, config.mesh, policy.mesh, devices)
    merged = merge.lower(policy.model, abstract_role(policy).params)
    programs = [Program("merge", merged, policy_parameters(policy), policy.mesh, 0.0, 0, 0, lambda place: None)]
    if not meshes:
        return programs  # Ray's workers sample
    mesh, shares = meshes[0], row_shares(meshes[0])
    slots, length = section.slots, config.data.max_length
    if slots % shares:
        raise ValueError(f"rl.slots={slots} must be a multiple of mesh.data x mesh.fsdp = {shares} of an engine")
    model = rollout_model(policy.model, mesh)
    model = replace(model, run=replace(model.run, rope_length=length))
    if mesh is policy.mesh:
        programs.append(_reshard(policy, model))
    params = engine_params(model)
    samples = -(-section.prompts * section.generations // len(meshes))
    prompts = -(-section.prompts // len(meshes))
    prompt_length = max(length - section.max_completion_length, 1)
    programs.append(_prefill(model, params, (slots, shares), prompts, prompt_length))
    rounds = -(-samples // slots)
    support = section.support if config.sampling.filtered else 0
    decode = decode_program(model, params, slots, length, support)
    never = _UNASKED if config.sampling.filtered else _UNASKED | {"_sample"}
    programs.append(decode._replace(times=rounds * section.max_completion_length, never=never))
    return programs


def engine_params(model: Model) -> Params:
    """The parameters of an engine as shapes: see `sample.capacity.place_params`."""
    dtype = model.run.dtype
    stacked = with_shardings(
        jax.eval_shape(lambda params: cast_matrices(params, dtype), model.abstract()), serving_shardings(model)
    )
    shapes = jax.eval_shape(model.unstack, stacked)

    def of_layer(leaf: jax.ShapeDtypeStruct, stacked: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        named: Any = stacked.sharding
        spec = jax.sharding.PartitionSpec(*named.spec[1:])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(named.mesh, spec))

    layers: Any = stacked["layers"]
    parts = (
        {part: jax.tree.map(of_layer, node, layers[part]) for part, node in each.items()} for each in shapes["layers"]
    )
    return {**stacked, "layers": tuple(parts)}


def decode_program(model: Model, params: Params, slots: int, columns: int, support: int = 0) -> Program:
    """A token of every slot, with as many columns of the cache as a sample may have."""
    mesh = model.run.mesh
    assert mesh is not None
    limits = EngineLimits(support=min(support, model.config.vocab_size))
    cache, marks = _buffers(model, slots, columns)
    tries, _ = join_tries(())
    state = engine.SlotState(*np.zeros((5, slots), np.int32))._replace(live=np.zeros(slots, np.bool_))
    host = (default_settings(slots), tries, state, (np.int32(limits.steps), np.int32(1)))
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), host)
    lowered = engine.with_options(model.run.compiler_options)[1].lower(model, limits, params, (cache, marks), *rest)
    flops = _forward_flops(model, slots, 1, head=True)
    inputs = {"engine's parameters": params, "cache": (cache, marks)}
    grouped = grouped_rows(model, mesh, slots)
    return Program("decode", lowered, inputs, mesh, flops, slots, slots, _decode_trips, grouped_rows=grouped)


def _decode_trips(place: str) -> int | None:
    """One token, of a loop over as many as a device call may generate."""
    return 1 if "sample/decode.py" in place else None


def _prefill(model: Model, params: Params, rooms: tuple[int, int], prompts: int, length: int) -> Program:
    """The largest prefill of prompts of `length` tokens, and how often it runs for `prompts` of them."""
    mesh, (slots, shares) = model.run.mesh, rooms
    assert mesh is not None and model.run.rope_length is not None
    bucket = bucket_for(bucket_lengths(model.run.rope_length, MIN_PROMPT), length)
    rows = prefill_rows(slots, shares, bucket)[-1]
    everywhere = replicated(mesh)
    tokens = jax.ShapeDtypeStruct((rows, bucket), np.int32, sharding=everywhere)
    lengths = jax.ShapeDtypeStruct((rows,), np.int32, sharding=everywhere)
    lowered = engine.with_options(model.run.compiler_options)[0].lower(model, params, tokens, lengths)
    inputs = {"engine's parameters": params}
    flops = _forward_flops(model, rows, bucket, head=False)
    calls, grouped = -(-prompts // rows), grouped_rows(model, mesh, rows * bucket)
    counts = rows, rows * bucket
    return Program("prefill", lowered, inputs, mesh, flops, *counts, lambda place: None, calls, grouped_rows=grouped)


def _forward_flops(model: Model, rows: int, length: int, *, head: bool) -> float:
    """Of a forward pass; in decoding of the matrices alone, since attention depends on what is in the cache."""
    segments = np.ones((rows, length), np.int32)
    flops = train_flops(model.config, segments, np.zeros(segments.shape, np.float32)) / 3
    return flops + (2.0 * rows * model.config.hidden_size * model.config.vocab_size if head else 0.0)


def _reshard(policy: TrainedRole, model: Model) -> Program:
    """The engine's copy of merged parameters on the trainer's devices."""
    base = split_adapters(policy.declared.target)[1]
    shapes = jax.eval_shape(lambda params: cast_matrices(params, model.run.dtype), model.abstract())
    placed = jax.tree.map(lambda shape, leaf: with_shardings(shape, leaf.sharding), shapes, base)
    mesh = policy.mesh
    return Program(
        "reshard", lay_out.lower(model, placed), {"merged parameters": placed}, mesh, 0.0, 0, 0, lambda place: None
    )


def _buffers(model: Model, slots: int, columns: int) -> Any:
    """See `sample.capacity.empty_buffers`."""
    layers, marks = jax.eval_shape(partial(empty_buffers, model, slots, columns))
    shardings, mesh = engine.cache_shardings(model, layers), model.run.mesh
    assert shardings is not None and mesh is not None
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(ROWS))
    return with_shardings(layers, shardings), with_shardings(marks, rows)
