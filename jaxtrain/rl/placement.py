"""Where sampling happens: on the trainer's devices, on others of this process, or in other processes."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.config import MeshSection
from jaxtrain.config.rl import RLSection
from jaxtrain.config.rl_parts import PlacementSection
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import engine_mesh
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.ray_sampler import RaySampler
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import WeightSync, rollout_model
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.roles.role import Snapshot, TrainedRole
from jaxtrain.session.session import Session
from jaxtrain.train.lockstep import Agreement


def trainer_devices(placement: PlacementSection, devices: Sequence[Any] | None = None) -> Sequence[Any]:
    """The devices that train: all, or under `disjoint` all but the last `rollout_devices` of each process.

    `devices`: all of the run; default: those of JAX. Raises ValueError where none is left to train on, or a thread that
    samples would share devices with the trainer.
    """
    devices = jax.devices() if devices is None else devices
    if placement.kind == "colocated" and placement.staleness and len(devices) > 1:
        # Two threads may start programs in a different order on each device; their collectives then never meet.
        raise ValueError(
            f"rl.placement.staleness={placement.staleness} samples while training, which on {len(devices)} "
            "devices needs rl.placement.kind=disjoint or ray"
        )
    if placement.kind != "disjoint":
        return devices
    count = placement.rollout_devices
    assert count is not None
    of_processes = _by_process(devices)
    if fewest := [len(own) for own in of_processes if count >= len(own)]:
        whose = "devices" if len(of_processes) == 1 else "devices of a process"
        raise ValueError(f"rl.placement.rollout_devices={count} of {fewest[0]} {whose} leaves none to train on")
    return [device for own in of_processes for device in own[:-count]]


def sampling_meshes(
    placement: PlacementSection, section: MeshSection, trainer: Mesh, devices: Sequence[Any] | None = None
) -> tuple[Mesh, ...]:
    """The meshes of the engines of all processes; none: sampling is in other processes.

    Under `disjoint` the last `rollout_devices` of each process sample, as many rows at a time as "tensor" leaves of
    them. Otherwise each process has an engine on its devices, or `processes_per_engine` have one together.

    `devices`: all of the run, which say by themselves how many processes it has; default: those of JAX.

    Raises ValueError where the processes cannot be grouped so.
    """
    devices, each = jax.devices() if devices is None else devices, placement.processes_per_engine
    processes = len({device.process_index for device in devices})
    if processes % each:
        raise ValueError(
            f"rl.placement.processes_per_engine={each} does not divide the {processes} processes of the run"
        )
    if placement.kind == "ray":
        return ()
    if placement.kind == "disjoint":
        count = placement.rollout_devices
        assert count is not None
        return tuple(engine_mesh(section, own[-count:]) for own in _by_process(devices))
    return (trainer,) if processes == each else _trainer_parts(section, trainer, processes // each)


def _trainer_parts(section: MeshSection, trainer: Mesh, parts: int) -> tuple[Mesh, ...]:
    """The trainer's devices as meshes of adjacent processes."""
    devices = [device for own in _by_process(trainer.devices.flat) for device in own]
    size = len(devices) // parts
    return tuple(engine_mesh(section, devices[at : at + size]) for at in range(0, len(devices), size))


def _by_process(devices: Iterable[Any]) -> list[list[Any]]:
    """Of each process, in the order of their ids."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return [list(own) for _, own in groupby(ordered, key=lambda device: device.process_index)]


def make_sampler(session: Session, policy: TrainedRole, trained: Sequence[TrainedRole]) -> EngineSampler | RaySampler:
    """A sampler with the policy's parameters. It is closed with the run, and interrupted when the run shall stop.

    With `rl.placement.memory: phased` the optimizers' states of the roles `trained` wait on the host meanwhile, and the
    sampler has no parameters until the first rollout.

    Raises ValueError for a placement that several processes do not have, or whose engines the processes cannot form.
    """
    config, section = session.config, session.config.rl
    assert section is not None
    placement = section.placement
    check_processes(section)
    meshes = sampling_meshes(placement, config.mesh, session.mesh)
    mesh = meshes[jax.process_index() // placement.processes_per_engine % len(meshes)] if meshes else None
    spec = WorkerSpec(
        rollout_model(policy.model, mesh),
        replace(config.sampling, max_tokens=section.max_completion_length, stop_ids=session.stop_ids(policy)),
        config.run.seed,
        section.slots,
        config.data.max_length,
        session.tokenizer,
        support=section.support if config.sampling.filtered else 0,
        environment=section.environment,
        in_turns=placement.staleness == 0,  # only then is a resumed run bit-identical
        deal=Deal.of_run(placement.processes_per_engine),
        template_kwargs=session.config.data.chat_template_kwargs,
        date=session.config.data.date,
        mesh=config.mesh,
    )
    copies: tuple[Mesh, ...] = ()
    if len(meshes) > 1:
        disjoint = placement.kind == "disjoint"
        copies = _trainer_parts(config.mesh, session.mesh, len(meshes)) if disjoint else meshes
    phased = placement.memory == "phased"
    for role in trained if phased else ():
        role.wait_on_host()
    sampler = build_sampler(placement, spec, policy.model, policy.snapshot(), copies)
    if phased:
        assert isinstance(sampler, EngineSampler)
        sampler.release()
    if placement.processes_per_engine > 1:
        assert isinstance(sampler, EngineSampler) and mesh is not None
        sampler.agree_on_interrupts(Agreement(session.preemption, mesh).check)
    session.enter(closing(sampler))
    session.preemption.on_request(sampler.interrupt)
    return sampler


def check_processes(section: RLSection) -> None:
    """Raises ValueError for a placement that a run of several processes cannot have."""
    placement, processes = section.placement, jax.process_count()
    if processes == 1:
        return
    if placement.kind == "ray" and placement.workers % processes:
        raise ValueError(
            f"rl.placement.workers={placement.workers} must be a multiple of the {processes} processes of the run, "
            "each of which has as many workers"
        )


def build_sampler(
    placement: PlacementSection, spec: WorkerSpec, trainer: Model, snapshot: Snapshot, copies: tuple[Mesh, ...] = ()
) -> EngineSampler | RaySampler:
    """A sampler with the weights of `snapshot`, which are those of the model `trainer`.

    `copies`: as in `WeightSync`.
    """
    if placement.kind != "ray":
        sync = WeightSync(trainer, spec.model, copies)
        return spec.build(sync(snapshot.params).params, snapshot.version, sync)
    workers = placement.workers // jax.process_count()
    sampler = RaySampler(
        spec, trainer, workers=workers, seconds=placement.worker_seconds, resources=placement.resources
    )
    sampler.set_params(snapshot.params, snapshot.version)
    return sampler
