import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtrain.ops.gpu import ragged

interpret = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


@pytest.mark.parametrize("sizes", [[70, 0, 129, 20], [0, 256, 0, 0], [1, 2, 3, 4]])
def test_the_interpreted_kernel_multiplies_each_group_by_its_matrix(sizes):
    pytest.importorskip("absl")
    rng = np.random.default_rng(0)
    x, kernels = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((256, 64), (4, 64, 64)))
    counts = jnp.asarray(sizes, jnp.int32)
    with interpret.force_gpu_interpret_mode():
        y = ragged.grouped_matmul(x, kernels, counts)
    np.testing.assert_allclose(np.float32(y), np.float32(lax.ragged_dot(x, kernels, counts)), rtol=0.01, atol=0.05)
    assert not np.asarray(y[sum(sizes) :]).any()


def test_without_a_gpu_the_kernels_are_not_taken():
    assert jax.default_backend() == "cpu"
    assert not ragged.kernels_agree(lax.ragged_dot, lambda x, g, sizes: x)


def test_a_kernel_that_does_not_compile_is_reported_and_not_taken(monkeypatch, caplog):
    """On a host that takes itself for one with a GPU: Mosaic kernels do not lower for its CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not ragged.kernels_agree.__wrapped__(lax.ragged_dot, lax.ragged_dot)
    assert "are not used" in caplog.text


@pytest.mark.parametrize(("width", "supported"), [(2880, True), (768, True), (100, False)])
def test_widths_are_multiples_of_a_block(width, supported):
    assert ragged.supports(jnp.zeros(1, jnp.bfloat16), 2048, width) == supported
    assert not ragged.supports(jnp.zeros(1, jnp.float32), 2048, width)
