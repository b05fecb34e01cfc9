"""Our models equal those of transformers: tiny random ones of every kind, and a real one."""

import os
import subprocess
import sys
from pathlib import Path

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtrain.nn.block import Execution
from jaxtrain.nn.model import Model
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.types import Batch

LENGTH = 600  # short prompts hide mistakes in rope
SMOLLM2 = os.environ.get("JAXTRAIN_SMOLLM2")
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="JAXTRAIN_SMOLLM2 does not name a folder of SmolLM2-135M")


def our_logits(folder: Path | str, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    params, config, _ = hf_folders.load(Path(folder), jnp.dtype(dtype))
    model = Model(config, run=Execution(jnp.dtype(dtype)))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch = Batch(tokens, positions, ones, ones.astype(np.float32))
    return np.asarray(jax.jit(lambda params: model.logits(params, model.hidden(params, batch)))(params))


def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def random_tokens(vocab_size: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (2, length)).astype(np.int32)


# Those of the others are compared in `test_mixtures`, with their gradients.
@pytest.mark.parametrize("case", [case for case in hf_folders.CASES if case not in hf_folders.MIXTURES])
def test_logits_equal_those_of_transformers(case, tmp_path):
    tokens = random_tokens(101, LENGTH)
    model = hf_folders.hf_model(case)
    model.save_pretrained(tmp_path)
    ours, theirs = our_logits(tmp_path, tokens), their_logits(model, tokens)
    assert np.abs(theirs).max() > 1  # a difference of 1e-4 would be none between logits of 1e-4
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 90_000.0}}),
        ("llama", {"rope_parameters": hf_folders.LLAMA3}),
        ("llama", {"rope_parameters": hf_folders.LINEAR}),
        ("qwen2", {"rms_norm_eps": 0.1}),
        ("qwen3", hf_folders.WINDOW),
        ("llama", {"hidden_act": "gelu"}),
    ],
    ids=str,
)
def test_config_json_values_change_the_computation(case, changes, tmp_path):
    """The same weights with another config.json give other logits, which equal those of transformers."""
    tokens = random_tokens(101, LENGTH)
    hf_folders.save(tmp_path / "a", case)
    hf_folders.save(tmp_path / "b", case, **changes)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    ours, before = our_logits(tmp_path / "b", tokens), our_logits(tmp_path / "a", tokens)
    assert np.abs(ours - before).max() > 1e-2
    assert np.abs(ours - their_logits(reference, tokens)).max() < 1e-4


DOUBLE = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
import torch
from test_parity import our_logits, their_logits
from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1], np.load(sys.argv[2])
reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
print(np.abs(our_logits(folder, tokens, "float64") - their_logits(reference, tokens)).max())
"""


@needs_smollm2
def test_smollm2_logits(tmp_path):
    """In float64: the float32 logits of transformers differ by 5e-5 to 2e-3 (by text) from its float64 logits."""
    assert SMOLLM2
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = ["The history of the steam engine begins long before James Watt. " * 60, Path(__file__).read_text()]
    tokens = np.asarray([tokenizer(text).input_ids[:512] for text in texts], np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(hf_folders.__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", DOUBLE, SMOLLM2, str(tmp_path / "tokens.npy")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-4


@needs_smollm2
def test_smollm2_greedy_text():
    assert SMOLLM2
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    subjects = ["rain", "a violin", "the moon", "bread", "a lighthouse", "rust", "honey", "a bicycle", "salt", "snow"]
    questions = [f"What is {s}?" for s in subjects] + [f"Write one sentence about {s}." for s in subjects]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    params, config, _ = hf_folders.load(Path(SMOLLM2))
    model = Model(config, run=Execution(jnp.dtype("float32")))
    greedy = SamplingParams(max_tokens=32, temperature=0, stop_ids=[tokenizer.eos_token_id])
    answers = Engine(model, params, slots=20, max_length=128).generate([Request(ids, greedy) for ids in prompts])
    ours = [completion.ids for (completion,) in answers]
    reference = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    out = reference.generate(**padded, do_sample=False, max_new_tokens=32)[:, padded.input_ids.shape[1] :]
    assert tokenizer.batch_decode(ours, skip_special_tokens=True) == tokenizer.batch_decode(
        out, skip_special_tokens=True
    )
