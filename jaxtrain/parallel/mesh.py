"""The device mesh of a run, and the start-up of several hosts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxtrain.config import MeshSection
from jaxtrain.parallel.sharding import RULES, splits

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `AXES` over `devices` (default: all of this run), all of them `Auto`.

    On TPU the devices are ordered so that neighbours on an axis are neighbours on the wires. Several TPU slices,
    which only a slow network joins, are joined along "data".

    Raises ValueError, naming the keys and the number of devices, where the sizes do not multiply to that number.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _resolve(section, len(devices))
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform_of(mesh: Mesh | None) -> str:
    """The platform of its devices, or of JAX's default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """What `jax.jit(step, compiler_options=...)` is to be told on the platform of `mesh`.

    XLA:TPU cuts a matmul with a gathered operand into one piece per shard, to overlap the pieces with the gather. Under
    fsdp the contracted axis is the split one, so every piece rewrites the whole output: by the compiler's own estimate
    the Qwen3-8B step on 8 v5p chips takes 1.7 times the cycles that it takes with whole gathers.
    """
    if platform_of(mesh) == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return {}


def initialize_distributed(environ: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the job, if a launcher says that there are any. Call it before all else of JAX.

    TPU pods, Slurm and Open MPI are found by JAX itself; any other launcher sets JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process is left alone.

    Raises ValueError where only the first of those three is set.
    """
    # It would take SIGTERM from `train.preemption`, which handles the other signals too.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_COORDINATOR_ADDRESS" in environ:
        if not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= environ.keys():
            raise ValueError("JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be too")
        jax.distributed.initialize(
            coordinator_address=environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(environ["JAX_NUM_PROCESSES"]),
            process_id=int(environ["JAX_PROCESS_ID"]),
        )
    elif (
        len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in environ
        or int(environ.get("SLURM_NTASKS", "1")) > 1
        or int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    ):
        jax.distributed.initialize()


def _resolve(section: MeshSection, count: int) -> tuple[int, ...]:
    sizes = {axis: getattr(section, axis) for axis in AXES}
    for axis in ("expert", "tensor"):
        if sizes[axis] > 1 and not splits(RULES[section.preset], axis):
            raise ValueError(
                f"mesh.{axis}={sizes[axis]} splits nothing under mesh.preset={section.preset}; "
                f"use mesh.preset=fsdp_{axis} or mesh.{axis}=1"
            )
    given = {axis: size for axis, size in sizes.items() if size != -1}
    # "expert" and "tensor" go without saying where they are not in use.
    told = " x ".join(f"mesh.{axis}={size}" for axis, size in given.items() if size > 1 or axis in ("data", "fsdp"))
    product = math.prod(given.values())
    if "fsdp" not in given:
        if count % product:
            raise ValueError(f"{told} = {product} does not divide the {count} devices; {_nearest(section, count)}")
        sizes["fsdp"] = count // product
    elif product != count:
        raise ValueError(f"{told} = {product}, but there are {count} devices; {_nearest(section, count)}")
    return tuple(sizes.values())


def _nearest(section: MeshSection, count: int) -> str:
    """The change that helps: keep `tensor` and `expert` if they can be kept, then `data`; leave the rest to `fsdp`."""
    sizes, left = {}, count
    for axis in ("tensor", "expert", "data"):
        sizes[axis] = _nearest_divisor(getattr(section, axis), left)
        left //= sizes[axis]
    sizes["fsdp"] = left
    return "nearest: " + " ".join(f"mesh.{axis}={sizes[axis]}" for axis in AXES if axis != "expert" or sizes[axis] > 1)


def _nearest_divisor(wanted: int, count: int) -> int:
    return min((d for d in range(1, count + 1) if count % d == 0), key=lambda d: (abs(d - wanted), d))


def _arrange(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        data, *others = sizes
        if data % slices:
            raise ValueError(f"mesh.data={data} must be a multiple of the {slices} TPU slices that it joins")
        return mesh_utils.create_hybrid_device_mesh((data // slices, *others), (slices, *[1] * len(others)), devices)
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # no whole axis of the torus has one of the sizes: part of one must do
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
