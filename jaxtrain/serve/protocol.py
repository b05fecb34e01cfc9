"""Converts the body of a call to a request of the engine, and validates everything that a client may send.

`FIELDS` is the table of accepted fields. The bounds of numbers are those of `SamplingParams`; `Limits` has those
of the server.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.sample.requests import Bounds, FieldError, Request, SamplingParams, shown
from jaxtrain.serve.served import Served

ALTERNATIVES = 20  # the maximum of OpenAI's `top_logprobs`

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")
_MAX_DIGITS = 4300  # of an integer that Python converts


@dataclass(frozen=True)
class Limits:
    """The limits of a call, and of all pending calls together."""

    samples: int = 256  # maximum `n` of a call
    body: int = 8 * 2**20  # maximum bytes of a call's body
    queue: int = 4096  # maximum number of running and waiting samples; further calls are refused


class Field(NamedTuple):
    """A field of a call's body."""

    parameter: str | None = None  # of SamplingParams, where its value is one as it is
    kind: type | None = None  # what it must be, where SamplingParams does not say so
    endpoint: str | None = None  # "chat" or "completions"; None: of both
    only: tuple[Any, ...] = ()  # the values that are accepted, of a field that is not supported otherwise


OTHERWISE = {
    "stop_ids": "vLLM's name is stop_token_ids",
    "alternatives": "OpenAI's names are logprobs and top_logprobs",
    "logprobs": "OpenAI's logprobs says whether they are answered; the engine always computes them",
    "logit_bias": "its keys are text in JSON",
    "allowed_ids": "no API has it",
    "trie": "no API has it",
}
"""Fields of SamplingParams that are no fields of a body as they are, and why."""

FIELDS: Mapping[str, Field] = {
    **{field.name: Field(field.name) for field in fields(SamplingParams) if field.name not in OTHERWISE},
    "messages": Field(endpoint="chat"),  # a list of messages: see `_messages`
    "prompt": Field(endpoint="completions"),  # one text, or the token ids of one
    "max_completion_tokens": Field("max_tokens"),  # another name of the same
    "logit_bias": Field(kind=dict),  # token ids, as JSON's keys are text, to numbers
    "stop_token_ids": Field("stop_ids"),
    "logprobs": Field(),  # chat: true or false; completions: that, or the number of alternatives
    "top_logprobs": Field("alternatives", endpoint="chat"),
    "stream": Field(kind=bool),
    "stream_options": Field(kind=dict),  # include_usage: true or false
    "model": Field(kind=str),  # not read: there is one model
    "user": Field(kind=str),  # not read
    "metadata": Field(kind=dict),  # not read
    "store": Field(only=(False,)),
    "echo": Field(only=(False,)),
    "best_of": Field(only=(1,)),
}
_KINDS = {dict: "an object", bool: "true or false", str: "a text"}


class Call(NamedTuple):
    """A valid call."""

    chat: bool
    request: Request
    logprobs: bool
    stream: bool
    usage: bool  # at the end of a stream


def read_call(served: Served, raw: bytes, *, chat: bool, limits: Limits) -> Call:
    """Parse and validate the body of a call. Thread-safe.

    Raises ValueError, or its subclass FieldError for an invalid field.
    """
    try:
        return _read_call(served, raw, chat, limits)
    except RecursionError as error:  # of the JSON parser, of a chat template, of a value's representation
        raise ValueError("the body is nested too deeply") from error


def _read_call(served: Served, raw: bytes, chat: bool, limits: Limits) -> Call:
    body = {name: value for name, value in _read_json(raw).items() if value is not None}
    where = "chat" if chat else "completions"
    for name, value in body.items():
        field = FIELDS.get(name)
        if field is None or field.endpoint not in (None, where):
            raise _refused(name, f"{_cut(name)} is not supported; leave it out")
        if field.only and not any(value is each for each in field.only):
            raise _refused(name, f"{name} is not supported; leave it out")
        if field.kind is not None and not isinstance(value, field.kind):
            raise _refused(name, f"{name} must be {_KINDS[field.kind]}, not {shown(value)}")
    usage = _usage(body)
    logprobs, alternatives = _logprobs(body, chat)
    params, names = _params(served, body, alternatives, limits)
    try:
        request = Request(_prompt_ids(served, body, chat), params)
        served.engine.check([request])
    except FieldError as error:
        names |= {"prompt_ids": "messages" if chat else "prompt"}
        raise _renamed(error, names) from error
    request = Request(np.asarray(request.prompt_ids, np.int32), params)  # an array is faster to check again
    return Call(chat, request, logprobs, body.get("stream", False), usage)


def _refused(name: str, problem: str) -> FieldError:
    return FieldError("the body", name, problem)


def _renamed(error: FieldError, names: Mapping[str, str]) -> FieldError:
    """The error of a parameter, converted to an error of the field that it came from."""
    name = names.get(error.field, error.field)
    return _refused(name, error.problem if name in error.problem else f"{name}: {error.problem}")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_json(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
        body = json.loads(text, parse_int=_integer)
    except ValueError as error:
        raise ValueError(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    if _ESCAPED_SURROGATE.search(text):
        _refuse_surrogates(body)
    return body


def _integer(digits: str) -> int | float:
    """Integers with too many digits for Python's int() become floats, which are out of bounds for every field."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _refuse_surrogates(body: dict[str, Any]) -> None:
    """Raise FieldError for a lone surrogate at any depth, because it cannot be encoded."""
    for name, top in body.items():
        left = [name, top]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                left += [*value, *value.values()]
            elif isinstance(value, list):
                left += value
            elif isinstance(value, str) and _SURROGATE.search(value):
                name = name.encode(errors="backslashreplace").decode()
                raise _refused(name, f"{_cut(name)} contains a lone surrogate, which is not a valid character")


def _usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not body.get("stream"):
        raise _refused("stream_options", "stream_options needs stream to be true")
    for name, value in options.items():
        if name != "include_usage":
            raise _refused("stream_options", f"stream_options.{_cut(name)} is not supported; leave it out")
        if not isinstance(value, bool):
            raise _refused("stream_options", f"stream_options.{name} must be true or false, not {shown(value)}")
    return options.get("include_usage", False)


def _logprobs(body: dict[str, Any], chat: bool) -> tuple[bool, int]:
    """Whether log-probabilities are requested, and the number of alternatives. Chat has two fields for this."""
    wanted = body.get("logprobs", False)
    if isinstance(wanted, bool):
        best = body.get("top_logprobs", 0)
    elif chat:
        raise _refused("logprobs", f"logprobs must be true or false, not {shown(wanted)}")
    else:
        wanted, best = True, wanted  # 0 requests those of the sampled tokens
    name = "top_logprobs" if chat else "logprobs"
    if problem := Bounds(int, 0, ALTERNATIVES).problem(name, best):
        raise _refused(name, problem)
    if best and not wanted:
        raise _refused("top_logprobs", "top_logprobs needs logprobs")
    return wanted, best


def _params(
    served: Served, body: dict[str, Any], alternatives: int, limits: Limits
) -> tuple[SamplingParams, dict[str, str]]:
    """The parameters, and the name of the field for each of them."""
    options: dict[str, Any] = {}
    names = {"alternatives": "top_logprobs" if "top_logprobs" in body else "logprobs"}
    for name, value in body.items():
        parameter = FIELDS[name].parameter
        if parameter is None:
            continue
        if parameter in options and options[parameter] != value:
            raise _refused(name, f"{name} and {names[parameter]} are the same parameter; give only one of them")
        options[parameter], names[parameter] = value, name
    options["alternatives"] = alternatives
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    options["logit_bias"] = {_token_id(key): bias for key, bias in body.get("logit_bias", {}).items()}
    try:
        params = SamplingParams(**options)
        if params.n > limits.samples:
            raise _refused("n", f"n={params.n} must be at most {limits.samples}")
        return served.ending(params), names
    except FieldError as error:
        raise _renamed(error, names) from error


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise _refused("logit_bias", f"the keys of logit_bias must be token ids, not {_cut(repr(key))}")
    return int(key)


def _prompt_ids(served: Served, body: dict[str, Any], chat: bool) -> Any:
    name = "messages" if chat else "prompt"
    if name not in body:
        raise _refused(name, f"the body lacks {name}")
    try:
        if chat:
            return served.prompt_ids({"messages": _messages(body["messages"])})
        if isinstance(body["prompt"], str):
            return served.prompt_ids({"prompt": body["prompt"]}, plain=True)
    except FieldError:
        raise
    except ValueError as error:
        raise _refused(name, str(error)) from error
    if isinstance(body["prompt"], list) and not any(isinstance(each, str | list) for each in body["prompt"]):
        return body["prompt"]  # validated by `Engine.check`
    raise _refused(name, "prompt must be a string or a list of token ids")


def _messages(messages: Any) -> list[dict[str, Any]]:
    """The messages; content in parts is joined to a string, because most chat templates support only strings."""
    if not isinstance(messages, list) or not messages:
        raise _refused("messages", "messages must be a list of at least one message")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _refused("messages", f"{name} must be an object with a role, not {shown(message)}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise _refused("messages", f"{name}.content must be a string or a list of parts, not {shown(content)}")
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise _refused("messages", f"{name}.content has parts that are not text, which are not supported")
    return {**message, "content": "".join(texts)}
