import numpy as np
import pytest

from jaxtrain.data.token_ids import from_token_ids

IDS = [3, 1, 2, 9]


def weights(**columns):
    return from_token_ids({"input_ids": IDS} | columns).loss_weights.tolist()


@pytest.mark.parametrize("column", ["completion_mask", "assistant_masks"])
def test_a_mask_says_what_is_trained(column):
    assert weights(**{column: [0, 0, 1, 1]}) == [0, 0, 1, 1]
    assert weights(**{column: [False, False, True, True]}) == [0, 0, 1, 1]
    assert weights(**{column: None}) == [1, 1, 1, 1]


def test_labels_and_masks_must_all_agree_on_a_token():
    labels = [-100, 1, 2, 9]
    assert weights(labels=labels, completion_mask=[1, 0, 1, 1], assistant_masks=[1, 1, 1, 0]) == [0, 0, 1, 0]


def test_weights_may_be_fractions():
    assert weights(loss_weights=[0, 0.25, 1, 2.5]) == [0, 0.25, 1, 2.5]
    assert weights(loss_weights=[0, 0.25, 1, 0], labels=[-100, 1, 2, 9], attention_mask=[1, 1, 1, 0]) == [0, 0.25, 1]


@pytest.mark.parametrize(
    "columns",
    [
        {"labels": [3, -100, 2, 9]},
        {"completion_mask": [1, 0, 1, 1]},
        {"assistant_masks": [1, 0, 1, 1]},
        {"attention_mask": [0, 0, 1, 1]},
    ],
)
def test_a_weight_on_a_token_that_another_column_excludes_is_refused(columns):
    with pytest.raises(ValueError, match=r"loss_weights\[1\] is 0.5, and another column .* excludes this token"):
        weights(loss_weights=[0, 0.5, 1, 1], **columns)


@pytest.mark.parametrize(("mask", "kept"), [([1, 1, 1, 1], IDS), ([0, 1, 1, 1], IDS[1:]), ([0, 1, 1, 0], IDS[1:3])])
def test_padding_at_the_ends_is_left_out(mask, kept):
    example = from_token_ids({"input_ids": IDS, "attention_mask": mask, "completion_mask": [0, 0, 1, 1]})
    assert example.input_ids.tolist() == kept
    assert example.loss_weights.tolist() == [float(token in (2, 9)) for token in kept]


def test_a_row_of_padding_is_empty():
    assert from_token_ids({"input_ids": IDS, "attention_mask": [0, 0, 0, 0]}).input_ids.tolist() == []


@pytest.mark.parametrize("value", [2**31, 2**32 + 1, 2**63, 10**30, -1, -(2**40)])
def test_ids_beyond_32_bits_do_not_wrap(value):
    with pytest.raises(ValueError, match=rf"input_ids\[2\]: {value} is not a token id"):
        from_token_ids({"input_ids": [1, 2, value]})


@pytest.mark.parametrize("value", [2**32 + 2, 2**32 - 100, -(2**32) - 100, 10**30])
def test_labels_beyond_32_bits_do_not_wrap(value):
    with pytest.raises(ValueError, match=rf"labels\[1\] is {value}, which must be"):
        from_token_ids({"input_ids": [1, 2], "labels": [1, value]})


def test_the_largest_id_is_one():
    assert from_token_ids({"input_ids": [0, 2**31 - 1]}).input_ids.tolist() == [0, np.iinfo(np.int32).max]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completion_mask": [0, 1]}, "completion_mask: 2 of them for 4 input_ids"),
        ({"assistant_masks": [0, 1, 2, 1]}, r"assistant_masks\[2\] is 2: a mask holds 0 and 1"),
        ({"assistant_masks": [0, 0.5, 1, 1]}, "assistant_masks must be a list of integers"),
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask marks padding between tokens"),
        ({"attention_mask": [1, None, 1, 1]}, "attention_mask must be a list of integers"),
        ({"input_ids": [True, False]}, "input_ids must be a list of integers"),
        ({"loss_weights": [0.5, 1]}, "loss_weights: 2 of them for 4 input_ids"),
        ({"loss_weights": [0.5, None, 1, 1]}, "loss_weights must be a list of numbers"),
        ({"loss_weights": 0.5}, "loss_weights must be a list of numbers"),
        ({"loss_weights": [0.5, -1, 1, 1]}, r"loss_weights\[1\] is -1.0: a weight is a number that is not negative"),
        ({"loss_weights": [0.5, float("nan"), 1, 1]}, r"loss_weights\[1\] is nan"),
        ({"loss_weights": [0.5, 1e39, 1, 1]}, r"loss_weights\[1\] is 1e\+39"),
    ],
)
def test_columns_that_do_not_fit_are_named(columns, message):
    with pytest.raises(ValueError, match=message):
        from_token_ids({"input_ids": IDS} | columns)
