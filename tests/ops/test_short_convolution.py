import numpy as np

from jaxtrain.ops.short_convolution import next_tail, short_convolution

WIDTH = 4
RNG = np.random.default_rng(0)
X, KERNEL = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 13, 3, 2), (3, 2, WIDTH)))
STARTS = np.zeros((2, 13), bool)
STARTS[0, [2, 3, 9]] = STARTS[1, 0] = True
TAIL = RNG.normal(size=(2, WIDTH - 1, 3, 2)).astype(np.float32)


def test_each_token_sees_the_last_tokens_of_its_document():
    documents = np.cumsum(np.pad(STARTS, ((0, 0), (WIDTH - 1, 0))), 1)
    joined, expected = np.concatenate([TAIL, X], 1), np.zeros(X.shape)
    for row in range(2):
        for t in range(13):
            for back in range(WIDTH):
                if documents[row, WIDTH - 1 + t - back] == documents[row, WIDTH - 1 + t]:
                    expected[row, t] += KERNEL[..., WIDTH - 1 - back] * joined[row, WIDTH - 1 + t - back]
    np.testing.assert_allclose(short_convolution(X, KERNEL, STARTS, TAIL), expected, atol=1e-6)


def test_parts_of_a_row_with_padding_give_the_same():
    whole, tail, parts = short_convolution(X, KERNEL, STARTS, TAIL), TAIL, []
    for first, stop in ((0, 1), (1, 5), (5, 6), (6, 13)):
        padding = ((0, 0), (0, 2))
        part, starts = np.pad(X[:, first:stop], (*padding, (0, 0), (0, 0)), constant_values=9), STARTS[:, first:stop]
        starts = np.pad(starts, padding)
        parts.append(short_convolution(part, KERNEL, starts, tail)[:, : stop - first])
        tail = next_tail(part, starts, np.full(2, stop - first), tail)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-6)


def test_a_tail_is_of_the_last_document_and_padding_leaves_it_as_it_is():
    np.testing.assert_array_equal(next_tail(X, np.zeros_like(STARTS), np.zeros(2, int), TAIL), TAIL)
    tail = next_tail(X, STARTS, np.asarray([4, 13]), TAIL)
    assert not np.any(tail[0, :2])
    np.testing.assert_array_equal(tail[0, 2], X[0, 3])
    np.testing.assert_array_equal(tail[1], X[1, -3:])
