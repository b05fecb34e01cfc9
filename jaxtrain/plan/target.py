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
from jaxtrain.plan.prices import CHIPS, Chip
from jaxtrain.plan.reading import Network

_GPUS = ("h100", "h200")
_EXAMPLES = "v5e:8x8, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4 or cpu:8"
# libtpu looks for the machine it runs on when it is loaded, and ends the process if it finds none.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a chip
}


@dataclass(frozen=True)
class Target:
    """Devices of one kind."""

    name: str  # as given
    kind: str  # jax's device_kind
    sizes: tuple[int, ...]  # chips along the axes of a slice, or the number of CPU devices
    slices: int
    chip: Chip | None  # None: a CPU, of which no time is predicted

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
        closed = self.chip.ring
        links = sum(2.0 if size >= closed else 2 * (size - 1) / size for size in self.sizes)
        axes = {str(name): size for name, size in mesh.shape.items()}
        return Network(axes, max(links, 1.0) * self.chip.link, self.slices)


def parse_target(name: str, slices: int = 1) -> Target:
    """The target that `name` describes. Loads nothing. Raises ValueError for an unknown one."""
    generation, _, sizes_text = name.partition(":")
    if generation in _GPUS:
        raise ValueError(
            f"--on {name}: GPUs are not planned yet. XLA gives no time for a GPU's kernels, and the prices of cuDNN's "
            f"and Mosaic's are not in plan/prices.py; use {_EXAMPLES}"
        )
    known = {chip.name: (kind, chip) for kind, chip in CHIPS.items()}
    if generation not in (*known, "cpu"):
        raise ValueError(f"--on {name}: unknown devices {generation!r}; use {_EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes_text):
        raise ValueError(f"--on {name}: give the number of chips along each axis, for example {_EXAMPLES}")
    sizes = tuple(int(size) for size in sizes_text.split("x"))
    if generation == "cpu":
        if len(sizes) > 1 or slices > 1:
            raise ValueError(f"--on {name}: cpu has a number of devices, no axes and no slices: cpu:8")
        return Target(name, "cpu", sizes, 1, None)
    kind, chip = known[generation]
    if len(sizes) != chip.torus:
        example = "x".join(["4"] * chip.torus)
        raise ValueError(f"--on {name}: a {generation} slice has {chip.torus} axes, for example {generation}:{example}")
    if slices < 1:
        raise ValueError(f"--slices {slices} must be at least 1")
    return Target(name, kind, sizes, slices, chip)


def target_devices(target: Target) -> Sequence[Any]:
    """Devices to compile for: of a TPU they are descriptions, which libtpu makes without a chip.

    Raises ValueError if libtpu is not installed, does not know the topology, or this process has too few CPU devices.
    """
    if target.chip is None:
        return _cpu_devices(target.devices)
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


def _cpu_devices(count: int) -> Sequence[Any]:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has made its devices before; the check below says so
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--on cpu:{count}: this process already has {len(devices)} CPU devices: run `jaxtrain plan` as a command "
            "of its own, without --xla_force_host_platform_device_count in XLA_FLAGS"
        )
    return devices[:count]
