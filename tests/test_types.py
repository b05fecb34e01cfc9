import jax
import numpy as np

from jaxtrain.types import Batch

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
