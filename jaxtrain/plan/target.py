"""The devices that a plan is for, by names such as `v5p:4x4x8` and `cpu:8`, and how they are made without them."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxtrain.observe.flops import peak_flops
from jaxtrain.plan.prices import CHIPS, GPUS, Chip, Gpu
from jaxtrain.plan.reading import Network

_EXAMPLES = "v5e:8x8, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h100:8, h200:8 or cpu:8"
_NODE = 8  # GPUs that NVLink connects
_PLUGINS = ("xla_cuda13", "xla_cuda12")  # of jax_plugins
# libtpu looks for the machine it runs on when it is loaded, and ends the process if it finds none.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a chip
}

# What XLA asks of a Hopper GPU, as its `GpuTargetConfigProto`.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {hbm}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 14 }}
device_description_str: "{kind}"
"""


@dataclass(frozen=True)
class Target:
    """Devices of one kind."""

    name: str  # as given
    kind: str  # jax's device_kind
    sizes: tuple[int, ...]  # chips along the axes of a slice, or the number of GPUs or CPU devices
    slices: int
    chip: Chip | Gpu | None  # None: a CPU, of which no time is predicted

    @property
    def chips(self) -> int:
        return math.prod(self.sizes) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s of a device; None for a CPU."""
        return peak_flops(self.kind)

    def network(self, mesh: jax.sharding.Mesh) -> Network:
        """An axis of n chips gives each of them two links if it is closed to a ring, else 2 (n - 1) / n on average."""
        assert self.chip is not None
        axes = {str(name): size for name, size in mesh.shape.items()}
        if isinstance(self.chip, Gpu):
            return Network(axes, self.chip.link * self.chip.collective)
        closed = self.chip.ring
        links = sum(2.0 if size >= closed else 2 * (size - 1) / size for size in self.sizes)
        return Network(axes, max(links, 1.0) * self.chip.link, self.slices)


def parse_target(name: str, slices: int = 1) -> Target:
    """The target that `name` describes. Loads nothing. Raises ValueError for an unknown one."""
    generation, _, sizes_text = name.partition(":")
    known = {chip.name: (kind, chip) for kind, chip in CHIPS.items()}
    gpus = {gpu.name: (kind, gpu) for kind, gpu in GPUS.items()}
    if generation not in (*known, *gpus, "cpu"):
        raise ValueError(f"--on {name}: unknown devices {generation!r}; use {_EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes_text):
        raise ValueError(f"--on {name}: give the number of chips along each axis, for example {_EXAMPLES}")
    sizes = tuple(int(size) for size in sizes_text.split("x"))
    if generation == "cpu":
        if len(sizes) > 1 or slices > 1:
            raise ValueError(f"--on {name}: cpu has a number of devices, no axes and no slices: cpu:8")
        return Target(name, "cpu", sizes, 1, None)
    if generation in gpus:
        if len(sizes) > 1 or slices > 1 or math.prod(sizes) > _NODE:
            raise ValueError(f"--on {name}: GPUs are planned within a node, by their number: {generation}:{_NODE}")
        kind, gpu = gpus[generation]
        return Target(name, kind, sizes, 1, gpu)
    kind, chip = known[generation]
    if len(sizes) != chip.torus:
        example = "x".join(["4"] * chip.torus)
        raise ValueError(f"--on {name}: a {generation} slice has {chip.torus} axes, for example {generation}:{example}")
    if slices < 1:
        raise ValueError(f"--slices {slices} must be at least 1")
    return Target(name, kind, sizes, slices, chip)


def target_devices(target: Target) -> Sequence[Any]:
    """Devices to compile for: of TPUs and GPUs they are descriptions, which their compilers make without a chip.

    Raises ValueError if the compiler is not installed, libtpu does not know the topology, or this process has too few
    CPU devices.
    """
    if target.chip is None:
        return _cpu_devices(target.devices)
    if isinstance(target.chip, Gpu):
        return _gpu_devices(target, target.chip)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--on {target.name}: programs for TPUs are compiled by libtpu, which is not installed: "
            'pip install "jaxtrain[tpu]" (no TPU is needed), or use --estimate, which compiles nothing'
        )
    from jax.experimental import topologies  # takes a second

    for key, value in _LIBTPU.items():
        os.environ.setdefault(key, value)
    options = {"num_slices": target.slices} if target.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options)
    except Exception as error:
        raise ValueError(f"--on {target.name}: libtpu has no such topology: {error}") from None
    assert len(found.devices) == target.devices, (target, len(found.devices))
    assert found.devices[0].device_kind == target.kind, found.devices[0].device_kind
    return found.devices


def _gpu_devices(target: Target, gpu: Gpu) -> Sequence[Any]:
    named = [f"jax_plugins.{name}" for name in _PLUGINS] if importlib.util.find_spec("jax_plugins") else []
    found = next((name for name in named if importlib.util.find_spec(name)), None)
    if found is None:
        raise ValueError(
            f"--on {target.name}: programs for GPUs are compiled by JAX's CUDA plugin, which is not installed: "
            'pip install "jaxtrain[cuda]" (no GPU is needed), or use --estimate, which compiles nothing'
        )
    plugin = importlib.import_module(found)
    plugin._load_nvidia_libraries()  # which JAX does only where it finds a GPU
    jax.devices("cpu")  # registers the plugin
    from jax.experimental import topologies

    description = _HOPPER.format(kind=target.kind, hbm=int(gpu.hbm * 1.06), bandwidth=int(gpu.bandwidth))
    try:
        topology = topologies.get_topology_desc(
            gpu.name, "cuda", target_config=description, topology=f"1x1x{target.devices}"
        )
    except Exception as error:
        raise ValueError(f"--on {target.name}: JAX's CUDA plugin makes no such devices: {error}") from None
    return topology.devices


def _cpu_devices(count: int) -> Sequence[Any]:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has initialized its devices already; the check below reports it
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--on cpu:{count}: this process already has {len(devices)} CPU devices: run `jaxtrain plan` as a command "
            "of its own, without --xla_force_host_platform_device_count in XLA_FLAGS"
        )
    return devices[:count]
