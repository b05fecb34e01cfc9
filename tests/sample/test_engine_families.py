"""For every family, the engine's log-probabilities equal those of the trainer's forward pass."""

import hf_folders
import jax
import numpy as np
import pytest

from jaxtrain.nn.model import Model
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, Request, SamplingParams
from jaxtrain.train.step import score
from jaxtrain.types import Batch

LENGTH = 64  # one bucket of prompts and cache; the cases' windows are 37
PROMPTS = [np.random.default_rng(length).integers(0, 101, length) for length in (50, 33, 45, 7)]


# Cases of one family whose caches or positions differ from those of its last one.
OTHER_CACHES = ("llama-3.1-rope", "deepseek-v3", "gemma4", "gemma4-keys-as-values")


@pytest.mark.parametrize("case", (*hf_folders.ONE_OF_EACH, *OTHER_CACHES))
def test_the_engines_log_probabilities_equal_the_forward_pass(case, tmp_path):
    """More prompts than slots, some longer than the windows, others that become longer; half of them greedy.

    Both slots are refilled at once, so that each program compiles once.
    """
    params, config, _ = hf_folders.load(hf_folders.save(tmp_path, case))
    model = Model(config)
    asked = [Request(prompt, SamplingParams(12, seed=1, temperature=index % 2)) for index, prompt in enumerate(PROMPTS)]
    engine = Engine(model, params, slots=2, max_length=LENGTH, limits=EngineLimits(6))
    samples = [sample for (sample,) in engine.generate(asked)]

    tokens, segments = (np.zeros((len(PROMPTS), LENGTH), np.int32) for _ in range(2))
    weights = np.zeros(tokens.shape, np.float32)
    for row, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        end = len(prompt) + 12
        tokens[row, :end], segments[row, :end], weights[row, len(prompt) : end] = [*prompt, *sample.ids], 1, 1
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    scores = jax.jit(score, static_argnums=0)(model, params, Batch(tokens, positions, segments, weights))
    for row, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        span = slice(len(prompt), len(prompt) + 12)
        np.testing.assert_allclose(sample.raw_logps, scores.logp[row, span], atol=1e-4, rtol=0)
        assert row % 2 or np.asarray(scores.correct)[row, span].all()  # the greedy ones


def test_a_slot_that_is_given_to_another_prompt_starts_from_no_state(tmp_path):
    """A prompt of one token has no prefill, and its slot still holds the state of the one before; nor may a prompt be
    copied from a slot whose state has gone on."""
    params, config, _ = hf_folders.load(hf_folders.save(tmp_path, "qwen3.5"))
    model = Model(config)
    asked = [Request(prompt, SamplingParams(5, temperature=0)) for prompt in (PROMPTS[3], [7], PROMPTS[3])]
    engine = Engine(model, params, slots=1, max_length=32, limits=EngineLimits(5))
    (first,), (short,), (again,) = engine.generate(asked)
    assert first.ids.tolist() == again.ids.tolist()
    ((fresh,),) = Engine(model, params, slots=1, max_length=32, limits=EngineLimits(5)).generate(asked[1:2])
    assert short.ids.tolist() == fresh.ids.tolist()
    np.testing.assert_allclose(short.raw_logps, fresh.raw_logps, atol=1e-6)
