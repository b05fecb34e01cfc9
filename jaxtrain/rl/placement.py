"""Where sampling happens: on the trainer's devices, on others of this process, or in other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from jaxtrain.types import Params


def make_meshes(
    placement: PlacementSection, section: MeshSection, devices: Sequence[Any] | None = None
) -> tuple[Mesh, Mesh | None]:
    """The trainer's mesh, and the one that samples (None: it is in other processes).

    Disjoint, the last `rollout_devices` sample, as many rows at a time as "tensor" leaves of them.
    Raises ValueError where none is left to train on, or a thread that samples would share devices with the trainer.
    """
    devices = list(jax.devices() if devices is None else devices)
    if placement.kind == "ray":
        return make_mesh(section, devices), None
    if placement.kind == "colocated":
        if placement.staleness and len(devices) > 1:
            # Two threads may start programs in a different order on each device; their collectives then never meet.
            raise ValueError(
                f"rl.placement.staleness={placement.staleness} samples beside the training, which on {len(devices)} "
                "devices needs rl.placement.kind=disjoint or ray"
            )
        mesh = make_mesh(section, devices)
        return mesh, mesh
    count = placement.rollout_devices
    assert count is not None
    if count >= len(devices):
        raise ValueError(f"rl.placement.rollout_devices={count} of {len(devices)} devices leaves none to train on")
    tensor = section.tensor if count % section.tensor == 0 else 1
    sampling = section.model_copy(update={"data": 1, "fsdp": -1, "tensor": tensor})
    return make_mesh(section, devices[:-count]), make_mesh(sampling, devices[-count:])


def make_sampler(
    placement: PlacementSection, spec: WorkerSpec, trainer: Model, params: Params, version: int, mesh: Mesh | None
) -> EngineSampler | RaySampler:
    """A sampler that has the trainer's `params` already. `mesh` is `make_meshes`' second; `spec.model` is set here."""
    spec = replace(spec, model=rollout_model(trainer, mesh))
    if placement.kind != "ray":
        sync = WeightSync(trainer, spec.model)
        return spec.build(sync(params).params, version, sync)
    sampler = RaySampler(
        spec, trainer, workers=placement.workers, seconds=placement.worker_seconds, resources=placement.resources
    )
    sampler.set_params(params, version)
    return sampler
