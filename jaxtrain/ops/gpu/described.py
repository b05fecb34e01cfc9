"""Lowering for GPUs that are described and not there, as `jaxtrain plan --on h100:8` does.

JAX's kernels ask the process's own GPU what it can do, and ours are used only after a comparison on it. Here the
answers are those of a Hopper GPU, on which every kernel agrees with XLA.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

_CAPABILITY = (9, 0)
_MULTIPROCESSORS = 132

described: ContextVar[bool] = ContextVar("described", default=False)
"""Whether programs are lowered for GPUs that are not there."""


@contextlib.contextmanager
def hopper_gpus() -> Iterator[None]:
    """Programs that are lowered within are for Hopper GPUs that are not there."""

    def at_least(capability: str) -> bool:
        return tuple(map(int, capability.split("."))) <= _CAPABILITY

    def equal(capability: str) -> bool:
        return tuple(map(int, capability.split("."))) == _CAPABILITY

    token = described.set(True)
    try:
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(cudnn, "check_compute_capability", at_least))
            patches.enter_context(mock.patch.object(cudnn, "is_cuda_compute_capability_equal", equal))
            with contextlib.suppress(ImportError):  # absl-py, which only mixtures of experts need
                kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
                patches.enter_context(mock.patch.object(kernel, "jax", _WithMultiprocessors()))
            yield
    finally:
        described.reset(token)


class _WithMultiprocessors:
    """The module `jax`, with devices that have multiprocessors."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def devices(self) -> list[Any]:
        return [SimpleNamespace(core_count=_MULTIPROCESSORS)]
