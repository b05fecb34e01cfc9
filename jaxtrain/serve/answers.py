"""The bodies of responses as pydantic models. What is not set is left out of the JSON."""

from typing import Literal

from pydantic import BaseModel

Finish = Literal["stop", "length", "tool_calls"]


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: Error


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Token(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Token):
    top_logprobs: list[Token]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Of each token of a text; a first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class FunctionCall(BaseModel):
    name: str | None = None  # set in the first piece of a streamed call
    arguments: str


class AnsweredCall(BaseModel):
    index: int | None = None  # set in a stream
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(BaseModel):
    """A message, or a piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatPiece(BaseModel):
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class TextChoice(BaseModel):
    """A text, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class _Answer(BaseModel):
    id: str
    created: int
    model: str


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None  # of the last event, where asked for


class TextCompletion(_Answer):
    """A response, or an event of a stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "jaxtrain"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


def error_answer(message: str, kind: str, param: str | None = None) -> ErrorAnswer:
    return ErrorAnswer(error=Error(message=message, type=kind, param=param, code=None))
