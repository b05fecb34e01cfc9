"""A leaf and its stored array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.train.leaves import describe, named_leaves, raw_leaves, raw_struct, show, unraw

TREE = {"params": {"embed": jnp.ones((4, 2), jnp.bfloat16)}, "moments": [jnp.zeros(3)], "key": jax.random.key(7)}


def test_names_are_the_dotted_paths():
    assert set(named_leaves(TREE)) == {"params.embed", "moments.0", "key"}


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(AssertionError, match="same name"):
        named_leaves({"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


def test_a_description_is_of_shape_and_dtype():
    assert show(describe(TREE["params"]["embed"])) == "bfloat16[4, 2]"


def test_stored_arrays_give_the_leaves_back():
    leaves = named_leaves(TREE)
    raw = raw_leaves(leaves)
    assert raw["key"].dtype == jnp.uint32
    for name, leaf in leaves.items():
        assert (raw_struct(leaf).shape, raw_struct(leaf).dtype) == (raw[name].shape, raw[name].dtype)
        back = unraw(raw[name], leaf)
        assert back.dtype == leaf.dtype
        assert np.array_equal(raw_leaves({name: back})[name], raw[name])
