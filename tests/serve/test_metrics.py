"""What is counted is in the text."""

import asyncio

import numpy as np
import pytest

from jaxtrain.sample.requests import Chunk
from jaxtrain.serve.limits import Admission, Limits
from jaxtrain.serve.metrics import ServerMetrics

pytest.importorskip("prometheus_client")


def test_calls_and_tokens_are_counted():
    admission = Admission(Limits())
    metrics = ServerMetrics(admission, 8)

    async def engine():
        for size in (2, 3):
            yield Chunk(0, 0, np.zeros(size, np.int32), np.zeros(size, np.float32), "", None)

    async def read():
        return [chunk async for chunk in metrics.counted(engine(), 7)]

    assert [len(chunk.ids) for chunk in asyncio.run(read())] == [2, 3]
    metrics.count("/v1/completions", 200, 0.5)
    metrics.count("/some/other", 404, 0.5)
    admission.samples = 4
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line[0] != "#")
    expected = {
        'jaxtrain_calls_total{endpoint="/v1/completions",status="200"}': 1,
        'jaxtrain_calls_total{endpoint="other",status="404"}': 1,
        'jaxtrain_call_seconds_sum{endpoint="other"}': 0.5,
        "jaxtrain_first_token_seconds_count": 1,
        "jaxtrain_prompt_tokens_total": 7,
        "jaxtrain_generated_tokens_total": 5,
        "jaxtrain_slots": 8,
        "jaxtrain_samples": 4,
    }
    assert {name: float(lines[name]) for name in expected} == expected
