"""The length of a run, and the warning of long rows."""

import warnings
from types import SimpleNamespace

import pytest

from jaxtrain.session.data import checked_length, warn_of_positions


def config(steps, warmup=0):
    return SimpleNamespace(train=SimpleNamespace(steps=steps), optimizer=SimpleNamespace(warmup_steps=warmup))


def test_the_length_is_train_steps_or_what_was_counted():
    assert checked_length(config(None), 7) == 7
    assert checked_length(config(5), 7) == 5
    with pytest.raises(ValueError, match=r"data\.train ends after step 7, .* and train\.steps=8"):
        checked_length(config(8), 7)
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps=9 is more than the 7 steps"):
        checked_length(config(None, warmup=9), 7)


@pytest.mark.parametrize(
    ("hf", "warned"),
    [
        ({"max_position_embeddings": 64}, True),
        ({"max_position_embeddings": 128}, False),
        ({"text_config": {"max_position_embeddings": 64}}, True),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {"factor": 4, "original_max_position_embeddings": 32},
            },
            False,
        ),
        ({}, False),
    ],
)
def test_rows_beyond_the_positions_of_the_model_are_warned_of(hf, warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_positions(hf, 100)
    assert [("data.max_length=100 is beyond the 64 positions" in str(each.message)) for each in seen] == [True] * warned
