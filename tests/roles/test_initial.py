import jax
import numpy as np
import tiny

from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.config.model import LoraSection
from jaxtrain.lora import join
from jaxtrain.ops.quantize import Quantized, dense
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.initial import initial_params


def drawn(seed=0, **section):
    section = ModelSection(config=tiny.HF_CONFIG, **section)
    declared = declare(section, make_mesh(MeshSection()), "fsdp")
    return declared, *initial_params(section, declared, seed)


def equal(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_random_parameters_are_those_that_were_declared():
    declared, adapters, base = drawn()
    assert adapters == {}
    jax.tree.map(lambda leaf, target: np.testing.assert_equal(_kind(leaf), _kind(target)), base, declared.target)
    assert equal(base, drawn()[2]) and not equal(base, drawn(seed=1)[2])


def test_new_adapters_do_not_change_the_model():
    declared, adapters, base = drawn(lora=LoraSection(rank=2), compute_dtype="float32")
    plain, _, _ = drawn(compute_dtype="float32")
    params = join(adapters, base)
    jax.tree.map(lambda leaf, target: np.testing.assert_equal(_kind(leaf), _kind(target)), params, declared.target)
    assert any(leaf.any() for leaf in jax.tree.leaves(adapters))
    batch = tiny.packed_batch([[9, 5]] * 8, 16)
    hidden = jax.jit(declared.model.hidden)(params, batch)
    np.testing.assert_allclose(hidden, jax.jit(plain.model.hidden)(base, batch), atol=1e-6)


def test_a_quantised_base_is_near_the_one_that_was_drawn():
    _, _, base = drawn(lora=LoraSection(rank=2))
    _, _, quantised = drawn(lora=LoraSection(rank=2), quantize="int8")
    kernel, exact = (tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (quantised, base))
    assert isinstance(kernel, Quantized)
    error = np.abs(dense(kernel, np.float32) - exact)
    assert 0 < error.max() <= np.abs(exact).max() / 127
    assert equal(quantised["embed"], base["embed"])


def _kind(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding
