import jax.numpy as jnp
import numpy as np

from jaxtrain.ops.gpu.cudnn import segment_table


def test_the_table_has_the_start_and_length_of_every_run():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 3, 4, 5, 6]])
    starts, lengths, counts = segment_table(ids, 4)
    np.testing.assert_array_equal(counts, [3, 6])
    np.testing.assert_array_equal(starts[0], [0, 3, 5, -1, -1])
    np.testing.assert_array_equal(lengths[0], [3, 2, 1, -1])
    np.testing.assert_array_equal(lengths[1], [1, 1, 1, 1])  # more than the limit: the caller sees it by the count
