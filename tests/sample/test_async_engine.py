"""Coroutines share an engine; leaving a stream frees its slots."""

import asyncio
import time
from contextlib import aclosing

import pytest
import tiny

from jaxtrain.sample.async_engine import AsyncEngine, StoppedError
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, Request, SamplingParams

SIZES = {"num_layers": 1, "pattern": tiny.CONFIG.pattern[:1]}


@pytest.fixture(scope="module")
def engine():
    model = tiny.model(**SIZES)
    return Engine(model, tiny.random_params(model), slots=2, max_length=64, limits=EngineLimits(4))


@pytest.fixture
def serving(engine):
    serving = AsyncEngine(engine)
    yield serving
    serving.close()


def request(number, **options):
    return Request([1 + number, 2], SamplingParams(**{"max_tokens": 9, "seed": number, **options}))


def until_idle(engine):
    end = time.monotonic() + 20
    while engine.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert not engine.busy


def test_every_coroutine_gets_the_chunks_of_its_request(engine):
    requests = [request(number, n=1 + number % 2) for number in range(5)]
    expected = engine.generate(requests)
    serving = AsyncEngine(engine)

    async def collect(asked):
        return [chunk async for chunk in serving.stream(asked)]

    async def everybody():
        return await asyncio.gather(*map(collect, requests))

    for chunks, samples in zip(asyncio.run(everybody()), expected, strict=True):
        assert len(chunks) > len(samples)
        for index, sample in enumerate(samples):
            (ours,) = [each.completion for each in chunks if each.sample == index and each.completion]
            assert ours.ids.tolist() == sample.ids.tolist()
    serving.close()


def test_leaving_a_stream_cancels_only_its_request(engine, serving, monkeypatch):
    async def leave():
        async with aclosing(serving.stream(request(0, max_tokens=60, n=40))) as chunks:
            async for _ in chunks:
                return

    async def stay():
        return [chunk async for chunk in serving.stream(request(1))][-1].completion

    async def both():
        return (await asyncio.gather(leave(), stay()))[1]

    finished, step = [], engine.step

    def watched():
        chunks = step()
        finished.extend(chunk.request for chunk in chunks if chunk.completion)
        return chunks

    monkeypatch.setattr(engine, "step", watched)
    completion = asyncio.run(both())
    until_idle(engine)
    assert len(completion.ids) == 9
    assert len(finished) < 20  # of the 41


def test_an_invalid_request_is_refused_immediately(serving):
    async def ask():
        return [chunk async for chunk in serving.stream(request(0, max_tokens=100))]

    with pytest.raises(ValueError, match="can never fit"):
        asyncio.run(ask())


def test_close_raises_in_pending_streams(engine):
    serving = AsyncEngine(engine)

    async def ask():
        async for _ in serving.stream(request(0, max_tokens=60, n=40)):
            serving.close()

    with pytest.raises(StoppedError, match=r"the engine has stopped$"):
        asyncio.run(ask())
    assert not engine.busy


@pytest.mark.parametrize("where", ["step", "submit"])
def test_an_engine_failure_is_raised_in_pending_and_later_streams(engine, monkeypatch, where):
    def fail(*_):
        raise MemoryError("no room")

    failures = []
    serving = AsyncEngine(engine, failures.append)
    monkeypatch.setattr(engine, where, fail)

    async def ask():
        return [chunk async for chunk in serving.stream(request(0))]

    async def several():
        return await asyncio.gather(ask(), ask(), return_exceptions=True)

    for error in (*asyncio.run(several()), *asyncio.run(several())):
        assert isinstance(error, StoppedError) and isinstance(error.__cause__, MemoryError)
        assert str(error) == "the engine has stopped: MemoryError: no room"
    serving.close()
    assert len(failures) == 1 and not engine.busy


def test_an_exception_in_submit_fails_only_its_request(engine, serving, monkeypatch):
    submit = engine.submit

    def fail_on_one(asked):
        if asked.params.seed == 1:
            raise TypeError("what is this")
        return submit(asked)

    monkeypatch.setattr(engine, "submit", fail_on_one)

    async def ask(number):
        return [chunk async for chunk in serving.stream(request(number))][-1].completion

    async def several():
        return await asyncio.gather(*map(ask, range(3)), return_exceptions=True)

    first, error, third = asyncio.run(several())
    assert isinstance(error, TypeError) and str(error) == "what is this"
    assert len(first.ids) == len(third.ids) == 9


def test_an_engine_that_runs_refuses_a_second_loop(engine, serving):
    async def first(serving):
        return [chunk async for chunk in serving.stream(request(1))]

    expected = asyncio.run(first(serving))
    second = AsyncEngine(engine)
    with pytest.raises(StoppedError, match="the engine runs other requests"):
        asyncio.run(first(second))
    second.close()
    with pytest.raises(RuntimeError, match="the engine runs other requests"):
        engine.generate([request(2)])
    assert len(asyncio.run(first(serving))) == len(expected) > 0


def test_leaving_a_stream_cancels_its_requests(engine):
    for _ in engine.stream([request(0, n=5)]):
        break
    assert not engine.busy
    assert len(engine.generate([request(1)])[0]) == 1
