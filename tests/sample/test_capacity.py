"""The memory of the slots is foreseen to the byte, and matrices alone are cast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn.config import LayerKind, Rope
from jaxtrain.sample.capacity import cast_matrices, empty_buffers, place_params, slot_bytes

WINDOWED = (LayerKind(window=16, rope=Rope(theta=1e4)), *tiny.CONFIG.pattern[1:])


@pytest.mark.parametrize("pattern", [tiny.CONFIG.pattern, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("length", [12, 100])
def test_a_slot_takes_the_bytes_that_are_foreseen(pattern, length):
    model = tiny.model(pattern=pattern)
    buffers = jax.eval_shape(lambda: empty_buffers(model, 6, length))
    sizes = [leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(buffers)]
    assert sum(sizes) == 6 * slot_bytes(model, length)


def test_matrices_are_cast_and_all_else_stays():
    model = tiny.model(moe=tiny.MOE)
    cast = cast_matrices(tiny.random_params(model), np.dtype(jnp.bfloat16))
    leaves = jax.tree.leaves_with_path(cast)
    kinds = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.dtype for path, leaf in leaves}
    assert kinds["layers.attn.q_proj.kernel"] == kinds["embed.weight"] == jnp.bfloat16
    others = [path for path, kind in kinds.items() if kind == jnp.float32]
    assert any("router" in path for path in others) and any("norm" in path for path in others)


def test_placed_parameters_are_a_copy_with_a_tree_for_each_layer():
    model = tiny.model()
    params = tiny.random_params(model)
    placed = place_params(model, params)
    kernels = params["layers"]["mlp"]["up_proj"]["kernel"]
    for number, layer in enumerate(placed["layers"]):
        np.testing.assert_array_equal(layer["mlp"]["up_proj"]["kernel"], kernels[number])
    jax.tree.map(lambda leaf: leaf.delete(), params)
    assert np.isfinite(np.asarray(placed["embed"]["weight"])).all()
