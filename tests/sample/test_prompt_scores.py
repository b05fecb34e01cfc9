"""Scores of a prompt are those with which its tokens are generated."""

import numpy as np
import pytest
import tiny

from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, Request, SamplingParams

SIZES = {"num_layers": 1, "pattern": tiny.CONFIG.pattern[:1]}


def test_a_generated_text_has_the_same_scores_as_a_prompt():
    model = tiny.model(**SIZES)
    limits = EngineLimits(4, alternatives=3)
    engine = Engine(model, tiny.random_params(model), slots=2, max_length=96, limits=limits)
    prompt = [1, 2, 3]
    params = SamplingParams(max_tokens=60, seed=1, alternatives=3)
    ((completion,),) = engine.generate([Request(prompt, params)])
    scores = engine.score_prompt([*prompt, *completion.ids.tolist()], alternatives=3)
    start = len(prompt) - 1
    assert len(scores.logps) == start + len(completion.ids) > 32
    np.testing.assert_allclose(scores.logps[start:], completion.raw_logps, atol=1e-4)
    np.testing.assert_allclose(scores.alternatives.logps[start:], completion.alternatives.logps, atol=1e-4)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.score_prompt([])
    assert engine.score_prompt([5]).logps.shape == (0,)
