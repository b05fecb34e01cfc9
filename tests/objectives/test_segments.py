import numpy as np

from jaxtrain.objectives.segments import segment_means, segment_sums

IDS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 0, 0]], np.int32)
RNG = np.random.default_rng(0)
VALUES, WEIGHTS = (RNG.normal(size=IDS.shape).astype(np.float32) for _ in range(2))


def each_segment(function):
    """`function(mask)` of the tokens of each segment, at these tokens."""
    out = np.zeros(IDS.shape)
    for row, ids in enumerate(IDS):
        for number in set(ids):
            out[row, ids == number] = function((row, ids == number))
    return out


def test_every_token_gets_the_sum_over_its_segment():
    expected = each_segment(lambda mask: VALUES[mask].sum())
    np.testing.assert_allclose(segment_sums(VALUES, IDS), expected, rtol=1e-5)


def test_a_mean_is_weighted_and_0_without_weight():
    weights = np.abs(WEIGHTS) * (IDS != 2)
    expected = each_segment(lambda mask: (VALUES[mask] * weights[mask]).sum() / (weights[mask].sum() or 1))
    means = segment_means(VALUES, weights, IDS)
    np.testing.assert_allclose(means, expected, rtol=1e-5)
    assert not means[IDS == 2].any()
