"""Quantised kernels: how close, how small, and that they train adapters on a mesh as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.lora import join, merge_adapters, split_adapters
from jaxtrain.ops.project import project
from jaxtrain.ops.quantize import dense, project_quantized, quantize, quantize_kernels
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, param_specs
from jaxtrain.train.step import score

# Of normal weights in blocks of 64: relative error (root mean square), bytes a weight with its share of the scale.
QUALITY = {"int8": (0.007, 1 + 4 / 64), "nf4": (0.095, 0.5 + 4 / 64)}


def quantized(model, params, kind):
    adapters, base = split_adapters(params)
    return adapters, quantize_kernels(base, model.axes(), kind)


@pytest.mark.parametrize("kind", QUALITY)
def test_error_and_size_of_normal_weights(kind):
    kernel = 0.02 * jax.random.normal(jax.random.key(0), (2, 128, 256))
    held = quantize(kernel, ("layers", "embed", "mlp"), kind)
    error = jnp.linalg.norm(dense(held, jnp.float32) - kernel) / jnp.linalg.norm(kernel)
    most, size = QUALITY[kind]
    assert 0.5 * most < error < most
    assert held.shape == kernel.shape
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(held)) == size * kernel.size
    again = quantize(dense(held, jnp.float32), ("layers", "embed", "mlp"), kind)
    np.testing.assert_allclose(dense(again, jnp.float32), dense(held, jnp.float32), rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "rank"), [(("layers", "embed", "heads", "head_dim"), 1), (("layers", "heads", "head_dim", "embed"), 2)]
)
def test_the_product_and_its_gradient_are_those_of_the_dequantised_kernel(axes, rank):
    kernel = jax.random.normal(jax.random.key(0), (1, *{1: (24, 2, 16), 2: (2, 16, 24)}[rank]))
    held = jax.tree.map(lambda leaf: leaf[0], quantize(kernel, axes, "int8"))
    x = jax.random.normal(jax.random.key(1), (3, *kernel.shape[1 : rank + 1]))

    def loss(product, kernel):
        return lambda x: jnp.sum(jnp.sin(product(x, kernel, rank)))

    ours = jax.jit(jax.value_and_grad(loss(project_quantized, held)))(x)
    expected = jax.jit(jax.value_and_grad(loss(project, dense(held, jnp.float32))))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


def test_forward_mode_works_and_reverse_mode_saves_no_dequantised_kernel():
    kernel = jax.random.normal(jax.random.key(0), (1, 24, 32))
    held = jax.tree.map(lambda leaf: leaf[0], quantize(kernel, ("layers", "embed", "mlp"), "int8"))
    x, d_x = (jax.random.normal(jax.random.key(i), (3, 24)) for i in (1, 2))
    _, tangent = jax.jvp(lambda x: project_quantized(x, held, 1), (x,), (d_x,))
    np.testing.assert_allclose(tangent, d_x @ dense(held, jnp.float32), rtol=0, atol=1e-5)
    _, pull = jax.vjp(lambda x: project_quantized(x, held, 1), x)
    assert not [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= kernel.size and leaf.dtype == jnp.float32]


@pytest.mark.parametrize("kind", QUALITY)
def test_adapters_on_a_quantised_base_train_on_a_mesh_as_on_one_device(kind):
    batch = tiny.packed_batch([[9, 20], [14, 14], [30], [8, 8, 8]], 32)

    def loss_of(model):
        def loss(adapters, base):
            return -jnp.sum(score(model, join(adapters, base), batch).logp * batch.loss_weights)

        return jax.jit(jax.value_and_grad(loss))

    model = tiny.model(tiny.LORA, remat="full", intermediate_size=128)
    params = tiny.random_params(model)
    single = quantized(model, params, kind)
    value, grads = loss_of(model)(*single)
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2, fsdp=2), jax.devices()[:4])
    placed = jax.device_put(params, param_specs(model.axes(), params, RULES["fsdp_tensor"], mesh))
    sharded = quantized(model, placed, kind)
    q_proj = sharded[1]["layers"]["attn"]["q_proj"]["kernel"]
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(q_proj)} == {
        placed["layers"]["attn"]["q_proj"]["kernel"].sharding.spec
    }
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded[1]), jax.device_get(single[1]))
    split_value, split_grads = loss_of(tiny.model(tiny.LORA, mesh, "full", intermediate_size=128))(*sharded)
    np.testing.assert_allclose(split_value, value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(split_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(one).max())

    # What the model computes is what its dequantised and merged kernels compute.
    merged = merge_adapters(join(*single), tiny.LORA)
    plain = tiny.model(intermediate_size=128)
    np.testing.assert_allclose(
        model.hidden(join(*single), batch), plain.hidden(jax.tree.map(jnp.asarray, _dense(merged)), batch), atol=1e-3
    )


def _dense(tree):
    return {name: _dense(node) if isinstance(node, dict) else dense(node, jnp.float32) for name, node in tree.items()}


def test_a_mesh_that_cuts_through_blocks_is_an_error():
    model = tiny.model(tiny.LORA, intermediate_size=64)
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2))
    shardings = param_specs(model.axes(), model.abstract(), RULES["fsdp_tensor"], mesh)
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), model.abstract(), shardings
    )
    with pytest.raises(ValueError, match=r"shards of 32 along 'mlp', not a multiple of the block size 64"):
        quantized(model, shapes, "nf4")
