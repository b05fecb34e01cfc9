"""The engine equals the model's forward pass, and its guarantees about seeds, slots and refills hold."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn.config import LayerKind, Rope
from jaxtrain.sample import decode as programs
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, Request, SamplingParams
from jaxtrain.sample.samples import Sample
from jaxtrain.sample.trie import Trie
from jaxtrain.train.step import score
from jaxtrain.types import Batch

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 101, length).tolist() for length in (1, 5, 33, 2, 17)]
LOCAL = LayerKind(7, Rope(theta=300.0))
WINDOWS = (LOCAL, tiny.KIND, LOCAL)
LENGTH = 64  # one bucket: every program compiles once


@pytest.fixture(scope="module", params=["full", "windows"])
def model_and_params(request):
    model = tiny.model(**({"pattern": WINDOWS} if request.param == "windows" else {}))
    return model, tiny.random_params(model)


@pytest.fixture(scope="module")
def engine(model_and_params):
    return Engine(*model_and_params, slots=3, max_length=LENGTH, limits=EngineLimits(support=8))


def forward_scores(model, params, prompt, completion):
    """Log-probabilities [n] and argmaxes [n] of the trainer's forward pass at the generated positions."""
    ids = np.array([*prompt, *completion.ids], np.int32)
    row = np.pad(ids, (0, LENGTH - len(ids)))[None]
    segments = (np.arange(LENGTH) < len(ids)).astype(np.int32)[None]
    weights = (segments * (np.arange(LENGTH) >= len(prompt))).astype(np.float32)
    scores = _score(model, params, Batch(row, np.arange(LENGTH, dtype=np.int32)[None], segments, weights))
    span = slice(len(prompt), len(ids))
    return np.asarray(scores.logp)[0, span], np.asarray(scores.correct)[0, span]


_score = jax.jit(score, static_argnums=0)
_hidden = jax.jit(lambda model, params, batch: model.hidden(params, batch), static_argnums=0)


def compiled():
    """Programs compiled by all engines of this process."""
    every = (programs.prefill, programs.insert, programs.fork, programs.resize, programs.decode)
    return sum(program._cache_size() for program in every)


def test_greedy_tokens_and_logps_are_those_of_the_forward_pass(model_and_params, engine):
    """More prompts than slots, of mixed lengths, so slots are refilled; prompts and rows longer than the windows."""
    greedy = SamplingParams(max_tokens=20, temperature=0)
    for prompt, (completion,) in zip(PROMPTS, engine.generate([Request(p, greedy) for p in PROMPTS]), strict=True):
        logps, is_best = forward_scores(*model_and_params, prompt, completion)
        assert len(completion.ids) == 20 and completion.finish_reason == "length"
        assert is_best.all()
        np.testing.assert_allclose(completion.raw_logps, logps, atol=1e-4)
        assert not completion.logps.any()


def test_sampled_logps_are_those_of_the_forward_pass(model_and_params, engine):
    requests = [Request(p, SamplingParams(20, n=2)) for p in PROMPTS]
    for prompt, samples in zip(PROMPTS, engine.generate(requests), strict=True):
        for completion in samples:
            logps, _ = forward_scores(*model_and_params, prompt, completion)
            np.testing.assert_allclose(completion.raw_logps, logps, atol=1e-4)
            np.testing.assert_allclose(completion.logps, logps, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8, "temperature": 1.3}], ids=["plain", "filtered"])
def test_samples_depend_on_the_seed_and_not_on_other_requests(engine, options):
    request = Request(PROMPTS[2], SamplingParams(12, seed=5, n=2, **options))
    alone = engine.generate([request])[0]
    others = [Request(p, SamplingParams(9, temperature=0.7, top_k=5)) for p in PROMPTS]
    for place in (0, 3, 5):
        crowd = engine.generate([*others[:place], request, *others[place:]])[place]
        for one, other in zip(alone, crowd, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    assert alone[0].ids.tolist() != alone[1].ids.tolist()


def test_a_sample_ends_with_its_stop_token(engine):
    greedy = SamplingParams(max_tokens=10, temperature=0)
    whole = [completion.ids.tolist() for (completion,) in engine.generate([Request(p, greedy) for p in PROMPTS])]
    stop = whole[1][4]
    stopping = SamplingParams(max_tokens=10, temperature=0, stop_ids=[100, stop])
    for before, (completion,) in zip(whole, engine.generate([Request(p, stopping) for p in PROMPTS]), strict=True):
        ends = stop in before
        assert completion.ids.tolist() == (before[: before.index(stop) + 1] if ends else before)
        assert completion.finish_reason == ("stop" if ends else "length")


def test_no_stop_token_is_drawn_before_min_tokens(model_and_params, engine):
    """Its probability goes to the others, which the log-probabilities say."""
    model, params = model_and_params
    every = list(range(0, 101, 13))  # of 101 ids, some of which a free sample would end with
    free = SamplingParams(max_tokens=12, seed=3, n=8, stop_ids=every)
    (ended,) = engine.generate([Request(PROMPTS[0], free)])
    assert min(len(completion.ids) for completion in ended) < 6
    (late,) = engine.generate([Request(PROMPTS[0], replace(free, min_tokens=6))])
    for completion in late:
        assert len(completion.ids) > 6 or completion.finish_reason == "length"
        assert not np.isin(completion.ids[:6], every).any()
        row = np.pad([*PROMPTS[0], *completion.ids], (0, 20))[None, :20].astype(np.int32)
        batch = Batch(row, np.arange(20, dtype=np.int32)[None], np.ones_like(row), np.ones(row.shape, np.float32))
        logits = np.array(model.logits(params, _hidden(model, params, batch)))[0, : len(completion.ids)]
        logits[:6, every] = -np.inf
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(scores, completion.ids[:, None], -1)[:, 0]
        np.testing.assert_allclose(completion.logps, expected, atol=1e-4)


def test_a_top_k_above_the_support_is_refused(engine):
    with pytest.raises(ValueError, match="top_k=9, and the engine returns supports of up to 8 tokens"):
        engine.submit(Request([1, 2], SamplingParams(max_tokens=2, top_k=9, top_p=0.9)))


def test_logps_are_normalised_over_the_supports(model_and_params, engine):
    """Scoring a filtered sample among its support, as the trainer does, gives its `logps`."""
    params = SamplingParams(12, temperature=0.8, top_k=5, top_p=0.9)
    ((completion,),) = engine.generate([Request(PROMPTS[1], params)])
    model, weights = model_and_params
    ids = [*PROMPTS[1], *completion.ids]
    batch = Batch(*(np.array([each], np.int32) for each in (ids, range(len(ids)), [1] * len(ids))), np.ones(1))
    logits = np.asarray(model.logits(weights, model.hidden(weights, batch)))[0, len(PROMPTS[1]) - 1 : -1] / 0.8
    for row, token, support, logp in zip(logits, completion.ids, completion.supports, completion.logps, strict=True):
        kept = support[support >= 0]
        assert 1 <= len(kept) <= 5 and token in kept and row[kept].min() >= np.delete(row, kept).max()
        assert logp == pytest.approx(row[token] - np.log(np.exp(row[kept]).sum()), abs=1e-4)


def test_tokens_are_tagged_with_the_version_that_sampled_them(model_and_params):
    model, params = model_and_params
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    engine = Engine(model, params, slots=3, max_length=LENGTH, limits=EngineLimits(4))
    engine.submit(Request(PROMPTS[1], SamplingParams(10, temperature=0)))
    chunks = engine.step()
    before = compiled()
    engine.set_params(other, 7)
    while engine.busy:
        chunks += engine.step()
    assert compiled() == before
    completion = chunks[-1].completion
    assert completion.versions.tolist() == [0] * 4 + [7] * 6
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == completion.ids.tolist()
    ((old,),) = Engine(model, params, slots=3, max_length=LENGTH).generate(
        [Request(PROMPTS[1], SamplingParams(10, temperature=0))]
    )
    assert completion.ids[:4].tolist() == old.ids[:4].tolist()
    ((new,),) = engine.generate([Request(PROMPTS[1], SamplingParams(10, temperature=0))])
    np.testing.assert_allclose(new.raw_logps, forward_scores(model, other, PROMPTS[1], new)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "request 1: the prompt is empty"),
        ([1] * 64, {}, "request 1: the prompt has 64 tokens, and max_length=64"),
        ([1] * 60, {"max_tokens": 5}, r"60 prompt tokens \+ max_tokens=5 = 65 can never fit .* max_tokens=4 would"),
        ([1, 101], {}, "prompt id 101 is outside the vocabulary of 101"),
        ([1], {"stop_ids": [200]}, "stop id 200 is outside"),
        ([1], {"stop_ids": list(range(9))}, "9 stop_ids"),
        ([0.5], {}, "must be a list of token ids"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([Request([1]), Request(prompt, SamplingParams(**options))])
    assert not engine.busy


def test_non_finite_logits_fail_only_their_request(model_and_params):
    # An embedding that is the head too would break everybody's logits.
    model = tiny.model(pattern=model_and_params[0].config.pattern, tied=False)
    whole = tiny.random_params(model)
    whole["embed"]["weight"] = whole["embed"]["weight"].at[3].set(jnp.nan)
    engine = Engine(model, whole, slots=3, max_length=LENGTH)
    greedy = SamplingParams(6, temperature=0, stop_ids=[3])
    (good,), (bad,) = engine.generate([Request([1, 2], greedy), Request([1, 3, 2], greedy)])
    assert good.finish_reason == "length" and good.error is None
    assert bad.finish_reason == "failed" and bad.error == "the logits after 3 prompt and 0 new tokens are not finite"


class Letters:
    """A tokenizer whose token i is the i-th character from "0" on."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(48 + token) for token in ids)


@pytest.fixture(scope="module")
def speaking(model_and_params):
    return Engine(*model_and_params, slots=3, max_length=LENGTH, limits=EngineLimits(5, 8), tokenizer=Letters())


class Brittle(Letters):
    """Raises when a text contains the character of token 7."""

    def decode(self, ids, skip_special_tokens):
        if 7 in ids:
            raise UnicodeError("no such character")
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("stop", [(), ("x",)], ids=["text", "stop string"])
def test_an_exception_in_decoding_fails_only_its_sample(model_and_params, caplog, stop):
    engine = Engine(*model_and_params, slots=2, max_length=LENGTH, limits=EngineLimits(3), tokenizer=Brittle())
    good = Request([1, 2], SamplingParams(12, temperature=0, allowed_ids=[5], stop=stop))
    bad = Request([1, 2], SamplingParams(12, allowed_ids=[5, 6, 7], seed=0, stop=stop, n=2))
    chunks = list(engine.stream([good, bad, good]))
    done = {(chunk.request, chunk.sample): chunk.completion for chunk in chunks if chunk.completion}
    assert len(done) == 4 and not engine.busy
    for index in (0, 2):
        assert done[index, 0].finish_reason == "length" and done[index, 0].text == "5" * 12
    for index in (0, 1):
        completion = done[1, index]
        assert completion.finish_reason == "failed" and completion.error == "UnicodeError: no such character"
        assert len(completion.ids) == len(completion.raw_logps) == len(completion.versions) and completion.text == ""
    assert caplog.text.count("of request 1 failed") == 2


def test_an_exception_in_admission_fails_only_its_sample(engine, monkeypatch):
    numbers, write_settings = [], Sample.write_settings

    def fail_on_one(sample, settings, slot):
        if numbers and sample.number == numbers[1]:
            raise OverflowError("too large")
        write_settings(sample, settings, slot)

    monkeypatch.setattr(Sample, "write_settings", fail_on_one)
    alone = engine.generate([Request([1, 2], SamplingParams(6, temperature=0))])[0][0]
    params = SamplingParams(6, temperature=0)
    numbers = [engine.submit(Request([1, 2], params)) for _ in range(3)]
    done = {}
    while engine.busy:
        done |= {chunk.request: chunk.completion for chunk in engine.step() if chunk.completion}
    assert done[numbers[1]].finish_reason == "failed" and done[numbers[1]].error == "OverflowError: too large"
    assert done[numbers[1]].ids.size == done[numbers[1]].logps.size == 0
    for number in (numbers[0], numbers[2]):
        assert done[number].ids.tolist() == alone.ids.tolist()


def test_exhausted_memory_fails_all_requests(engine, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(Sample, "write_settings", fail)
    with pytest.raises(MemoryError):
        engine.generate([Request([1, 2], SamplingParams(6))])
    assert not engine.busy


def test_a_complete_stop_string_ends_the_sample(speaking):
    greedy = SamplingParams(max_tokens=20, temperature=0)
    whole = [completion for (completion,) in speaking.generate([Request(p, greedy) for p in PROMPTS])]
    stop = whole[2].text[6:9]  # over the boundary of two calls
    stopping = SamplingParams(max_tokens=20, temperature=0, stop=[stop, "~~~"])
    for before, (completion,) in zip(whole, speaking.generate([Request(p, stopping) for p in PROMPTS]), strict=True):
        assert completion.text == before.text.partition(stop)[0]
        ends = stop in before.text
        assert completion.finish_reason == ("stop" if ends else "length")
        assert len(completion.ids) == (before.text.index(stop) + 3 if ends else 20) == len(completion.raw_logps)


def test_streamed_chunks_join_to_the_completion_without_stop_strings(speaking):
    ((whole,),) = speaking.generate([Request(PROMPTS[2], SamplingParams(20, temperature=0))])
    params = SamplingParams(20, temperature=0, stop=[whole.text[6:9]])
    chunks = list(speaking.stream([Request(PROMPTS[2], params)]))
    assert len(chunks) > 1 and [chunk.completion is None for chunk in chunks[:-1]]
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == chunks[-1].completion.ids.tolist()


def test_allowed_ids_and_a_trie_constrain_only_their_samples(model_and_params, speaking):
    paths = [[5, 6, 7], [5, 9], [80, 1, 2, 3]]
    free = Request(PROMPTS[1], SamplingParams(9, seed=1))
    alone = speaking.generate([free])[0][0]
    few, (bounded, *_), together = speaking.generate(
        [
            Request(PROMPTS[0], SamplingParams(8, allowed_ids=[3, 4, 50], n=2)),
            Request(PROMPTS[2], SamplingParams(trie=Trie(paths), n=1)),
            free,
        ]
    )
    assert all(set(each.ids.tolist()) <= {3, 4, 50} for each in few)
    assert all(set(row[row >= 0].tolist()) == {3, 4, 50} for row in few[0].supports)
    assert bounded.ids.tolist() in paths and bounded.finish_reason == "stop" and len(bounded.text) == len(bounded.ids)
    assert together[0].ids.tolist() == alone.ids.tolist()


def test_penalties_count_prompt_and_new_tokens(speaking):
    params = SamplingParams(12, temperature=0, repetition_penalty=1e6)
    ((completion,),) = speaking.generate([Request(PROMPTS[4], params)])
    ids = completion.ids.tolist()
    assert len(set(ids)) == 12 and not set(ids) & set(PROMPTS[4])


def test_a_frequency_penalty_counts_occurrences(speaking):
    params = SamplingParams(12, temperature=0, allowed_ids=[3, 4, 50], frequency_penalty=1e4)
    ((completion,),) = speaking.generate([Request([3, 3], params)])
    assert sorted(completion.ids.tolist()) == [3] * 4 + [4] * 4 + [50] * 4


def test_run_calls_its_source_before_every_device_call(engine):
    """Requests that arrive while others run, a cancelled one, and a source that blocks when the engine is idle."""
    params = SamplingParams(9, temperature=0)
    alone = [samples[0].ids.tolist() for samples in engine.generate([Request(p, params) for p in PROMPTS[:3]])]
    asked, numbers = [], []

    def source(idle):
        asked.append(idle)
        if len(numbers) < 3:
            numbers.append(engine.submit(Request(PROMPTS[len(numbers)], params)))
        elif len(numbers) == 3 and idle:
            numbers.append(engine.submit(Request(PROMPTS[0], params)))
            engine.cancel([numbers[3]])
        return len(numbers) < 4

    done = {chunk.request: chunk.completion for chunk in engine.run(source) if chunk.completion}
    assert [done[number].ids.tolist() for number in numbers[:3]] == alone
    assert numbers[3] not in done and not engine.busy
    assert asked[0] and asked[-1] and len(asked) >= 3


def test_leaving_the_loop_cancels_all_requests(engine):
    def source(idle):
        if idle:
            engine.submit(Request(PROMPTS[0], SamplingParams(40, n=7)))
        return True

    loop = engine.run(source)
    next(loop)
    loop.close()
    assert not engine.busy

    def fail(idle):
        source(idle)
        raise KeyError("a source")

    with pytest.raises(KeyError):
        next(engine.run(fail))
    assert not engine.busy


def test_weights_may_change_between_the_calls_of_a_stream(model_and_params):
    model, params = model_and_params
    engine = Engine(model, params, slots=3, max_length=LENGTH, limits=EngineLimits(4))
    calls = []

    def between():
        calls.append(len(calls))
        engine.set_params(params, len(calls))

    ((completion,),) = engine.generate([Request(PROMPTS[1], SamplingParams(10, temperature=0))], between)
    assert completion.versions.tolist() == [1] * 4 + [2] * 4 + [3] * 2 and calls == [0, 1, 2]
