"""Comparison of two forward passes: statistics by position, and the place of the first departure."""

import numpy as np
import pytest

from converters.verify import Point, compare_logits, compare_values, first_mismatch

RNG = np.random.default_rng(0)


def test_spans_cover_all_positions_and_show_where_a_difference_lies():
    theirs = RNG.normal(size=(2, 100, 7))
    ours = theirs.copy()
    ours[1, 70, 2] += 0.5
    whole, *ranges = compare_logits(ours, theirs)
    assert (whole.start, whole.stop) == (0, 100)
    assert [(span.start, span.stop) for span in ranges] == [(0, 16), (16, 64), (64, 100)]
    assert [span.difference for span in ranges] == [0, 0, pytest.approx(0.5)]
    assert whole.difference == ranges[-1].difference
    assert whole.kl == pytest.approx(ranges[-1].kl * 36 / 100) and whole.median_kl == 0


def test_kl_is_that_of_the_distributions_whatever_is_added_to_all_logits():
    ours, theirs = RNG.normal(size=(2, 1, 1, 5))
    p, q = (np.exp(each) / np.exp(each).sum() for each in (theirs.ravel(), ours.ravel()))
    (span, _) = compare_logits(ours + 100, theirs)
    assert span.kl == pytest.approx((p * np.log(p / q)).sum())


def test_values_are_compared_by_token_whatever_the_order_of_heads():
    ours = RNG.normal(size=(2, 6, 4, 3))
    theirs = ours.swapaxes(1, 2).copy()
    theirs[1, :, 4] *= 1.1
    errors = compare_values(ours, theirs, (2, 6))
    assert np.argwhere(errors > 1e-12).tolist() == [[1, 4]]
    assert errors[1, 4] == pytest.approx(0.1 / 1.1)
    assert compare_values(ours, theirs[..., :2], (2, 6)) is None


def points(*entries):
    return [
        Point(path, f"model.{path}", side, 0.5 if position >= 0 else 0.0, position) for path, side, position in entries
    ]


def test_the_first_mismatch_is_in_the_module_or_between_two():
    same = [("layers.0", "in", -1), ("layers.0.q_proj", "in", -1)]
    inside = first_mismatch(points(*same, ("layers.0.q_proj", "out", 3), ("layers.0.o_proj", "in", 3)))
    assert (inside.where, inside.what, inside.position) == ("layers.0.q_proj", "", 3)
    between = first_mismatch(points(*same, ("layers.0.q_proj", "out", -1), ("layers.0.o_proj", "in", 5)))
    assert (between.where, between.what) == ("layers.0", "between q_proj and o_proj")
    assert "rope, mask, window" in str(between) and "from position 5 on" in str(between)
    assert first_mismatch(points(*same)) is None
