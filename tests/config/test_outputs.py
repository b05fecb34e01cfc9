import pytest

from jaxtrain.config.outputs import CheckpointSection


def test_checkpoints_that_are_kept_are_saved():
    assert CheckpointSection(every=10, keep_every=30).keep_every == 30
    with pytest.raises(ValueError, match="keep_every=15 is not a multiple of every=10"):
        CheckpointSection(every=10, keep_every=15)
