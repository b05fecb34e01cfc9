"""The sides of benchmarks/sample.py, each run in a separate process: the same Hugging Face folder and requests.

A side is a function of the folder that returns its workloads; each is one timed turn and returns its samples, every one
cut to the tokens that were asked for. All are greedy, none ends early, none computes log-probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from grpo_sides import words
from sft_sides import LLAMA, VOCAB, Clock

SLOTS, PROMPT, NEW = 16, 32, 128
REQUESTS, SHORTEST, LONGEST, MEDIAN, SPREAD = 64, 8, 256, 64, 1.0
SHARED_PROMPT, SAMPLES, REPEATS = 512, 8, 8


class Work(NamedTuple):
    prompts: np.ndarray  # [requests, PROMPT]
    lengths: np.ndarray  # [requests], the new tokens that each wants

    def batches(self) -> list[Work]:
        """As they come, SLOTS at a time: what a sampler without refills does."""
        return [
            Work(self.prompts[start : start + SLOTS], self.lengths[start : start + SLOTS])
            for start in range(0, len(self.lengths), SLOTS)
        ]


def _prompts(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCAB, (count, PROMPT)).astype(np.int32)


def workloads() -> dict[str, Work]:
    drawn = np.random.default_rng(2).lognormal(np.log(MEDIAN), SPREAD, REQUESTS)
    return {
        "even": Work(_prompts(0, SLOTS), np.full(SLOTS, NEW)),
        "ragged": Work(_prompts(1, REQUESTS), np.clip(drawn, SHORTEST, LONGEST).astype(int)),
    }


Samples = list[np.ndarray]
Turn = Callable[[], Samples]
Run = Callable[[Work], np.ndarray]


def jaxtrain(folder: Path) -> dict[str, Turn]:
    from converters.import_hf import import_params, read_config
    from jaxtrain.nn.model import Model
    from jaxtrain.sample.engine import Engine
    from jaxtrain.sample.requests import Request, SamplingParams

    config, _ = read_config(folder)
    model = Model(config)
    params = import_params(folder, config, model.abstract())
    engine = Engine(model, params, slots=SLOTS, max_length=PROMPT + LONGEST)
    group = Engine(model, params, slots=SAMPLES, max_length=SHARED_PROMPT + NEW)
    rng = np.random.default_rng(3)

    def turn(work: Work) -> Samples:
        requests = [
            Request(prompt, SamplingParams(int(length), temperature=0, logprobs=False))
            for prompt, length in zip(work.prompts, work.lengths, strict=True)
        ]
        return [samples[0].ids for samples in engine.generate(requests)]

    def first_tokens(samples: int) -> Samples:
        # Never the same prompt twice: the engine would find it in a slot.
        prompts = rng.integers(2, VOCAB, (REPEATS, SHARED_PROMPT))
        wanted = SamplingParams(1, temperature=0, logprobs=False, n=samples)
        return [each.ids for prompt in prompts for each in group.generate([Request(prompt, wanted)])[0]]

    turns = {name: lambda work=work: turn(work) for name, work in workloads().items()}
    return turns | {"one": lambda: first_tokens(1), "shared": lambda: first_tokens(SAMPLES)}


def static(folder: Path, **how: Any) -> dict[str, Turn]:
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> Run:
        # A separate model for each workload, because its cache never shrinks.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        model.generation_config.eos_token_id = None  # nothing ends a sample

        def run(batch: Work) -> np.ndarray:
            ids = torch.from_numpy(batch.prompts).long()
            with torch.inference_mode():
                whole = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=int(batch.lengths.max()),
                    cache_implementation="static",
                    pad_token_id=0,
                    **how,
                )
            return whole[:, PROMPT:].numpy()

        return run

    return {name: _padded_turn(load(), work) for name, work in workloads().items()}


def static_compiled(folder: Path) -> dict[str, Turn]:
    from transformers import CompileConfig

    compilation = CompileConfig(fullgraph=False, mode="default")
    compilation._compile_all_devices = True  # by default, generate compiles only on accelerators
    return static(folder, compile_config=compilation)


def tunix(folder: Path) -> dict[str, Turn]:
    import jax
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    layers, kv_heads, head_dim = (LLAMA[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    config = ModelConfig(
        num_layers=layers,
        vocab_size=VOCAB,
        embed_dim=LLAMA["hidden_size"],
        hidden_dim=LLAMA["intermediate_size"],
        num_heads=LLAMA["num_attention_heads"],
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        rope_theta=10_000,
        norm_eps=LLAMA["rms_norm_eps"],
        weight_tying=True,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokenizer = words()
    with jax.set_mesh(mesh):
        model = create_model_from_safe_tensors(str(folder), config, mesh, jax.numpy.float32)

    def run(batch: Work) -> np.ndarray:
        new = int(batch.lengths.max())
        # The cache is no longer than the batch needs, so that attention over it is not either.
        if new not in samplers:
            samplers[new] = Sampler(model, tokenizer, CacheConfig(PROMPT + new, layers, kv_heads, head_dim))
        texts = tokenizer.batch_decode(batch.prompts.tolist())
        with jax.set_mesh(mesh):
            made = samplers[new](texts, new, max_prompt_length=PROMPT, eos_tokens=[VOCAB])  # never drawn
        return np.stack([np.asarray(ids) for ids in made.tokens])

    samplers: dict[int, Any] = {}
    return {name: _padded_turn(run, work) for name, work in workloads().items()}


def _padded_turn(run: Run, work: Work) -> Turn:
    """The turn of a side whose `run` gives all of a batch as many tokens as its longest wants."""
    batches = work.batches()
    return lambda: [
        ids[:length] for batch in batches for ids, length in zip(run(batch), batch.lengths.tolist(), strict=True)
    ]


SIDES = {side.__name__: side for side in (jaxtrain, static, static_compiled, tunix)}


def main(name: str, steps: int, folder: Path) -> None:
    clock, asked = Clock(steps), workloads()
    turns = SIDES[name](folder)
    while True:
        for workload, turn in turns.items():
            clock.tick()
            samples = turn()
            if workload in asked:
                assert [len(ids) for ids in samples] == asked[workload].lengths.tolist()
            if workload == "even":
                np.save(folder / name, np.stack(samples))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
