import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.project import project, project_on_table

SHAPES = {
    "widening": ((3, 5, 4), (4, 7), 1),
    "narrowing": ((3, 5, 7), (7, 4), 1),
    "into heads": ((3, 5, 4), (4, 2, 6), 1),
    "out of heads": ((3, 5, 2, 6), (2, 6, 4), 2),
}


@pytest.mark.parametrize(("x_shape", "kernel_shape", "rank"), SHAPES.values(), ids=SHAPES)
def test_value_and_both_gradients_are_tensordots(x_shape, kernel_shape, rank):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, kernel_shape))
    cotangent = jnp.asarray(rng.normal(size=(3, 5, *kernel_shape[rank:])), jnp.float32)
    actual, pull = jax.vjp(lambda x, kernel: project(x, kernel, rank), x, kernel)
    expected, pull_expected = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, rank), x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    for a, e in zip(jax.jit(pull)(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("x_shape", "kernel_shape", "rank"), SHAPES.values(), ids=SHAPES)
def test_forward_mode_gives_the_tangent(x_shape, kernel_shape, rank):
    rng = np.random.default_rng(0)
    shapes = (x_shape, kernel_shape) * 2
    x, kernel, d_x, d_kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    _, tangent = jax.jvp(lambda x, kernel: project(x, kernel, rank), (x, kernel), (d_x, d_kernel))
    expected = jnp.tensordot(d_x, kernel, rank) + jnp.tensordot(x, d_kernel, rank)
    np.testing.assert_allclose(tangent, expected, rtol=0, atol=1e-5)


def test_second_derivatives_and_vmapped_gradients_are_those_of_a_tensordot():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 5, 4), (4, 2)))

    def hessian_and_gradients(product):
        def loss(x, kernel):
            return jnp.tanh(product(x, kernel, 1)).sum()

        return jax.hessian(loss, 1)(x, kernel), jax.vmap(jax.grad(loss, 1), (0, None))(x, kernel)

    for a, e in zip(hessian_and_gradients(project), hessian_and_gradients(jnp.tensordot), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)


def test_a_frozen_kernel_costs_no_product_in_forward_mode():
    x, kernel = jnp.ones((8, 4)), jnp.ones((4, 6))
    text = jax.jit(lambda x: jax.jvp(lambda x: project(x, kernel, 1), (x,), (x,))).lower(x).as_text()
    assert text.count("stablehlo.dot_general") == 2, text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_is_projected_on_in_float32(dtype):
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 5, 4), (7, 4)))
    expected = jnp.einsum("btd,vd->btv", *(each.astype(jnp.float32) for each in (x, table)))
    for project_it in (project_on_table, jax.jit(project_on_table)):
        actual = project_it(x, table)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("of", ["gradient", "table"])
@pytest.mark.parametrize(("platform", "barriers"), [("cpu", True), ("tpu", False)])
def test_only_a_cpu_transposes_by_itself(platform, barriers, of):
    def loss(x, kernel):
        return project(x, kernel, 1).sum()

    run, kernel = (jax.grad(loss, 1), (4, 6)) if of == "gradient" else (project_on_table, (6, 4))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16, 4), kernel)]
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,))
    assert ("optimization_barrier" in lowered.as_text()) == barriers
