"""bfloat16 rounding: the errors of engine and trainer relative to float32 are equal, and so is their difference."""

import os
from pathlib import Path

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxtrain.nn.block import Execution
from jaxtrain.nn.model import Model
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.train.step import score
from jaxtrain.types import Batch

SMOLLM2 = os.environ.get("JAXTRAIN_SMOLLM2")
SUBJECTS = ("rain", "a violin", "the moon", "bread", "a lighthouse", "rust", "honey", "a bicycle")
LENGTH = 128


@pytest.mark.skipif(not SMOLLM2, reason="JAXTRAIN_SMOLLM2 does not name a folder of SmolLM2-135M")
def test_engine_and_trainer_differ_only_by_bfloat16_noise(record_property):
    """Compares both with float32 and the same (rounded) weights, on samples of the engine at temperature 1."""
    assert SMOLLM2
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    chats = [[{"role": "user", "content": f"What is {subject}?"}] for subject in SUBJECTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    narrow = jnp.dtype("bfloat16")
    params, config, _ = hf_folders.load(Path(SMOLLM2), narrow)
    model = Model(config, run=Execution(narrow), param_dtype=narrow)
    engine = Engine(model, params, slots=8, max_length=LENGTH)
    asked = [Request(ids, SamplingParams(64, seed=0, stop_ids=[tokenizer.eos_token_id])) for ids in prompts]
    samples = [completion for (completion,) in engine.generate(asked)]

    tokens, segments = (np.zeros((len(prompts), LENGTH), np.int32) for _ in range(2))
    sampled = np.zeros(tokens.shape, np.float32)
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        end = len(prompt) + len(sample.ids)
        tokens[row, :end], segments[row, :end], sampled[row, len(prompt) : end] = [*prompt, *sample.ids], 1, 1
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch, scored = Batch(tokens, positions, segments, sampled), jax.jit(score, static_argnums=0)
    trainer = np.asarray(scored(model, params, batch).logp)[sampled > 0]
    exact = np.asarray(scored(Model(config), jax.tree.map(lambda leaf: leaf.astype("float32"), params), batch).logp)
    exact = exact[sampled > 0]
    engine_logps = np.concatenate([sample.raw_logps for sample in samples])

    of_engine, of_trainer, apart = (
        float(np.abs(one - other).mean())
        for one, other in ((engine_logps, exact), (trainer, exact), (engine_logps, trainer))
    )
    bias = float((engine_logps - trainer).mean())
    for name, value in {"of_engine": of_engine, "of_trainer": of_trainer, "apart": apart, "bias": bias}.items():
        record_property(name, value)
    print(f"{len(exact)} tokens: {of_engine=:.4f} {of_trainer=:.4f} {apart=:.4f} {bias=:.4f}")
    assert of_engine < 1.25 * of_trainer
    assert apart < 1.1 * np.hypot(of_engine, of_trainer)  # as two independent noises are
    assert abs(bias) < 0.01  # and it favours neither side
