import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.sample.decode import greedy
from jaxtrain.types import Batch

PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 90)), [3, 1]]


@pytest.fixture(scope="module")
def model_and_params():
    model = tiny.model()
    return model, tiny.random_params(model)


def argmax_of_the_whole_row(model, params, prompt, count):
    """Greedy decoding without a cache, one forward pass of everything per token."""
    ids = list(prompt)
    for _ in range(count):
        tokens = np.array([ids], np.int32)
        positions = np.arange(len(ids), dtype=np.int32)[None]
        batch = Batch(tokens, positions, np.ones_like(tokens), np.ones(tokens.shape, np.float32))
        ids.append(int(jnp.argmax(model.logits(params, model.hidden(params, batch)[0, -1]))))
    return ids[len(prompt) :]


def test_cached_rows_of_mixed_length_equal_uncached_ones(model_and_params):
    model, params = model_and_params
    answers = greedy(model, params, PROMPTS, max_new_tokens=4, stop_ids=[], rows=3)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == argmax_of_the_whole_row(model, params, prompt, 4)


def test_an_answer_ends_before_its_first_stop_token(model_and_params):
    model, params = model_and_params
    whole = greedy(model, params, PROMPTS, max_new_tokens=6, stop_ids=[])
    stop = whole[1][2]
    for answer, stopped in zip(whole, greedy(model, params, PROMPTS, max_new_tokens=6, stop_ids=[stop]), strict=True):
        assert stopped == (answer[: answer.index(stop)] if stop in answer else answer)


def test_an_empty_prompt_is_named(model_and_params):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        greedy(*model_and_params, [[1], []], max_new_tokens=2, stop_ids=[])
