"""Layers that differ in their parts: what a loop covers, and that it computes what the layers do one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn.stack import LayerSpan, Loop, in_periods, longest_loop
from jaxtrain.train.step import score

DENSE = dataclasses.replace(tiny.KIND, dense=True)
LOCAL = dataclasses.replace(tiny.KIND, window=5)
PATTERNS = {
    "first-dense": (DENSE, tiny.KIND, LOCAL, tiny.KIND),
    "every-second-dense-and-one-more": (DENSE, LOCAL, DENSE, tiny.KIND, DENSE),
}


@pytest.mark.parametrize(
    ("kinds", "loop"),
    [
        ("aaaa", Loop(0, 1, 4)),
        ("a", Loop(0, 1, 1)),
        ("aaabaaabaaab", Loop(0, 4, 3)),
        ("abbbbb", Loop(1, 1, 5)),
        ("aabababc", Loop(1, 2, 3)),
        ("abc", Loop(0, 1, 1)),
    ],
)
def test_the_loop_with_the_fewest_compiled_layers(kinds, loop):
    assert longest_loop(tuple(kinds)) == loop


def test_a_span_has_the_rows_of_its_layers_only():
    stacked = {"all": jnp.arange(5), "odd": {"x": jnp.asarray([1, 3])}}
    layers_of = {"all": (0, 1, 2, 3, 4), "odd": (1, 3)}
    span = LayerSpan(1, (("all", "odd"), ("all",)))
    found = jax.tree.map(int, span.unstacked(span.select(stacked, layers_of)))
    assert found == [{"all": 1, "odd": {"x": 1}}, {"all": 2}]
    assert LayerSpan(4, (("all",),)).select(stacked, layers_of).keys() == {"all"}
    np.testing.assert_array_equal(in_periods(jnp.arange(6), 3), [[0, 1], [2, 3], [4, 5]])


@pytest.mark.parametrize(("name", "remat"), [("first-dense", "none"), ("every-second-dense-and-one-more", "full")])
def test_a_loop_over_unlike_layers_computes_what_they_do_one_by_one(name, remat):
    pattern = PATTERNS[name]
    model = tiny.model(moe=tiny.MOE, pattern=pattern, num_layers=len(pattern), remat=remat)
    batch = tiny.packed_batch([[12]], 12)
    params = tiny.random_params(model)
    assert len(params["layers"]["input_norm"]["scale"]) == len(pattern)
    assert len(params["layers"]["dense_mlp"]["up_proj"]["kernel"]) == pattern.count(DENSE)

    def alone(params):
        """Every layer by itself, as in decoding."""
        return model.extend(params, *batch[:3], model.empty_cache(1, 12))[0]

    def looped(params):
        return model.hidden(params, batch)

    def loss(hidden):
        def of(params):
            x = hidden(params)
            return jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)), x

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    ((_, x), grads), ((_, expected), expected_grads) = (loss(hidden)(params) for hidden in (looped, alone))
    np.testing.assert_allclose(x, expected, atol=2e-5)
    for (path, one), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max() + 1e-6, err_msg=str(path))


def test_the_statistics_of_routers_are_those_of_the_mixtures_in_order():
    pattern = PATTERNS["every-second-dense-and-one-more"]
    model = tiny.model(moe=tiny.MOE, pattern=pattern, num_layers=5)
    batch, params = tiny.packed_batch([[9, 20], [14, 14]], 32), tiny.random_params(model)
    seen = []
    model.watch(params, batch, lambda path, side, x: seen.append((path, x)) if path.endswith("mlp.router") else None)
    logits = [x for (path, x), side in zip(seen, ("in", "out") * 2, strict=True) if side == "out"]
    assert [path for path, _ in seen[::2]] == ["layers.1.mlp.router", "layers.3.mlp.router"]
    routing = model.forward(params, batch)[1]
    real = (batch.segment_ids > 0)[..., None]
    for layer, each in enumerate(logits):
        expected = np.where(real, jax.nn.softmax(each), 0).sum((0, 1))
        np.testing.assert_allclose(routing.probability[layer], expected, rtol=1e-4)
    assert np.isfinite(score(model, params, batch).logp).all()
