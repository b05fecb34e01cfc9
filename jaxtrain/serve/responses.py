"""Converts the engine's chunks to OpenAI's objects: one per response, or a stream of events."""

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from jaxtrain.sample.async_engine import StoppedError
from jaxtrain.sample.requests import Chunk, Completion
from jaxtrain.serve.protocol import Call
from jaxtrain.serve.served import Served

log = logging.getLogger(__name__)


class FailedError(Exception):
    """The generation of a sample failed."""


def error_object(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class ResponseBuilder:
    """Builds the response to one call. Detokenizes in other threads, so that the event loop is not blocked."""

    def __init__(self, served: Served, call: Call):
        self._served, self._call = served, call
        self._id = f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompt_tokens = len(call.request.prompt_ids)
        self._generated = 0
        self._started: set[int] = set()  # samples that have sent an event
        self._sent: Counter[int] = Counter()  # characters of each sample whose log-probabilities have been sent

    async def build(self, chunks: AsyncGenerator[Chunk]) -> dict[str, Any]:
        """The complete response. Raises FailedError if a sample fails, and cancels the others."""
        samples: dict[int, Completion] = {}
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.completion is not None:
                    samples[chunk.sample] = _unless_failed(chunk.completion)
        return await asyncio.to_thread(self._response, samples)

    async def stream(self, chunks: AsyncGenerator[Chunk]) -> AsyncIterator[str]:
        """Yield server-sent events. An error becomes the last event."""
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield await asyncio.to_thread(self._event, chunk)
            if self._call.usage:
                yield _as_event(self._object(".chunk" if self._call.chat else "", []) | {"usage": self._usage()})
            yield "data: [DONE]\n\n"
        except (FailedError, StoppedError) as error:
            yield _as_event(error_object(str(error), "server_error"))
        except Exception as error:  # too late for an HTTP status, so the error is sent as an event
            log.exception("a stream failed")
            yield _as_event(error_object(f"{type(error).__name__}: {error}", "server_error"))

    def _response(self, samples: dict[int, Completion]) -> dict[str, Any]:
        choices = []
        for index, completion in sorted(samples.items()):
            self._generated += len(completion.ids)
            choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason, "logprobs": None}
            if self._call.logprobs:
                choice["logprobs"] = self._logprobs(completion, index)
            if self._call.chat:
                choice["message"] = {"role": "assistant", "content": completion.text}
            else:
                choice["text"] = completion.text
            choices.append(choice)
        return self._object("", choices) | {"usage": self._usage()}

    def _event(self, chunk: Chunk) -> str:
        """The event for a chunk. Raises FailedError for a sample that failed."""
        completion = None if chunk.completion is None else _unless_failed(chunk.completion)
        self._generated += len(chunk.ids)
        choice: dict[str, Any] = {"index": chunk.sample, "logprobs": None}
        choice["finish_reason"] = None if completion is None else completion.finish_reason
        if self._call.logprobs:
            choice["logprobs"] = self._logprobs(chunk, chunk.sample)
        if self._call.chat:
            role = {} if chunk.sample in self._started else {"role": "assistant"}
            choice["delta"] = {**role, "content": chunk.text}
        else:
            choice["text"] = chunk.text
        self._started.add(chunk.sample)
        event = self._object(".chunk" if self._call.chat else "", [choice])
        return _as_event(event | {"usage": None} if self._call.usage else event)

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self._call.chat else "text_completion"
        head = {"id": self._id, "object": kind + suffix, "created": self._created, "model": self._served.name}
        return head | {"choices": choices}

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._generated
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._generated, "total_tokens": total}

    def _logprobs(self, of: Chunk | Completion, sample: int) -> dict[str, Any]:
        """The model's log-probabilities, before temperature and filters, of a sample's next tokens."""
        sampled = [self._entry(*pair) for pair in zip(of.ids.tolist(), of.raw_logps.tolist(), strict=True)]
        others: list[list[dict[str, Any]]] = [[] for _ in sampled]
        if of.alternatives is not None:
            ids, logps = of.alternatives.ids.tolist(), of.alternatives.logps.tolist()
            others = [
                [self._entry(*pair) for pair in zip(*place, strict=True)] for place in zip(ids, logps, strict=True)
            ]
        if self._call.chat:
            content = [{**entry, "top_logprobs": top} for entry, top in zip(sampled, others, strict=True)]
            return {"content": content, "refusal": None}
        # Of tokens with the same text, such as parts of a character, keep the most probable one.
        *offsets, self._sent[sample] = accumulate((len(e["token"]) for e in sampled), initial=self._sent[sample])
        best = [{entry["token"]: entry["logprob"] for entry in reversed(top)} for top in others]
        return {
            "tokens": [entry["token"] for entry in sampled],
            "token_logprobs": [entry["logprob"] for entry in sampled],
            "top_logprobs": best if any(best) else None,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logp: float) -> dict[str, Any]:
        text = self._served.tokenizer.decode([token])
        return {"token": text, "logprob": logp, "bytes": list(text.encode())}


def _unless_failed(completion: Completion) -> Completion:
    if completion.error is not None:
        raise FailedError(completion.error)
    return completion


def _as_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
