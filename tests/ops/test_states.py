import numpy as np

from jaxtrain.data.packing import make_row, stack_rows
from jaxtrain.ops.states import predicting_states
from jaxtrain.types import Example


def example(ids):
    return Example(np.array(ids, np.int32), np.float32(np.array(ids) > 9))


def test_the_last_token_of_a_prompt_predicts_both_answers():
    """Steps of training with them are compared in tests/train/test_shared_prompts.py."""
    pairs = [(example([1, 2, 10, 11]), example([1, 2, 12])), (example([3, 13, 14, 15]), example([3, 16]))]
    batch = stack_rows([make_row(pairs, 16, share_prefixes=True)])
    places = np.arange(16.0).reshape(1, 16, 1)
    found = np.asarray(predicting_states(places, batch))[0, :, 0]
    # Rows: 1 2 | 10 11 | 12 | 3 | 13 14 15 | 16
    assert batch.tokens[0, :10].tolist() == [1, 2, 10, 11, 12, 3, 13, 14, 15, 16]
    expected = np.arange(16.0)
    expected[3], expected[8] = 1, 5
    np.testing.assert_array_equal(found, expected)
