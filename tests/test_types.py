import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxtrain.objectives.segments import segment_sums
from jaxtrain.types import Array, Batch, Mean, get_leaf

ROW = Batch(*(np.full((2, 3), number, np.int32) for number in range(4)))


def test_a_batch_goes_to_named_arrays_and_back():
    signals = {"a": np.ones((2, 3)), "signals.b": np.ones((2, 3, 4))}
    for batch in (ROW, ROW._replace(signals=signals), ROW._replace(signals=signals, bundle_ids=np.ones((2, 3)))):
        back = Batch.from_arrays(batch.arrays())
        assert back._fields == batch._fields and back.signals.keys() == batch.signals.keys()
        assert jax.tree.structure(back) == jax.tree.structure(batch)
        jax.tree.map(np.testing.assert_array_equal, back, batch)
    assert list(ROW.arrays()) == ["tokens", "positions", "segment_ids", "loss_weights"]


def test_map_reaches_every_array():
    batch = ROW._replace(signals={"a": np.ones((2, 3, 4))}, bundle_ids=np.ones((2, 3)))
    assert {name: array.shape for name, array in batch.map(lambda array: array[:1]).arrays().items()} == {
        name: (1, *array.shape[1:]) for name, array in batch.arrays().items()
    }


def test_an_array_is_of_numpy_or_of_jax():
    assert isinstance(np.ones(2), Array) and isinstance(jnp.ones(2), Array)
    assert not isinstance(1.0, Array) and not isinstance([1.0], Array)


def test_get_leaf_follows_a_path():
    tree = {"embed": {"weight": np.ones(3)}}
    assert get_leaf(tree, "embed", "weight") is tree["embed"]["weight"]
    with pytest.raises(AssertionError):
        get_leaf(tree, "embed")


def test_the_mean_of_nothing_is_0():
    assert Mean(np.float32(0), np.float32(0)).value == 0
    assert Mean(np.float32(6), np.float32(4)).value == 1.5


def test_a_wrong_shape_or_dtype_raises_in_the_tests():
    values, segments = jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32)
    assert segment_sums(values, segments).shape == (2, 3)
    for wrong in ((values, segments[:, :2]), (values[0], segments[0]), (values, values)):
        with pytest.raises(TypeCheckError, match=r"segment_ids|values"):
            segment_sums(*wrong)


@pytest.mark.parametrize(
    "name",
    [
        *("nn.decoder", "ops.attend", "ops.cpu.matmul", "parallel.sharding", "lora", "objectives.policy", "train.step"),
        *("sample.filters", "sample.decode", "roles.role", "data.packing"),
    ],
)
def test_signatures_are_checked_in_the_tests(name):
    module = importlib.import_module(f"jaxtrain.{name}")
    assert type(module.__loader__).__module__.startswith("jaxtyping"), "tests/conftest.py installs the import hook"
