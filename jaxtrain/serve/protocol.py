"""Converts the body of a call to requests of the engine. What a body may hold is in `schema`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from jaxtrain.sample.grammar import Grammar, guidance_tokenizer, json_schema_grammar, lark_grammar, regex_grammar
from jaxtrain.sample.requests import FieldError, Request, SamplingParams, shortened, shown
from jaxtrain.serve.limits import Limits
from jaxtrain.serve.outputs import Parser, parser, thought_of
from jaxtrain.serve.schema import (
    ChatCall,
    CompletionCall,
    JsonSchemaFormat,
    NamedTool,
    RegexFormat,
    Sampling,
    TextFormat,
    Tool,
)
from jaxtrain.serve.served import Served
from jaxtrain.serve.tool_formats import complete_parser, forced_call, tool_format

_Body = TypeVar("_Body", ChatCall, CompletionCall)

_END_OF_PROMPT = 16  # tokens of a prompt that may open a thought
_MAX_FAULTS = 100  # of one body: more are not looked at


class Call(NamedTuple):
    """A valid call."""

    body: ChatCall | CompletionCall
    requests: list[Request]  # of each prompt
    logprobs: bool
    usage: bool  # at the end of a stream
    parse: Parser | None = None  # of the texts of a chat

    @property
    def echo(self) -> bool:
        return isinstance(self.body, CompletionCall) and self.body.echo

    @property
    def generates(self) -> bool:
        """Whether new tokens are wanted, besides an echo of the prompts."""
        return self.body.max_tokens != 0

    @property
    def samples(self) -> int:
        return sum(request.params.n for request in self.requests)


def read_call(served: Served, raw: bytes, *, chat: bool, limits: Limits) -> Call:
    """Parse and validate the body of a call. Thread-safe.

    Raises ValueError, or its subclass FieldError for an invalid field.
    """
    try:
        body = read_body(raw, ChatCall if chat else CompletionCall)
        return _read_call(served, body, limits)
    except RecursionError as error:  # of a chat template
        raise ValueError("the body is nested too deeply") from error


def read_body(raw: bytes, kind: type[_Body]) -> _Body:
    """The JSON object `raw` as a body of this kind. Fields that are null have their defaults.

    Raises ValueError, or its subclass FieldError for an invalid field.
    """
    try:
        given = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(given, dict):
        raise ValueError("the body must be a JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS:
            raise ValueError(f"the body has {error.error_count()} invalid values") from error
        raise _field_error(error.errors(include_url=False), given) from error


def _field_error(errors: list[ErrorDetails], given: Mapping[str, Any]) -> FieldError:
    """The fault of one value. What the value might be instead are several errors of pydantic; the deepest is of the
    kind that was most likely meant."""
    field = str(errors[0]["loc"][0])
    errors = [error for error in errors if error["loc"][0] == field]
    places = [_place(error, given) for error in errors]
    path, value = max(places, key=lambda place: place[0].count(".") + place[0].count("["))
    found = [error for error, place in zip(errors, places, strict=True) if place[0] == path]
    name = shortened(path)
    if found[0]["type"] == "extra_forbidden":
        return _refused(field, f"{name} is not supported; leave it out")
    if found[0]["type"] == "missing":
        return _refused(field, f"{name} is missing")
    wanted = " or ".join(dict.fromkeys(map(_wanted, found)))
    return _refused(
        field, f"{name} must {wanted}" + ("" if found[0]["type"] == "value_error" else f", not {shown(value)}")
    )


def _place(error: ErrorDetails, given: Mapping[str, Any]) -> tuple[str, Any]:
    """The path and the value in the body `given` that an error is about. pydantic's location also names the member of
    a union, which is left out."""
    path, value = "", cast(Any, given)
    for part in error["loc"]:
        if isinstance(value, dict) and (part in value or error["type"] in ("missing", "extra_forbidden")):
            path, value = f"{path}.{part}" if path else str(part), value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            path, value = f"{path}[{part}]", value[part]
    return path, value


def _wanted(error: ErrorDetails) -> str:
    """What a value must do, in the words of pydantic: "be a valid integer", "have at most 16 items"."""
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return "have one of the types " + (error.get("ctx") or {}).get("expected_tags", "that are supported")
    _, _, words = error["msg"].partition("must " if error["type"] == "value_error" else " should ")
    words, _, _ = words.partition(" after validation")
    return words.replace("a valid dictionary or instance of GivenMessage", "an object").replace("dictionary", "object")


def _read_call(served: Served, body: ChatCall | CompletionCall, limits: Limits) -> Call:
    usage = _usage(body)
    logprobs, alternatives = _logprobs(body)
    prompts = _prompts(served, body)
    params = _params(served, body, alternatives)
    chat, parse = isinstance(body, ChatCall), None
    if chat:
        parse, skip_special_tokens = _parser(served, body, prompts[0])
        params = replace(params, skip_special_tokens=skip_special_tokens)
    if (grammar := _grammar(served, body, prompts[0])) is not None:
        params = replace(params, grammar=grammar)
    names = {"prompt_ids": "messages" if chat else "prompt", "stop_ids": "stop_token_ids"}
    names["alternatives"] = "top_logprobs" if chat else "logprobs"
    if body.max_tokens is None:
        names["max_tokens"] = "max_completion_tokens"
    requests = []
    for ids in prompts:
        try:
            served.engine.check([Request(ids, params)])
        except FieldError as error:
            name = names.get(error.field, error.field)
            problem = error.problem if name in error.problem else f"{name}: {error.problem}"
            raise _refused(name, problem) from error
        requests.append(Request(np.asarray(ids, np.int32), params))  # an array is faster to check again
    call = Call(body, requests, logprobs, usage, parse)
    _check_size(call, served.engine.max_length, limits)
    return call


def _refused(name: str, problem: str) -> FieldError:
    return FieldError("the body", name, problem)


def _usage(body: ChatCall | CompletionCall) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise _refused("stream_options", "stream_options needs stream to be true")
    return body.stream_options.include_usage


def _logprobs(body: ChatCall | CompletionCall) -> tuple[bool, int]:
    """Whether log-probabilities are answered, and of how many alternatives."""
    if isinstance(body, CompletionCall):
        asked = body.logprobs
        return asked is not False, 0 if isinstance(asked, bool) else asked  # 0 asks for those of the tokens alone
    if body.top_logprobs and not body.logprobs:
        raise _refused("top_logprobs", "top_logprobs needs logprobs to be true")
    return body.logprobs, body.top_logprobs or 0


def _params(served: Served, body: ChatCall | CompletionCall, alternatives: int) -> SamplingParams:
    options = {name: getattr(body, name) for name in Sampling.model_fields}
    if isinstance(body, CompletionCall) and body.max_tokens == 0:
        if not body.echo:
            raise _refused("max_tokens", "max_tokens must be at least 1 without echo")
        options["max_tokens"] = 1  # which is not generated
    if isinstance(body, ChatCall) and body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            name = "max_completion_tokens"
            raise _refused(name, f"{name} and max_tokens are the same parameter; give only one of them")
        options["max_tokens"] = body.max_completion_tokens
    try:
        params = SamplingParams(
            **options,
            top_k=max(body.top_k, 0),
            stop=[body.stop] if isinstance(body.stop, str) else body.stop,
            stop_ids=body.stop_token_ids,
            logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
            alternatives=alternatives,
        )
    except FieldError as error:
        raise _refused(error.field, error.problem) from error
    return served.ending(params)


def _check_size(call: Call, max_length: int, limits: Limits) -> None:
    """Raise FieldError for a call whose response would be too large."""
    if call.samples > limits.max_samples:
        prompts = "" if len(call.requests) == 1 else f" of {len(call.requests)} prompts"
        raise _refused("n", f"n={call.body.n}{prompts} must be at most {limits.max_samples} samples")
    params = call.requests[0].params
    tokens = 0
    for each in call.requests:
        new = params.max_tokens or max_length - len(each.prompt_ids)
        tokens += params.n * (new + len(each.prompt_ids) if call.echo else new)
    values = tokens * (1 + params.alternatives)
    if call.logprobs and values > limits.max_logprobs:
        raise _refused(
            "logprobs",
            f"logprobs: up to {tokens} tokens with {params.alternatives} alternatives each are {values} values, and "
            f"the maximum is {limits.max_logprobs}; use a smaller n, max_tokens or number of alternatives",
        )


def _parser(served: Served, body: ChatCall, prompt_ids: np.ndarray) -> tuple[Parser, bool]:
    """The parser of the answers, and whether it needs no special tokens in their text."""
    found = tool_format(str(served.tokenizer.chat_template))
    if for_format := complete_parser(found):
        return for_format, False
    opened = thought_of(_end_of_prompt(served, prompt_ids))
    if not _offered(body):
        return parser(opened, None), body.skip_special_tokens
    if found is None:
        raise _refused("tools", "tools: the model's chat template is not in a known format of tool calls")
    return parser(opened, found.read), False


def _grammar(served: Served, body: ChatCall | CompletionCall, prompt_ids: np.ndarray) -> Grammar | None:
    """What the answers must follow: response_format, or a call of a tool that is required."""
    wanted, field = body.response_format, "response_format"
    call = isinstance(body, ChatCall) and body.tool_choice not in ("auto", "none")
    if call:
        field = "tool_choice"
    elif wanted is None or isinstance(wanted, TextFormat):
        return None
    if call and wanted is not None:
        raise _refused(field, "tool_choice: a call of a tool and response_format exclude each other")
    try:
        if isinstance(body, ChatCall) and thought_of(_end_of_prompt(served, prompt_ids)):
            raise ValueError("the prompt opens a thought; turn it off, for example by chat_template_kwargs")
        vocab_size, ends = served.engine.model.config.vocab_size, tuple(served.stop_ids)
        tokenizer = guidance_tokenizer(served.tokenizer, vocab_size, ends)
        if isinstance(body, ChatCall) and call:
            return lark_grammar(
                tokenizer, forced_call(tool_format(str(served.tokenizer.chat_template)), _offered(body))
            )
        if isinstance(wanted, RegexFormat):
            return regex_grammar(tokenizer, wanted.pattern)
        schema = wanted.json_schema.json_schema if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
        return json_schema_grammar(tokenizer, schema)
    except FieldError:
        raise
    except ValueError as error:
        raise _refused(field, f"{field}: {error}") from error


def _end_of_prompt(served: Served, prompt_ids: np.ndarray) -> str:
    return served.tokenizer.decode(prompt_ids[-_END_OF_PROMPT:])


def _offered(body: ChatCall) -> list[Tool]:
    """The tools that the model may call."""
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        if not (chosen := [tool for tool in body.tools if tool.function.name == name]):
            raise _refused("tool_choice", f"tool_choice: there is no tool {name!r} in tools")
        return chosen
    if body.tool_choice == "required" and not body.tools:
        raise _refused("tool_choice", "tool_choice: required needs tools")
    return [] if body.tool_choice == "none" else body.tools


def _prompts(served: Served, body: ChatCall | CompletionCall) -> list[np.ndarray]:
    """The token ids of each prompt."""
    try:
        if isinstance(body, ChatCall):
            effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
            row = {
                "messages": [message.for_template() for message in body.messages],
                "tools": [tool.model_dump(exclude_none=True) for tool in _offered(body)] or None,
                "chat_template_kwargs": effort | body.chat_template_kwargs or None,
            }
            return [served.prompt_ids(row)]
        return [
            served.prompt_ids({"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}, plain=True)
            for prompt in body.prompt
        ]
    except FieldError:
        raise
    except ValueError as error:
        raise _refused("messages" if isinstance(body, ChatCall) else "prompt", str(error)) from error
