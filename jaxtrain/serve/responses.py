"""Converts the engine's chunks to a response, or to a stream of events."""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any

import numpy as np
from pydantic import BaseModel

from jaxtrain.sample.async_engine import StoppedError, StreamEndedError
from jaxtrain.sample.prompt_scores import PromptScores
from jaxtrain.sample.requests import Alternatives, Chunk, Completion
from jaxtrain.serve.answers import (
    AnsweredCall,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    ChatPiece,
    Finish,
    FunctionCall,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Token,
    TokenLogprobs,
    Usage,
    error_answer,
)
from jaxtrain.serve.outputs import CalledTool, Splitter
from jaxtrain.serve.protocol import Call
from jaxtrain.serve.schema import ChatCall, CompletionCall
from jaxtrain.serve.served import Served

log = logging.getLogger(__name__)


class FailedError(Exception):
    """The generation of a sample failed."""


class ResponseBuilder:
    """Builds the response to one call. Detokenizes in other threads, so that the event loop is not blocked."""

    def __init__(self, served: Served, call: Call, prompt_scores: Sequence[PromptScores] = ()):
        """`prompt_scores` are those of each prompt, if an echo has log-probabilities."""
        self._served, self._call, self._prompt_scores = served, call, prompt_scores
        self._chat = isinstance(call.body, ChatCall)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._generated = 0
        self._splitters: dict[int, Splitter] = {}  # of each choice of a chat
        self._sent: Counter[int] = Counter()  # characters of each choice whose log-probabilities have been sent

    async def build(self, chunks: AsyncGenerator[Chunk]) -> str:
        """The complete response as JSON. Raises FailedError if a sample fails, and cancels the others."""
        samples: dict[int, Completion] = {}
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.completion is not None:
                    samples[self._index(chunk)] = _unless_failed(chunk.completion)
        return await asyncio.to_thread(self._response, samples)

    async def stream(self, chunks: AsyncGenerator[Chunk]) -> AsyncIterator[str]:
        """Yield server-sent events. An error becomes the last event."""
        try:
            for index in range(self._call.samples if self._call.echo else 0):
                yield _as_event(self._piece([await asyncio.to_thread(self._echo, index)]))
            async with aclosing(chunks):
                async for chunk in chunks:
                    # Only the texts of log-probabilities take long.
                    yield await asyncio.to_thread(self._event, chunk) if self._call.logprobs else self._event(chunk)
            if self._call.usage:
                yield _as_event(self._piece([], self._usage()))
            yield "data: [DONE]\n\n"
        except StreamEndedError as error:
            yield _as_event(error_answer(str(error), "timeout_error"))
        except (FailedError, StoppedError) as error:
            yield _as_event(error_answer(str(error), "server_error"))
        except Exception as error:  # too late for an HTTP status, so the error is sent as an event
            log.exception("a stream failed")
            yield _as_event(error_answer(f"{type(error).__name__}: {error}", "server_error"))

    def _index(self, chunk: Chunk) -> int:
        """The choice of a chunk: all of the first prompt come first."""
        return chunk.request * self._call.body.n + chunk.sample

    def _response(self, samples: dict[int, Completion]) -> str:
        self._generated = sum(len(sample.ids) for sample in samples.values())
        ordered = sorted(samples.items())
        if self._chat:
            choices = [
                ChatChoice(
                    index=index,
                    message=self._message(index, sample.text or "", final=True),
                    logprobs=self._chat_logprobs(sample),
                    finish_reason=self._finish(index, sample),
                )
                for index, sample in ordered
            ]
            answer = ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=self._usage())
        else:
            echoes = [self._echo(index) for index in range(self._call.samples)] if self._call.echo else []
            choices = [self._text_choice(index, sample.text or "", sample, sample) for index, sample in ordered]
            if echoes:
                choices = [_joined(*both) for both in zip(echoes, choices, strict=True)] if choices else echoes
            answer = TextCompletion(**self._head, object="text_completion", choices=choices, usage=self._usage())
        return _as_json(answer)

    def _event(self, chunk: Chunk) -> str:
        """The event for a chunk. Raises FailedError for a sample that failed."""
        sample = None if chunk.completion is None else _unless_failed(chunk.completion)
        self._generated += len(chunk.ids)
        index, text = self._index(chunk), chunk.text or ""
        if self._chat:
            choice = ChatPiece(
                index=index,
                delta=self._message(index, text, final=sample is not None),
                logprobs=self._chat_logprobs(chunk),
                finish_reason=None if sample is None else self._finish(index, sample),
            )
        else:
            choice = self._text_choice(index, text, chunk, sample)
        return _as_event(self._piece([choice]))

    def _message(self, index: int, text: str, final: bool) -> ChatMessage:
        """The message of a choice, or what `text` adds to it."""
        assert self._call.parse is not None
        first = index not in self._splitters
        splitter = self._splitters.setdefault(index, Splitter(self._call.parse))
        parts = splitter.feed(text, final)
        message: dict[str, Any] = {"role": "assistant"} if first else {}
        message["content"] = parts.content
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if parts.calls:
            message["tool_calls"] = self._tool_calls(parts.calls, splitter.called - len(parts.calls))
        return ChatMessage(**message)

    def _tool_calls(self, calls: list[CalledTool], before: int) -> list[AnsweredCall]:
        """Tool calls, of which a choice had `before` already. Each is sent as a whole."""
        return [
            AnsweredCall(
                **({"index": number} if self._call.body.stream else {}),
                id=f"call_{uuid.uuid4().hex[:24]}",
                type="function",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(calls, before)
        ]

    def _finish(self, index: int, sample: Completion) -> Finish:
        called = index in self._splitters and self._splitters[index].called
        return "tool_calls" if called and sample.finish_reason == "stop" else _finish(sample)

    @property
    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "created": self._created, "model": self._served.name}

    def _piece(self, choices: list, usage: Usage | None = None) -> ChatCompletionChunk | TextCompletion:
        """An event of a stream. If requested, `usage` is set in the last one and null in the others."""
        usage_field: dict[str, Any] = {"usage": usage} if self._call.usage else {}
        if self._chat:
            return ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=choices, **usage_field)
        return TextCompletion(**self._head, object="text_completion", choices=choices, **usage_field)

    def _usage(self) -> Usage:
        prompt = sum(len(request.prompt_ids) for request in self._call.requests)
        return Usage(prompt_tokens=prompt, completion_tokens=self._generated, total_tokens=prompt + self._generated)

    def _text_choice(self, index: int, text: str, of: Chunk | Completion, sample: Completion | None) -> TextChoice:
        logprobs = None
        if self._call.logprobs:
            logprobs = self._text_logprobs(of.ids, of.raw_logps, of.alternatives, index)
        return TextChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=None if sample is None else _finish(sample)
        )

    def _echo(self, index: int) -> TextChoice:
        """A choice that is the prompt. The first token has no log-probability."""
        number = index // self._call.body.n
        ids = np.asarray(self._call.requests[number].prompt_ids)
        assert isinstance(self._call.body, CompletionCall)
        given = self._call.body.prompt[number]
        finish = None if self._call.generates else "length"
        text = given if isinstance(given, str) else self._served.tokenizer.decode(ids)
        if not self._call.logprobs:
            return TextChoice(index=index, text=text, logprobs=None, finish_reason=finish)
        scores = self._prompt_scores[number]
        first = self._token(int(ids[0]), 0.0).token
        rest = self._text_logprobs(ids[1:], scores.logps, scores.alternatives, index, len(first))
        logprobs = TextLogprobs(
            tokens=[first, *rest.tokens],
            token_logprobs=[None, *rest.token_logprobs],
            top_logprobs=None if rest.top_logprobs is None else [None, *rest.top_logprobs],
            text_offset=[0, *rest.text_offset],
        )
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)

    def _chat_logprobs(self, of: Chunk | Completion) -> ChatLogprobs | None:
        """The model's log-probabilities, before temperature and filters."""
        if not self._call.logprobs:
            return None
        sampled, others = self._tokens(of.ids, of.raw_logps, of.alternatives)
        content = [
            TokenLogprobs(token=each.token, logprob=each.logprob, bytes=each.bytes, top_logprobs=top)
            for each, top in zip(sampled, others, strict=True)
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _text_logprobs(
        self, ids: np.ndarray, logps: np.ndarray, alternatives: Alternatives | None, index: int, skipped: int = 0
    ) -> TextLogprobs:
        """Of the next tokens of a choice, `skipped` characters after those that have been sent."""
        sampled, others = self._tokens(ids, logps, alternatives)
        start = self._sent[index] + skipped
        *offsets, self._sent[index] = accumulate((len(each.token) for each in sampled), initial=start)
        # Of tokens with the same text, such as parts of a character, keep the most probable one.
        best = [{each.token: each.logprob for each in reversed(top)} for top in others]
        return TextLogprobs(
            tokens=[each.token for each in sampled],
            token_logprobs=[each.logprob for each in sampled],
            top_logprobs=[*best] if any(best) else None,
            text_offset=offsets,
        )

    def _tokens(
        self, ids: np.ndarray, logps: np.ndarray, alternatives: Alternatives | None
    ) -> tuple[list[Token], list[list[Token]]]:
        """Tokens with their log-probabilities, and the most probable ones at the place of each."""
        sampled = [self._token(*pair) for pair in zip(ids.tolist(), logps.tolist(), strict=True)]
        if alternatives is None:
            return sampled, [[] for _ in sampled]
        places = zip(alternatives.ids.tolist(), alternatives.logps.tolist(), strict=True)
        return sampled, [[self._token(*pair) for pair in zip(*place, strict=True)] for place in places]

    def _token(self, token: int, logp: float) -> Token:
        text = self._served.tokenizer.decode([token])
        return Token(token=text, logprob=logp, bytes=list(text.encode()))


def _unless_failed(sample: Completion) -> Completion:
    if sample.error is not None:
        raise FailedError(sample.error)
    return sample


def _joined(echo: TextChoice, choice: TextChoice) -> TextChoice:
    """A choice that begins with its prompt."""
    logprobs, first = choice.logprobs, echo.logprobs
    if logprobs is not None and first is not None:
        best = None
        if first.top_logprobs is not None or logprobs.top_logprobs is not None:
            best = [*(first.top_logprobs or [None]), *(logprobs.top_logprobs or [])]
        logprobs = TextLogprobs(
            tokens=first.tokens + logprobs.tokens,
            token_logprobs=first.token_logprobs + logprobs.token_logprobs,
            top_logprobs=best,
            text_offset=first.text_offset + logprobs.text_offset,
        )
    return choice.model_copy(update={"text": echo.text + choice.text, "logprobs": logprobs})


def _finish(sample: Completion) -> Finish:
    assert sample.finish_reason != "failed"
    return sample.finish_reason


def _as_json(answer: BaseModel) -> str:
    return answer.model_dump_json(exclude_unset=True)


def _as_event(answer: BaseModel) -> str:
    return f"data: {_as_json(answer)}\n\n"
