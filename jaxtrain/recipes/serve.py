"""An HTTP endpoint that speaks OpenAI's protocol: chat completions and completions, with logprobs and streaming."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, TypeVar

from jaxtrain.recipes.generate import Served
from jaxtrain.sample.async_engine import AsyncEngine, StoppedError
from jaxtrain.sample.requests import Chunk, Completion, Request, SamplingParams

_T = TypeVar("_T")

ALTERNATIVES = 20  # the most that OpenAI's `top_logprobs` may be

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_SAME = ("temperature", "top_p", "n", "seed", "top_k", "min_p", *_PENALTIES)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("n", "seed", "top_k", "top_logprobs", "max_tokens", "max_completion_tokens"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "min_p", *_PENALTIES), (float, int)),
    "stop": (str, list),
    "stop_token_ids": (list,),
    "logit_bias": (dict,),
}
_IGNORED = {"model", "messages", "prompt", "stream", "stream_options", "user", "metadata", "store"}
_NEUTRAL = {"echo": (False, None), "best_of": (1, None)}


def make_app(served: Served, on_failure: Callable[[Exception], None] | None = None) -> Any:
    """The ASGI application. `on_failure` is told what ended the engine, if anything does."""
    from starlette.applications import Starlette
    from starlette.requests import Request as Http
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    engine = AsyncEngine(served.engine, on_failure)

    def answering(chat: bool):
        async def answer(http: Http) -> Any:
            try:
                body = await http.json()
                reply = _Reply(served, body, chat)
                served.engine.check([reply.request])
            except ValueError as error:
                message = str(error).removeprefix("request 0: ")
                return JSONResponse(_error(message, "invalid_request_error"), status_code=400)
            chunks = engine.stream(reply.request)
            if body.get("stream"):
                return StreamingResponse(reply.stream(chunks), media_type="text/event-stream")
            try:
                return JSONResponse(await _unless_left(http, reply.whole(chunks)))
            except (_FailedError, StoppedError) as error:
                return JSONResponse(_error(str(error), "server_error"), status_code=500)

        return answer

    async def models(_: Http) -> Any:
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "jaxtrain"}
        return JSONResponse({"object": "list", "data": [model]})

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", answering(True), methods=["POST"]),
            Route("/v1/completions", answering(False), methods=["POST"]),
        ]
    )


def listen(host: str, port: int) -> socket.socket:
    """The socket to `serve` at, taken before a model is loaded for nothing.

    Raises ValueError where a package is not installed, and for a place that cannot be listened at.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ValueError("serving needs starlette and uvicorn: pip install 'jaxtrain[serve]'")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error


def serve(served: Served, listening: socket.socket) -> None:
    """Answer until interrupted. What ends the engine is raised once all who wait are told, so that whoever watches over
    the server starts it anew."""
    import uvicorn

    failures: list[Exception] = []

    def stop(failure: Exception) -> None:
        failures.append(failure)
        server.should_exit = True

    server = uvicorn.Server(uvicorn.Config(make_app(served, stop), log_level="warning"))
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has shut down
        server.run(sockets=[listening])
    if failures:
        raise failures[0]


class _FailedError(Exception):
    """A sample failed while it was generated."""


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _unless_left(http: Any, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What `work` returns; None where the client of `http` hangs up before, and then `work` is cancelled."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


class _Reply:
    """One call's request, and its chunks as OpenAI's objects."""

    def __init__(self, served: Served, body: dict[str, Any], chat: bool):
        """Raises ValueError for a body that asks for what there is not."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        self._served, self._chat = served, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        logprobs = body.get("logprobs")
        self._want_logprobs = logprobs is not None and logprobs is not False  # 0 asks for those of the sampled tokens
        if "messages" not in body if chat else "prompt" not in body:
            raise ValueError(f"the body lacks {'messages' if chat else 'prompt'}")
        if chat:
            if not isinstance(body["messages"], list):
                raise ValueError("messages must be a list")
            ids = served.prompt_ids({"messages": [_joined(message) for message in body["messages"]]})
        elif isinstance(body["prompt"], str):
            ids = served.prompt_ids({"prompt": body["prompt"]}, plain=True)
        elif isinstance(body["prompt"], list) and all(isinstance(token, int) for token in body["prompt"]):
            ids = served.prompt_ids({"prompt_ids": body["prompt"]})
        else:
            raise ValueError("prompt must be one text, or the token ids of one")
        self.request = Request(ids, _params(served, body))
        self._prompt_tokens = len(ids)
        self._told: Counter[int] = Counter()  # characters of each sample whose log-probabilities were told

    async def whole(self, chunks: AsyncIterator[Chunk]) -> dict[str, Any]:
        samples: dict[int, list[Chunk]] = {}
        async for chunk in chunks:
            samples.setdefault(chunk.sample, []).append(chunk)
        choices, generated = [], 0
        for index, parts in sorted(samples.items()):
            completion = parts[-1].completion
            assert completion is not None
            if completion.error is not None:
                raise _FailedError(completion.error)
            generated += len(completion.ids)
            choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason, "logprobs": None}
            if self._want_logprobs:
                choice["logprobs"] = self._logprobs(completion, index)
            if self._chat:
                choice["message"] = {"role": "assistant", "content": completion.text}
            else:
                choice["text"] = completion.text
            choices.append(choice)
        return self._object("", choices) | {"usage": self._usage(generated)}

    async def stream(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[str]:
        started: set[int] = set()
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(self._piece(chunk, started))}\n\n"
            yield "data: [DONE]\n\n"
        except (_FailedError, StoppedError) as error:
            yield f"data: {json.dumps(_error(str(error), 'server_error'))}\n\n"

    def _piece(self, chunk: Chunk, started: set[int]) -> dict[str, Any]:
        """A chunk as its event; `started` are the samples that were told of before."""
        completion = chunk.completion
        if completion is not None and completion.error is not None:
            raise _FailedError(completion.error)
        choice: dict[str, Any] = {"index": chunk.sample, "logprobs": None}
        choice["finish_reason"] = None if completion is None else completion.finish_reason
        if self._want_logprobs:
            choice["logprobs"] = self._logprobs(chunk, chunk.sample)
        if self._chat:
            role = {} if chunk.sample in started else {"role": "assistant"}
            choice["delta"] = {**role, "content": chunk.text}
        else:
            choice["text"] = chunk.text
        started.add(chunk.sample)
        return self._object(".chunk" if self._chat else "", [choice])

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        head = {"id": self._id, "object": kind + suffix, "created": self._created, "model": self._served.name}
        return head | {"choices": choices}

    def _usage(self, generated: int) -> dict[str, int]:
        total = self._prompt_tokens + generated
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def _logprobs(self, of: Chunk | Completion, sample: int) -> dict[str, Any]:
        """The model's own log-probabilities, before temperature and filters, of a sample's next tokens."""
        sampled = [self._entry(*pair) for pair in zip(of.ids.tolist(), of.raw_logps.tolist(), strict=True)]
        others: list[list[dict[str, Any]]] = [[] for _ in sampled]
        if of.alternatives is not None:
            ids, logps = of.alternatives.ids.tolist(), of.alternatives.logps.tolist()
            others = [
                [self._entry(*pair) for pair in zip(*place, strict=True)] for place in zip(ids, logps, strict=True)
            ]
        if self._chat:
            content = [{**entry, "top_logprobs": top} for entry, top in zip(sampled, others, strict=True)]
            return {"content": content, "refusal": None}
        # Of tokens with the same text, such as parts of a character, the most probable one stays.
        *offsets, self._told[sample] = accumulate((len(e["token"]) for e in sampled), initial=self._told[sample])
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


def _joined(message: Any) -> Any:
    """A message whose content comes in parts, with one text for them: most chat templates know no other."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise ValueError("a message has parts that are no text, and text is all there is here")
    return {**message, "content": "".join(texts)}


def _params(served: Served, body: dict[str, Any]) -> SamplingParams:
    """Raises ValueError for a setting that is unknown or not supported."""
    body = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name, neutral in _NEUTRAL.items():
        if body.pop(name, None) not in neutral:
            raise ValueError(f"{name} is not supported; leave it out")
    for name, kinds in _KINDS.items():
        if name in body and not isinstance(body[name], kinds):
            raise ValueError(f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}, not {body[name]!r}")
    logprobs = body.pop("logprobs", None)
    # Chat asks by two keys, completions by one, the number of alternatives itself.
    best = body.pop("top_logprobs", 0 if logprobs is None or isinstance(logprobs, bool) else logprobs)
    if best and logprobs in (None, False):
        raise ValueError("top_logprobs needs logprobs")
    options: dict[str, Any] = {name: body.pop(name) for name in _SAME if name in body}
    for name in ("max_completion_tokens", "max_tokens"):
        if name in body:
            options["max_tokens"] = body.pop(name)
    options["alternatives"] = best
    stop = body.pop("stop", ())
    options["stop"] = [stop] if isinstance(stop, str) else stop
    options["stop_ids"] = [*body.pop("stop_token_ids", []), *served.stop_ids]
    options["logit_bias"] = {int(token): bias for token, bias in body.pop("logit_bias", {}).items()}
    if not all(isinstance(bias, float | int) for bias in options["logit_bias"].values()):
        raise ValueError("a bias in logit_bias must be a number")
    if body:
        raise ValueError(f"{next(iter(body))} is not supported; leave it out")
    return SamplingParams(**options)
