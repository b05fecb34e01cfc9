"""What the server counts, in the text format of Prometheus."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from jaxtrain.sample.requests import Chunk
from jaxtrain.serve.limits import Admission

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # upper ends of the buckets
_ENDPOINTS = (*("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json"),)


class ServerMetrics:
    """Counters, histograms and gauges of one server, in a registry of their own."""

    def __init__(self, admission: Admission, slots: int):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        options = {"namespace": "jaxtrain", "registry": registry}
        self._calls = Counter(
            "calls", "Calls by endpoint and status; 0: the client disconnected", ["endpoint", "status"], **options
        )
        self._call_seconds = Histogram(
            "call_seconds", "From a call to the end of its response", ["endpoint"], buckets=_SECONDS, **options
        )
        self._first_token_seconds = Histogram(
            "first_token_seconds", "From a call's admission to its first token", buckets=_SECONDS, **options
        )
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of all prompts", **options)
        self._generated_tokens = Counter("generated_tokens", "Tokens of all samples", **options)
        Gauge("slots", "Samples that are generated together", **options).set(slots)
        Gauge("samples", "Samples that run or wait", **options).set_function(lambda: admission.samples)

    def count(self, path: str, status: int, seconds: float) -> None:
        """A call to a path has ended."""
        endpoint = path if path in _ENDPOINTS else "other"
        self._calls.labels(endpoint, str(status)).inc()
        self._call_seconds.labels(endpoint).observe(seconds)

    async def counted(self, chunks: AsyncGenerator[Chunk], prompt_tokens: int) -> AsyncGenerator[Chunk]:
        """The `chunks` of a call, whose tokens are counted."""
        self._prompt_tokens.inc(prompt_tokens)
        start = time.perf_counter()
        waiting = True
        async with aclosing(chunks):
            async for chunk in chunks:
                if waiting:
                    waiting = False
                    self._first_token_seconds.observe(time.perf_counter() - start)
                self._generated_tokens.inc(len(chunk.ids))
                yield chunk

    def text(self) -> bytes:
        """All values."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
