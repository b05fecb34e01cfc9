import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shapes_and_axes_describe_the_initial_parameters(lora, tied):
    model = tiny.model(lora, tied=tied)
    params, shapes, axes = model.init(jax.random.key(0)), model.abstract(), model.axes()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    ranks = jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)


def test_merging_adapters_keeps_the_hidden_states():
    model, batch = tiny.model(tiny.LORA), tiny.packed_batch([[9, 20], [14, 14]], 32)
    params = tiny.random_params(model)
    merged, kernels = model.merged(params)
    assert merged.lora is None and model.base_frozen and not merged.base_frozen
    np.testing.assert_allclose(merged.hidden(kernels, batch), model.hidden(params, batch), atol=1e-4)


def test_unstacked_layers_prefill_as_stacked_ones():
    model, batch = tiny.model(), tiny.packed_batch([[9, 20]], 32)
    params = tiny.random_params(model)
    layers = model.unstack(params)
    assert isinstance(layers["layers"], tuple) and model.unstack(layers) is layers
    columns = (batch.tokens, batch.positions, batch.segment_ids)
    one, other = model.prefill(params, *columns), model.prefill(layers, *columns)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(one) == 3


def test_logits_have_no_padded_vocabulary():
    model = tiny.model()
    params = tiny.random_params(model)
    assert model.logits(params, jnp.ones((2, 3, 64))).shape == (2, 3, 101)
