"""What one step of training does, as the tests of steps compare it."""

import jax
import numpy as np


def assert_same(one, other):
    """`one` and `other` are pairs of the changes of the parameters and a step's report."""
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
    for name, metric in one[1].means.items():
        np.testing.assert_allclose(metric.value, other[1].means[name].value, rtol=2e-5, err_msg=name)
