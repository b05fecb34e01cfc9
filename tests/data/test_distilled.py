import numpy as np
import pytest

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.distilled import IDS, LOGPS, DistilledEncoder
from jaxtrain.data.formats import Encoder

K = 2


def encoder(overlong: str) -> DistilledEncoder:
    data = DataSection.model_validate(
        {"train": SourceSection(path="x").model_dump(), "max_length": 4, "overlong": overlong}
    )
    return DistilledEncoder(Encoder(None, vocab_size=50), data, K)


def row(count: int) -> dict:
    """Seven tokens, the first two not trained."""
    ids = list(range(10, 17))
    logps = np.arange(count * K, dtype=np.float32)
    return {"input_ids": ids, "labels": [-100, -100, *ids[2:]], IDS: logps.astype(int).tolist(), LOGPS: logps.tolist()}


@pytest.mark.parametrize(("overlong", "trained"), [("truncate", [2]), ("split", [2, 2])])
def test_the_signals_stand_at_the_trained_tokens_of_every_piece(overlong, trained):
    found = encoder(overlong)(row(sum(trained)))
    assert [np.count_nonzero(example.loss_weights) for example in found.items] == trained
    at = 0
    for example, count in zip(found.items, trained, strict=True):
        places = np.flatnonzero(example.loss_weights)
        expected = np.zeros((len(example.input_ids), K))
        expected[places] = np.arange(at * K, (at + count) * K).reshape(-1, K)
        np.testing.assert_array_equal(example.signals[LOGPS], expected)
        np.testing.assert_array_equal(example.signals[IDS], expected)
        at += count
    assert found.events == ({"truncate": "truncated"}.get(overlong, overlong),)


def test_log_probabilities_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="has the log-probabilities of 3 tokens, and 2 are trained"):
        encoder("truncate")(row(3))
