"""Where sampling happens: on the trainer's devices, on others of this process, or in other processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.config import MeshSection
from jaxtrain.config.rollouts import PlacementSection
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.ray_sampler import RaySampler
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import WeightSync, rollout_model
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.roles.role import Snapshot, TrainedRole
from jaxtrain.sample.requests import SamplingParams
from jaxtrain.session.session import Session


def trainer_devices(placement: PlacementSection) -> Sequence[Any]:
    """The devices that train: all, or under `disjoint` all but the last `rollout_devices`.

    Raises ValueError where none is left to train on, or a thread that samples would share devices with the trainer.
    """
    devices = jax.devices()
    if placement.kind == "colocated" and placement.staleness and len(devices) > 1:
        # Two threads may start programs in a different order on each device; their collectives then never meet.
        raise ValueError(
            f"rl.placement.staleness={placement.staleness} samples beside the training, which on {len(devices)} "
            "devices needs rl.placement.kind=disjoint or ray"
        )
    if placement.kind != "disjoint":
        return devices
    count = placement.rollout_devices
    assert count is not None
    if count >= len(devices):
        raise ValueError(f"rl.placement.rollout_devices={count} of {len(devices)} devices leaves none to train on")
    return devices[:-count]


def sampling_mesh(placement: PlacementSection, section: MeshSection, trainer: Mesh) -> Mesh | None:
    """The mesh of this process that samples; None: sampling is in other processes.

    Under `disjoint` the last `rollout_devices` sample, as many rows at a time as "tensor" leaves of them.
    """
    if placement.kind == "ray":
        return None
    if placement.kind == "colocated":
        return trainer
    count = placement.rollout_devices
    assert count is not None
    tensor = section.tensor if count % section.tensor == 0 else 1
    sampling = section.model_copy(update={"data": 1, "fsdp": -1, "tensor": tensor})
    return make_mesh(sampling, jax.devices()[-count:])


def make_sampler(session: Session, policy: TrainedRole) -> EngineSampler | RaySampler:
    """A sampler with the policy's parameters. It is closed with the run, and interrupted when the run shall stop."""
    section = session.config.rl
    assert section is not None
    mesh = sampling_mesh(section.placement, session.config.mesh, session.mesh)
    spec = WorkerSpec(
        rollout_model(policy.model, mesh),
        SamplingParams(
            max_tokens=section.max_completion_length,
            temperature=section.sampling.temperature,
            top_k=section.sampling.top_k,
            top_p=section.sampling.top_p,
            min_p=section.sampling.min_p,
            stop_ids=session.stop_ids(policy),
        ),
        session.config.run.seed,
        section.sampling.slots,
        session.config.data.max_length,
        session.tokenizer,
        support=section.sampling.support if section.sampling.filtered else 0,
        environment=section.environment,
    )
    sampler = build_sampler(section.placement, spec, policy.model, policy.snapshot())
    session.enter(closing(sampler))
    session.preemption.on_request(sampler.interrupt)
    return sampler


def build_sampler(
    placement: PlacementSection, spec: WorkerSpec, trainer: Model, snapshot: Snapshot
) -> EngineSampler | RaySampler:
    """A sampler with the weights of `snapshot`, which are those of the model `trainer`."""
    if placement.kind != "ray":
        sync = WeightSync(trainer, spec.model)
        return spec.build(sync(snapshot.params).params, snapshot.version, sync)
    sampler = RaySampler(
        spec, trainer, workers=placement.workers, seconds=placement.worker_seconds, resources=placement.resources
    )
    sampler.set_params(snapshot.params, snapshot.version)
    return sampler
