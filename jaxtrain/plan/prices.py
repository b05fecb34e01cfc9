"""Every constant that a prediction rests on: the chips, and the prices of what the compiler gives no estimate for.

Peak FLOP/s are those of `observe.flops`, by which MFU is defined.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtrain.plan.hlo import Instruction, Module, array_sizes, shape_bytes


class Chip(NamedTuple):
    """What is known of one device of a TPU."""

    name: str
    clock: float  # Hz, of the compiler's estimated cycles
    hbm: float  # bytes that a program can use
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s of one link between chips, one way
    torus: int  # the number of axes of a topology
    ring: int  # an axis of at least so many chips is closed to a ring
    attention: float  # the share of the peak that splash attention reaches
    devices: int = 1  # JAX devices of a chip
    host_link: float = 16e9  # bytes/s between HBM and the host's memory: PCIe, shared by the chips of a host


# Bandwidths: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of each version. Attention: 60 % is
# usual on v5p; on v6e a public MaxText profile shows 19 % forward and 32 % backward at heads of 128 (its matrix units
# are 256 wide). Keys: jax's device_kind.
CHIPS = {
    "TPU v5": Chip("v5p", 1.75e9, 95.7e9, 2.765e12, 9e10, torus=3, ring=4, attention=0.6),
    "TPU v5 lite": Chip("v5e", 1.5e9, 16e9, 8.2e11, 4.5e10, torus=2, ring=16, attention=0.6),
    "TPU v6 lite": Chip("v6e", 1.75e9, 32e9, 1.64e12, 9e10, torus=2, ring=16, attention=0.25),
    "TPU7x": Chip("tpu7x", 2.2e9, 96e9, 3.7e12, 9e10, torus=3, ring=4, attention=0.25, devices=2),
}


class Gpu(NamedTuple):
    """What is known of a GPU in a node of eight that NVLink connects. The shares are predictions from published figures
    of large kernels; none was measured by us.
    """

    name: str
    hbm: float  # bytes
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s over NVLink, one way
    matmul: float = 0.70  # the share of the peak that many matmuls in a row reach
    attention_forward: float = 0.55  # that cuDNN's attention reaches (arXiv:2407.08608)
    attention_backward: float = 0.45
    grouped: float = 0.55  # that Mosaic's grouped matmul reaches beside partial tiles: a guess, nothing is published
    stream: float = 0.85  # of the bandwidth that element-wise kernels reach
    collective: float = 0.75  # of the link that NCCL reaches within a node
    latency: float = 15e-6  # seconds of a collective
    launch: float = 2e-6  # seconds of a kernel
    multiprocessors: int = 132
    devices: int = 1
    host_link: float = 25e9  # bytes/s between HBM and the host's memory: PCIe 5


GPUS = {
    "NVIDIA H100 80GB HBM3": Gpu("h100", 80e9, 3.35e12, 450e9),
    "NVIDIA H200": Gpu("h200", 141e9, 4.8e12, 450e9),
}

GROUPED_MATMUL = 0.5  # the share of the peak of a Mosaic kernel over ragged groups: a guess, nothing is published

DCN = 6.25e9  # bytes/s of a device between slices: 50 Gbit/s, a quarter of the 200 Gbit/s of a host of four chips

_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products of a kernel of splash attention, each of 2 N H T T FLOPs without the causal mask."""
_FUSED_DKV = 5  # where the same kernel computes dq

# Custom calls that move or compute nothing of their own, by target.
FREE_CALLS = {
    *("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "ConcatBitcast", "BitcastSplit"),
    "ZeroCrop",  # zeros the padding of the last tile, in place
    *("PrepareAsyncCallStart", "PrepareAsyncCallDone", "GatherScatterIndicesBitpacked"),
    *("AssumeGatherIndicesInBound", "LayoutConstraint", "annotate_device_placement", "MoveToHost", "MoveToDevice"),
}


class UnpricedCallError(ValueError):
    """A custom call whose cost is not in the tables of `plan/prices.py`."""


class CallPrice(NamedTuple):
    kernel: str
    flops: float  # that are needed, causal attention counted by half
    seconds: float


def call_price(
    call: Instruction, module: Module, computation: str, chip: Chip, peak: float, grouped_rows: int | None = None
) -> CallPrice:
    """The price of a custom call of a Mosaic kernel. Raises UnpricedCallError for an unknown one.

    `grouped_rows`: the rows of a grouped matmul that belong to a group, if not all of them do. It skips the others.
    """
    text = f"{call.name} {call.operation}"  # not its operands, which may be named after other kernels
    kernel = next((name for name in _SPLASH if name in text), None)
    if kernel is not None:
        return _splash(kernel, call, module, computation, chip, peak)
    kernel = next((name for name in ("tgmm", "gmm", "ragged_dot") if name in text), None)
    if kernel is not None:
        rows, flops = _grouped(call, module, computation)
        flops *= min(rows, grouped_rows or rows)
        moved = shape_bytes(call.shape) + sum(shape_bytes(module.shape(computation, name)) for name in call.operands)
        return CallPrice(kernel, flops, max(flops / peak / GROUPED_MATMUL, moved / chip.bandwidth))
    raise UnpricedCallError(
        f"the custom call {call.name} ({call.target}, {module.where(call)}, {call.operation or 'no name'}) has no "
        "price: add one to jaxtrain/plan/prices.py, by its FLOPs and bytes"
    )


def row_bytes(fusion: Instruction, module: Module) -> float:
    """Bytes that gathers and scatters of rows in a fusion read and write, at the full speed of HBM."""
    computation = fusion.called("calls") or ""
    total = 0.0
    for each in module.computations.get(computation, ()):
        if each.opcode == "gather":
            total += 2 * shape_bytes(each.shape)
        elif each.opcode == "scatter":  # reads updates and rows, and writes rows
            total += 3 * shape_bytes(module.shape(computation, each.operands[-1]))
    return total


def _splash(kernel: str, call: Instruction, module: Module, computation: str, chip: Chip, peak: float) -> CallPrice:
    """Causal FLOPs over the peak.

    The first operands of floats are queries and keys, [..., heads, tokens, head width]. Where a row is split over
    devices the queries are those of a device, which attend to half of all keys of the row on average.
    """
    operands = [sizes for name in call.operands for sizes in array_sizes(module.shape(computation, name), floats=True)]
    queries, keys_of_row, *_ = (sizes for sizes in operands if len(sizes) >= 3)
    tokens = keys_of_row[-2]
    products = _SPLASH[kernel]
    if kernel == "splash_mha_dkv":
        results = [sizes for sizes in array_sizes(call.shape) if math.prod(sizes) >= math.prod(queries)]
        keys = [sizes for sizes in array_sizes(call.shape) if len(sizes) >= 3]
        products = _FUSED_DKV if len(keys) > 2 and results else products
    flops = products * 2 * math.prod(queries) * tokens / 2
    return CallPrice(kernel, flops, flops / peak / chip.attention)


def _grouped(call: Instruction, module: Module, computation: str) -> tuple[int, float]:
    """The rows of a product of rows [m, k] with matrices [groups, k, n], or of rows [m, k] and [m, n] to such matrices;
    and the FLOPs of a row, 2 k n."""
    operands = [sizes for name in call.operands for sizes in array_sizes(module.shape(computation, name))]
    matrices = [sizes for sizes in [*operands, *array_sizes(call.shape)] if len(sizes) == 3]
    rows = [sizes for sizes in operands if len(sizes) == 2]
    if not rows or not matrices:
        raise UnpricedCallError(f"the grouped matmul {call.name} ({module.where(call)}) has operands {operands}")
    return rows[0][0], 2.0 * math.prod(matrices[0][1:])
