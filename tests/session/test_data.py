"""The length of a run, the warning of long rows, and the line at its end."""

import warnings
from types import SimpleNamespace

import pytest

from jaxtrain.session.data import checked_length, summary, warn_of_positions


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


def test_a_run_that_ends_early_is_warned_of(caplog):
    metrics = {"epoch": 2.0, "data/examples": 1200.0, "num_tokens": 34567.0, "learning_rate": 1e-4}
    assert summary(10, 10, metrics) == "trained 10 of 10 steps, 2.00 epochs, 1,200 examples, 34,567 tokens"
    assert caplog.text == ""
    assert summary(4, 10, metrics).startswith("trained 4 of 10 steps")
    assert "exhausted after step 4 of 10: the learning rate was still 0.0001" in caplog.text
