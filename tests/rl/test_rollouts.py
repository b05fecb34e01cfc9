import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.data.packing import make_row
from jaxtrain.rl.rollouts import NO_ID, pack, pack_parts, support_metrics


def random_trajectories(count, seed=0):
    sizes = np.random.default_rng(seed).integers(1, 12, (count, 2))
    return [trajectory(int(p), int(c), number=i // 4, sample=i % 4, seed=seed) for i, (p, c) in enumerate(sizes)]


def test_every_trajectory_is_one_segment_and_its_values_come_back():
    trajectories = random_trajectories(23)
    trajectories[5] = trajectories[5]._replace(loss_mask=np.arange(len(trajectories[5].completion_ids)) % 2 == 0)
    packed = pack(trajectories, 32, rows=16).spread(advantages=[t.raw_logps for t in trajectories])
    batch = packed.batch
    assert batch.tokens.shape == (16, 32)
    for t, (row, start, stop) in zip(trajectories, packed.spans, strict=True):
        segment = batch.segment_ids[row, start]
        whole = batch.segment_ids[row] == segment
        np.testing.assert_array_equal(batch.tokens[row, whole], [*t.prompt.ids, *t.completion_ids])
        np.testing.assert_array_equal(batch.positions[row, whole], np.arange(t.length))
        np.testing.assert_array_equal(batch.loss_weights[row, whole], [*np.zeros(len(t.prompt.ids)), *t.loss_mask])
        np.testing.assert_array_equal(batch.signals["sampler_logps"][row, start:stop], t.sampler_logps)
    assert (batch.segment_ids > 0).sum() == sum(t.length for t in trajectories)
    assert np.count_nonzero(batch.signals["advantages"]) == sum(len(t.completion_ids) for t in trajectories)
    for t, values in zip(trajectories, packed.gather(batch.signals["advantages"]), strict=True):
        np.testing.assert_array_equal(values, t.raw_logps)


def test_supports_of_several_widths_are_filled_up():
    one, other, none = (trajectory(2, 3, sample=i) for i in range(3))
    one = one._replace(supports=np.arange(6, dtype=np.int32).reshape(3, 2))
    other = other._replace(supports=np.arange(9, dtype=np.int32).reshape(3, 3))
    packed = pack([one, other, none], 16)
    first, second, third = packed.gather(packed.batch.signals["supports"])
    np.testing.assert_array_equal(first, [[0, 1, NO_ID], [2, 3, NO_ID], [4, 5, NO_ID]])
    np.testing.assert_array_equal(second, other.supports)
    assert (third == NO_ID).all()


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_numbers_of_rows_have_few_sizes_and_little_padding(multiple):
    needed = {}
    for count in range(1, 129):
        trajectories = [trajectory(1, 7, sample=i) for i in range(count)]
        (packed,) = pack_parts([trajectories], 8, multiple)
        needed[count] = len(packed.batch.tokens)
        assert needed[count] % multiple == 0
        assert needed[count] >= count
        assert needed[count] < max((count + multiple) * 1.25 + multiple, 5 * multiple)
    assert len({rows for rows in needed.values() if rows >= 32 * multiple}) <= 9


def test_parts_are_packed_once_and_into_equally_many_rows(monkeypatch):
    trajectories = random_trajectories(23)
    parts = [trajectories[:4], trajectories[4:]]
    made = []
    monkeypatch.setattr("jaxtrain.rl.rollouts.make_row", lambda *args: made.append(args) or make_row(*args))
    first, second = pack_parts(parts, 32, multiple=4)
    rows = len(second.batch.tokens)
    assert first.batch.tokens.shape == second.batch.tokens.shape == (rows, 32) and rows % 4 == 0
    assert len(made) == 2 * rows
    for part, packed in zip(parts, (first, second), strict=True):
        alone = pack(part, 32, rows=rows)
        assert packed.spans == alone.spans
        np.testing.assert_array_equal(packed.batch.tokens, alone.batch.tokens)


def test_a_trajectory_that_does_not_fit_is_an_error():
    with pytest.raises(AssertionError, match="21 tokens does not fit"):
        pack([trajectory(10, 11)], 20)


def test_a_full_support_is_counted():
    """Counts filtered tokens of the model where the filters may have kept more tokens than the support holds."""
    assert support_metrics([trajectory()]) == {}
    t = trajectory(length=4, loss_mask=np.array([1, 1, 0, 1], bool))
    t = t._replace(supports=np.array([[1, 2], [3, -1], [-1, -1], [4, 5]], np.int32))
    assert support_metrics([t, trajectory()]) == {"sampling/support_full": pytest.approx(2 / 3)}
