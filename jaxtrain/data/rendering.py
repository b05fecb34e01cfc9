"""A tokenizer's chat template as a function of conversations, with what is fixed for the whole run."""

from __future__ import annotations

import inspect
import itertools
import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxtrain.data.thoughts import MARKS, REASONING, THOUGHTS, opened_thought, with_reasoning_key
from jaxtrain.data.tracing import Message, Trace, trace, variables_read

PROBE = "jaxtrain-probe"
USER: Message = {"role": "user", "content": PROBE}
ANSWER: Message = {"role": "assistant", "content": PROBE}

_ARGUMENT = "jaxtrain-argument"
_THOUGHT = "jaxtrain-thought"
# How templates write what they were not made for: null as text, a mapping as Python shows it, JSON within JSON.
_WRONG_FORM = ("None", "null", "{'", '\\"')
_NOT_FOR_TEMPLATES = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents",
    "kwargs",
}
# What every rendering has, whatever the arguments are.
_ALWAYS_GIVEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
)


class Chat(NamedTuple):
    """What a template is rendered with."""

    messages: list[Message]
    tools: list[Any] | None
    kwargs: dict[str, Any]  # further arguments
    moved: frozenset[int] = frozenset()  # messages whose thought stood in the content

    def until(self, number: int) -> Chat:
        """Without the messages from `number` on."""
        return self._replace(messages=self.messages[:number])

    def with_message(self, number: int, message: Message) -> Chat:
        """With another message in the place of one."""
        return self._replace(messages=[*self.messages[:number], message, *self.messages[number + 1 :]])


class ThoughtForm(NamedTuple):
    """How a template reads thoughts."""

    keyed: frozenset[str]  # marks in the content that it does not know, though it reads the key of the reasoning
    opened: str  # the mark with which the prompt opens a thought, if it does


class Template:
    """Renders what `apply_chat_template` would: in its environment, with its variables. Safe to call from threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kwargs: dict[str, Any], date: str | None):
        """`kwargs` are arguments of every conversation; `date` (year-month-day) is today's for the template.

        Raises ValueError for a tokenizer without a chat template, and for arguments that the template does not read.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, which conversations need: give one "
                "as model.chat_template (a jinja file); prompt and completion that are strings can do without, with "
                "data.prompt_format=plain"
            )
        _check_arguments(kwargs, "data.chat_template_kwargs")
        self._tokenizer = tokenizer
        self._sources = [tokenizer.get_chat_template(tools=tools) for tools in (None, [])]
        self.reads = frozenset[str]().union(*map(variables_read, self._sources))
        if unread := sorted(kwargs.keys() - self.reads):
            known = ", ".join(sorted(self.reads - _ALWAYS_GIVEN - tokenizer.special_tokens_map.keys())) or "none"
            raise ValueError(
                f"data.chat_template_kwargs: the chat template does not read {', '.join(unread)}; its variables are: "
                f"{known}"
            )
        self._bare: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if date is not None:
            self._bare["strftime_now"] = datetime.fromisoformat(date).strftime
        self.variables = self._bare | kwargs
        self._call_form = lru_cache(maxsize=16)(self._find_call_form)
        self._thought_form = lru_cache(maxsize=16)(self._find_thought_form)

    def chat(self, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any] | None) -> Chat:
        """A conversation in the form that the template reads.

        The reasoning is set under every name that templates read, as transformers passes it on. Arguments of tool calls
        are mappings or JSON, and a call without content has null or an empty string: whichever the template writes.
        A thought that begins the content, between marks that the template would write as words, stands under the key.

        Raises ValueError for arguments that no template gets.
        """
        if kwargs:
            _check_arguments(kwargs, "chat_template_kwargs")
        read = [_with_reasoning_names(message) for message in messages]
        if any(message.get("tool_calls") for message in read):
            empty, as_text = self._call_form(self.source(tools))
            read = [_with_calls(message, empty, as_text) if message.get("tool_calls") else message for message in read]
        chat = Chat(read, tools, kwargs or {})
        marked = [
            number
            for number, message in enumerate(read)
            if message["role"] == "assistant" and isinstance(said := message.get("content"), str) and MARKS.search(said)
        ]
        if not marked:
            return chat
        form = self.thought_form(chat)
        moved = {number: with_reasoning_key(read[number], *form) for number in marked}
        return chat._replace(
            messages=[moved.get(number, message) for number, message in enumerate(read)],
            moved=frozenset(number for number, message in moved.items() if message is not read[number]),
        )

    def thought_form(self, chat: Chat) -> ThoughtForm:
        return self._thought_form(self.source(chat.tools), json.dumps(chat.kwargs, sort_keys=True))

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

    def _find_thought_form(self, source: str, kwargs_json: str) -> ThoughtForm:
        """Tried on the template, also without arguments, since these may turn thoughts off."""
        given = self.variables | json.loads(kwargs_json)

        def written(variables: dict[str, Any], content: str, **more: Any) -> str | None:
            turn = {"role": "assistant", "content": content, **more}
            try:
                text = trace(source, [USER, turn], variables | {"tools": None}).text
            except ValueError:
                return None
            return "".join(text.split())  # templates differ in the white space around a thought

        keyed: set[str] = set()
        calling = _with_calls({"tool_calls": [probe_call()]}, *self._call_form(source))["tool_calls"]
        for variables, more in itertools.product((self._bare, given), ({}, {"tool_calls": calling})):
            under_key = written(variables, PROBE, **more, **dict.fromkeys(REASONING, _THOUGHT))
            if under_key is None or _THOUGHT not in under_key:
                continue
            for begin, end in THOUGHTS:
                if written(variables, f"{begin}\n{_THOUGHT}\n{end}\n\n{PROBE}", **more) != under_key:
                    keyed.add(begin)
        try:
            prompt = trace(source, [USER], given | {"tools": None, "add_generation_prompt": True}).text
        except ValueError:
            prompt = ""
        return ThoughtForm(frozenset(keyed), opened_thought(prompt))


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
