"""The device mesh of a run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MeshSection
from jaxtrain.parallel.sharding import RULES, splits

AXES = ("data", "fsdp", "expert", "context", "tensor")


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `AXES`, of type `Auto`, over `devices` (default: all devices of the run).

    On TPU, devices that are adjacent on an axis are adjacent on the interconnect. Several TPU slices, which a slower
    network connects, are combined along "data".

    Raises ValueError, naming the keys and the number of devices, if the product of the sizes is not that number.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple(mesh_sizes(section, len(devices)).values())
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def engine_mesh(section: MeshSection, devices: Sequence[Any]) -> Mesh:
    """A sampler's mesh: split over "tensor" and "expert" as in `section`, as far as the number of devices permits."""
    sizes, remaining = {}, len(devices)
    for axis in ("tensor", "expert"):
        wanted = getattr(section, axis)
        sizes[axis] = wanted if remaining % wanted == 0 else 1
        remaining //= sizes[axis]
    return make_mesh(section.model_copy(update={"data": 1, "fsdp": -1, **sizes}), devices)


def platform_of(mesh: Mesh | None) -> str:
    """The platform of the mesh's devices; without a mesh, of JAX's default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


CompilerOptions = tuple[tuple[str, str | int | float | bool], ...]
"""Options of XLA, by name: pairs, since a model that has them is a static argument of compiled functions."""


def compiler_options(mesh: Mesh | None, given: CompilerOptions = ()) -> dict[str, Any]:
    """The `compiler_options` of `jax.jit` for a step on the platform of `mesh`; the run's own are `given`.

    XLA:TPU splits a matmul with a gathered operand into one product per shard, to overlap them with the gather. With
    fsdp the contracted axis is sharded, so every one of these products rewrites the whole output: by the compiler's
    estimate the Qwen3-8B step on 8 v5p chips takes 1.7 times as many cycles as with complete gathers.
    """
    if platform_of(mesh) == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000", **dict(given)}
    return dict(given)


def check_compiler_options(mesh: Mesh, given: CompilerOptions) -> None:
    """Raise ValueError, naming the option, if the compiler of the mesh's devices refuses one."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    for name, value in given:
        probe = jax.jit(lambda x: x + 1, compiler_options={name: value})
        lowered = probe.lower(jax.ShapeDtypeStruct((), np.float32, sharding=everywhere))
        try:
            lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"model.compiler_options.{name}={value!r} is refused by the compiler for {platform_of(mesh)}: "
                f"{str(error).splitlines()[0]}"
            ) from error


def default_head_chunk(mesh: Mesh) -> int:
    """Tokens of a chunk of the head on the devices of `mesh`.

    Fewer and larger chunks read and write the head's gradient less often. By the compiler's estimate 2048 instead of
    512 take a sixth off the head of an 8B model on v5p. v5e has 16 GB of memory, of which the logits of 2048
    tokens would take several.
    """
    large = platform_of(mesh) in ("tpu", "gpu") and mesh.devices.flat[0].device_kind != "TPU v5 lite"
    return 2048 if large else 512


def mesh_sizes(section: MeshSection, count: int) -> dict[str, int]:
    """The sizes of `AXES`, in their order, over `count` devices.

    Raises ValueError, naming the keys, if their product is not that number.
    """
    sizes = {axis: getattr(section, axis) for axis in AXES}
    for axis in ("expert", "tensor"):
        if sizes[axis] > 1 and not splits(RULES[section.preset], axis):
            raise ValueError(
                f"mesh.{axis}={sizes[axis]} shards no parameter under mesh.preset={section.preset}; "
                f"use mesh.preset=fsdp_{axis} or mesh.{axis}=1"
            )
    given = {axis: size for axis, size in sizes.items() if size != -1}
    # "expert", "context" and "tensor" are shown only if they are used.
    shown = " x ".join(f"mesh.{axis}={size}" for axis, size in given.items() if size > 1 or axis in ("data", "fsdp"))
    product = math.prod(given.values())
    if "fsdp" not in given:
        if count % product:
            raise ValueError(f"{shown} = {product} does not divide the {count} devices; {_nearest(section, count)}")
        sizes["fsdp"] = count // product
    elif product != count:
        raise ValueError(f"{shown} = {product}, but there are {count} devices; {_nearest(section, count)}")
    return sizes


def _nearest(section: MeshSection, count: int) -> str:
    """The nearest valid sizes: `tensor`, `context`, `expert` and `data` are kept if possible, in this order."""
    sizes, remaining = {}, count
    for axis in ("tensor", "context", "expert", "data"):
        sizes[axis] = _nearest_divisor(getattr(section, axis), remaining)
        remaining //= sizes[axis]
    sizes["fsdp"] = remaining
    shown = [axis for axis in AXES if axis not in ("expert", "context") or sizes[axis] > 1]
    return "nearest: " + " ".join(f"mesh.{axis}={sizes[axis]}" for axis in shown)


def _nearest_divisor(wanted: int, count: int) -> int:
    return min((d for d in range(1, count + 1) if count % d == 0), key=lambda d: (abs(d - wanted), d))


def _arrange(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        data, *others = sizes
        if data % slices:
            raise ValueError(f"mesh.data={data} must be a multiple of the number of TPU slices, {slices}")
        return mesh_utils.create_hybrid_device_mesh((data // slices, *others), (slices, *[1] * len(others)), devices)
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # no axis of the torus has one of the sizes, so an axis is split
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
