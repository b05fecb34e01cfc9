"""The engine on meshes, with mixtures of experts, and the programs that it compiles."""

import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, Request, SamplingParams
from jaxtrain.sample.trie import Trie
from jaxtrain.train.step import score
from jaxtrain.types import Batch

RNG = np.random.default_rng(1)
SIZES = {"num_layers": 2, "pattern": (replace(tiny.KIND, window=6), tiny.KIND)}


def requests(lengths, **options):
    return [Request(RNG.integers(0, 101, n).tolist(), SamplingParams(**options)) for n in lengths]


@pytest.mark.parametrize(
    "sizes",
    [{"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}],  # two kv heads: split over 2, on every one of 4
    ids=["kv-heads-split", "kv-heads-replicated"],
)
def test_a_mesh_changes_nothing(sizes):
    single = tiny.model(**SIZES)
    params = tiny.random_params(single)
    mesh = make_mesh(MeshSection(fsdp=1, preset="fsdp_tensor", **sizes))
    model = tiny.model(mesh=mesh, **SIZES)
    asked = [*requests((1, 9, 20), max_tokens=9, temperature=0), *requests((5, 12), max_tokens=9, seed=4, n=3)]
    expected = Engine(single, params, slots=4, max_length=40).generate(asked)
    engine = Engine(model, params, slots=8, max_length=40)
    for ours, theirs in zip(engine.generate(asked), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            np.testing.assert_allclose(one.raw_logps, other.raw_logps, atol=1e-5)
    parts = tiny.model(mesh=make_mesh(MeshSection(context=8)))
    with pytest.raises(ValueError, match=r"mesh.context=8 splits the tokens of rows"):
        Engine(parts, params, slots=8, max_length=40)
    with pytest.raises(ValueError, match="slots=3 must be a multiple"):
        Engine(model, params, slots=3, max_length=40)


def test_experts_and_sinks_score_as_the_forward_pass_does():
    model = tiny.model(moe=tiny.MOE, sinks=True, **SIZES)
    params = tiny.random_params(model)
    asked = requests((3, 17), max_tokens=12, seed=0)
    for request, (completion,) in zip(
        asked, Engine(model, params, slots=2, max_length=40).generate(asked), strict=True
    ):
        ids = np.array([[*request.prompt_ids, *completion.ids]], np.int32)
        ones, start = np.ones_like(ids), len(request.prompt_ids)
        batch = Batch(ids, np.arange(ids.size, dtype=np.int32)[None], ones, ones.astype(np.float32))
        logps = np.asarray(score(model, params, batch).logp)[0, start:]
        np.testing.assert_allclose(completion.raw_logps, logps, atol=1e-4)


def test_the_last_samples_are_decoded_in_fewer_rows_with_equal_results():
    """The long samples are in the last slots, so they are moved together with their penalties and masks."""
    model = tiny.model(**SIZES)
    params = tiny.random_params(model)
    trie = Trie([[*range(1, 40, 2), 7], [2, 3]])
    last = [
        *requests((3,), max_tokens=9, seed=4, allowed_ids=range(30)),
        *requests((15,), max_tokens=30, seed=3, repetition_penalty=1.3, frequency_penalty=0.7),
        *requests((7,), temperature=0, trie=trie),
    ]
    asked = [*requests((2, 6, 3, 12), max_tokens=3, n=2, seed=1), *last]
    engine = Engine(model, params, slots=8, max_length=50, limits=EngineLimits(4))
    rows = set()
    numbers = [engine.submit(request) for request in asked]
    made = {}
    while engine.busy:
        for chunk in engine.step():
            if chunk.completion is not None:
                made[chunk.request] = chunk.completion
        rows.add(engine.rows)
    assert rows == {8, 2}
    for number, request in list(zip(numbers, asked, strict=True))[4:]:
        # One slot: never moved, and of the same prompt, penalties and seed.
        ((alone,),) = Engine(model, params, slots=1, max_length=50).generate([request])
        assert made[number].ids.tolist() == alone.ids.tolist()
        np.testing.assert_allclose(made[number].raw_logps, alone.raw_logps, atol=1e-5)
    ((again,),) = engine.generate(last[:1])  # and room is made again
    assert again.ids.tolist() == made[numbers[4]].ids.tolist()


def test_no_request_compiles_anything_after_the_warm_up(caplog):
    model = tiny.model(**SIZES)
    # Bound to a device, as those are that come from a checkpoint.
    first, second = (jax.device_put(tiny.random_params(model, seed), jax.devices()[0]) for seed in (0, 5))
    engine = Engine(model, first, slots=8, max_length=96, tokenizer=_Spaces(), limits=EngineLimits(alternatives=3))
    trie = Trie([[1, 2, 3], [1, 5], [9]])
    engine.add_tries([trie])
    engine.warm_up()
    rng = np.random.default_rng(2)
    asked = []
    for _ in range(200):
        length = int(rng.integers(1, 80))
        options = {
            "max_tokens": int(rng.integers(1, 12)),
            "temperature": rng.choice([0.0, 0.5, 1.0]),
            "top_k": int(rng.choice([0, 1, 70])),
            "top_p": rng.choice([0.3, 1.0]),
            "min_p": rng.choice([0.0, 0.1]),
            "n": int(rng.integers(1, 3)),
            "stop_ids": rng.integers(0, 101, rng.integers(0, 4)).tolist(),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "logit_bias": {int(rng.integers(0, 101)): 1.5},
            "allowed_ids": [None, range(20)][rng.integers(0, 2)],
            "logprobs": bool(rng.integers(0, 2)),
            "alternatives": int(rng.integers(0, 4)),
            "stop": [(), ("7 7",)][rng.integers(0, 2)],
        }
        asked.append(Request(rng.integers(0, 101, length), SamplingParams(**options)))
    asked.append(Request([3, 4], SamplingParams(trie=trie)))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        completions = engine.generate(asked)
        engine.set_params(second, 1)
        engine.generate(asked[:3])
        jax.jit(lambda x: x + 1)(np.ones(7))  # this one shows
    assert len(completions) == 201
    assert all(len(samples[0].ids) for samples in completions)
    assert len(_compiled(caplog)) == 1 and "lambda" in _compiled(caplog)[0]


def _compiled(caplog):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


class _Spaces:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))
