"""A tokenizer's chat template as a function of conversations, with what is fixed for the whole run."""

from __future__ import annotations

import inspect
import itertools
import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxtrain.data.tracing import Message, Trace, trace

PROBE = "jaxtrain-probe"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the key that holds an assistant's reasoning
USER: Message = {"role": "user", "content": PROBE}
ANSWER: Message = {"role": "assistant", "content": PROBE}

_ARGUMENT = "jaxtrain-argument"
# How templates write what they were not made for: null as text, a mapping as Python shows it, JSON within JSON.
_WRONG_FORM = ("None", "null", "{'", '\\"')
_NOT_FOR_TEMPLATES = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents",
    "kwargs",
}


class Chat(NamedTuple):
    """What a template is rendered with."""

    messages: list[Message]
    tools: list[Any] | None
    kwargs: dict[str, Any]  # further arguments

    def until(self, number: int) -> Chat:
        """Without the messages from `number` on."""
        return self._replace(messages=self.messages[:number])

    def with_message(self, number: int, message: Message) -> Chat:
        """With another message in the place of one."""
        return self._replace(messages=[*self.messages[:number], message, *self.messages[number + 1 :]])


class Template:
    """Renders what `apply_chat_template` would: in its environment, with its variables. Safe to call from threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kwargs: dict[str, Any], date: str | None):
        """`kwargs` are arguments of every conversation; `date` (year-month-day) is today's for the template.

        Raises ValueError for a tokenizer without a chat template, and for arguments that no template gets.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, which conversations need: give one "
                "as model.chat_template (a jinja file); prompt and completion that are strings can do without, with "
                "data.prompt_format=plain"
            )
        _check_arguments(kwargs, "data.chat_template_kwargs")
        self._tokenizer = tokenizer
        self.variables = {**tokenizer.special_tokens_map, **kwargs}
        if date is not None:
            self.variables["strftime_now"] = datetime.fromisoformat(date).strftime
        self._sources = [tokenizer.get_chat_template(tools=tools) for tools in (None, [])]
        self._call_form = lru_cache(maxsize=16)(self._find_call_form)

    def chat(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> Chat:
        """A conversation in the form that the template reads.

        The reasoning stands under every name that templates read, as transformers passes it on. Arguments of tool calls
        are mappings or JSON, and a call without content has null or an empty string: whichever the template writes.

        Raises ValueError for arguments that no template gets.
        """
        _check_arguments(kwargs or {}, "chat_template_kwargs")
        read = [_with_reasoning_names(message) for message in messages]
        if any(message.get("tool_calls") for message in read):
            empty, as_text = self._call_form(self.source(tools))
            read = [_with_calls(message, empty, as_text) if message.get("tool_calls") else message for message in read]
        return Chat(read, tools, kwargs or {})

    def source(self, tools: list[Any] | None) -> str:
        return self._sources[tools is not None]

    def trace(self, chat: Chat, *, prompt: bool = False) -> Trace:
        """Render a conversation; with `prompt`, up to where the assistant begins. Raises ValueError where it fails."""
        variables = {**self.variables, "tools": chat.tools, "add_generation_prompt": prompt, **chat.kwargs}
        return trace(self.source(chat.tools), chat.messages, variables)

    def _find_call_form(self, source: str) -> tuple[str | None, bool]:
        """The content of a tool call without content, and whether its arguments are JSON: tried on the template."""
        for empty, as_text in itertools.product((None, ""), (False, True)):
            message = _with_calls({"role": "assistant", "tool_calls": [probe_call()]}, empty, as_text)
            try:
                text = trace(source, [USER, message], self.variables | {"tools": None}).text
            except ValueError:
                continue
            call = text.rpartition(PROBE)[2]
            if _ARGUMENT in call and not any(wrong in call for wrong in _WRONG_FORM):
                return empty, as_text
        return "", False  # the template writes no calls: whoever checks what it leaves out will say so


def probe_call(name: str = "find") -> Message:
    function = {"name": name, "arguments": {"what": _ARGUMENT}}
    return {"id": "probe1234", "type": "function", "function": function}  # Mistral wants an id of 9 characters


def _check_arguments(kwargs: dict[str, Any], what: str) -> None:
    wrong = sorted(kwargs.keys() & _NOT_FOR_TEMPLATES)
    if wrong:
        raise ValueError(f"{what}: {', '.join(wrong)} is an option of rendering and not a variable of a chat template")


def _with_reasoning_names(message: Message) -> Message:
    """Without nulls but the content's, and with the reasoning under every name."""
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    found = [message[name] for name in REASONING if name in message]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def _with_calls(message: Message, empty: str | None, text: bool) -> Message:
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function")
        calls.append(
            call | {"function": _with_arguments(inner, text)}
            if isinstance(inner, dict)
            else _with_arguments(call, text)
        )
    return message | {"content": message.get("content") or empty, "tool_calls": calls}


def _with_arguments(function: Message, text: bool) -> Message:
    arguments: Any = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}  # templates would write null or an empty text
    if isinstance(arguments, str) == text:
        return function | {"arguments": arguments}
    if text:
        return function | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    try:
        return function | {"arguments": json.loads(arguments)}
    except ValueError:  # a model's own words; those of a data set were checked
        return function
