"""Within `hopper_gpus` JAX's kernels and ours are told of GPUs that are not there, and afterwards they are not."""

import importlib

import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxtrain.ops import ragged
from jaxtrain.ops.gpu.described import described, hopper_gpus


def test_kernels_are_told_of_hopper_gpus_only_within():
    x, kernels = jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), jnp.bfloat16)
    asked = cudnn.check_compute_capability
    with hopper_gpus():
        assert described.get()
        assert cudnn.check_compute_capability("9.0") and not cudnn.check_compute_capability("10.0")
        assert cudnn.is_cuda_compute_capability_equal("9.0")
        assert ragged._uses_gpu_kernels(x, kernels)
        assert not ragged._uses_gpu_kernels(x.astype(jnp.float32), kernels)
    assert not described.get() and cudnn.check_compute_capability is asked
    assert not ragged._uses_gpu_kernels(x, kernels)


def test_the_kernel_of_experts_finds_multiprocessors():
    name = "jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu"
    pytest.importorskip("absl", reason="JAX's test utilities, which the kernel imports, need absl-py")
    kernel = importlib.import_module(name)
    with hopper_gpus():
        assert kernel.jax.devices()[0].core_count == 132
        assert kernel.jax.numpy is jnp
    assert kernel.jax is importlib.import_module("jax")
