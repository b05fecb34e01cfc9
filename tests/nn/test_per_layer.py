"""The inputs of layers are made of the token and of its embedding, by the published formula."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxtrain.nn.per_layer import PerLayerInputs

SIZES = {"per_layer_width": 8}


def test_inputs_are_those_of_the_formula():
    model = tiny.model(**SIZES)
    params = tiny.random_params(model)["per_layer"]
    module = tiny.build(PerLayerInputs, model.config, rngs=tiny.nnx.Rngs(0))
    tiny.nnx.update(module, params)
    tokens = np.asarray([[3, 7, 3]])
    x = np.random.default_rng(0).standard_normal((1, 3, model.config.hidden_size)).astype(np.float32)
    projected = np.einsum("btd,dlp->btlp", x, params["proj"]["kernel"]) / np.sqrt(x.shape[-1])
    normed = projected / np.sqrt((projected**2).mean(-1, keepdims=True) + model.config.norm_eps)
    embedded = np.asarray(params["weight"])[tokens] * np.sqrt(8)
    expected = (normed * params["norm"]["scale"] + embedded) / np.sqrt(2)
    np.testing.assert_allclose(module(jnp.asarray(x), tokens), expected.transpose(2, 0, 1, 3), atol=1e-5)


def test_every_layer_depends_on_its_own_input_and_padded_tokens_have_none():
    model = tiny.model(**SIZES)
    params, batch = model.init(jax.random.key(0)), tiny.packed_batch([[9]], 9)
    assert not np.any(params["per_layer"]["weight"][model.config.vocab_size :])

    def loss(table):
        changed = {**params, "per_layer": {**params["per_layer"], "weight": table}}
        return jnp.sin(model.hidden(changed, batch)).sum()

    grad = np.asarray(jax.jit(jax.grad(loss))(params["per_layer"]["weight"]))
    used = np.unique(batch.tokens)
    assert np.all(np.any(grad[used], -1))  # of every token in every layer
    assert not np.any(np.delete(grad, used, 0))
