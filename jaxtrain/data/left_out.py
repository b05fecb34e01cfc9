"""Finds what a chat template leaves out of a conversation, by changing a part and rendering again.

A part whose words occur in the rendered text is assumed to be written, so that few conversations are rendered twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from jaxtrain.data.rendering import PROBE, Chat, Template
from jaxtrain.data.thoughts import MARKS, REASONING, THOUGHTS, opened_thought
from jaxtrain.data.tracing import Message, Trace

Render = Callable[[Chat], str]

_PARTS = ("content", "reasoning_content", "tool_calls")  # of a message
_ENDS = [[end] for _, end in THOUGHTS]

CHOICES = (
    "data.split_turns=true makes every turn a separate example, prompted as it is when the model is used; "
    "data.split_turns=false accepts it, and counts the rows as `thoughts_left_out`"
)


class LeftOut:
    """Checks under one template. Safe to call from threads."""

    def __init__(self, template: Template):
        self._template = template
        self._written: set[tuple[Any, ...]] = set()  # what was seen to be written: roles, schemas, kinds of call

    def check(self, text: str, chat: Chat, render: Render, first: int = 0) -> None:
        """Raises ValueError where `text`, which is `render(chat)`, leaves out schemas of tools, tool calls, or what a
        message of another role than the assistant's says, from message number `first` on.
        """
        # Some templates write the schemas into the system message alone, or into the first user's.
        roles = chat.messages[0]["role"], frozenset(message["role"] for message in chat.messages)
        key = ("tools", self._template.source(chat.tools), *roles)
        if chat.tools and not self._is_written(key, text, render, [chat._replace(tools=None)]):
            called = ", ".join(str((tool.get("function") or tool).get("name")) for tool in chat.tools)
            raise ValueError(
                f"the chat template never writes the schemas of tools, so the model would not see {called}: give a "
                "template that does as model.chat_template, or leave the tools out"
            )
        for number, message in enumerate(chat.messages[first:], first):
            role, said = message["role"], str(message.get("content") or "").strip()
            if role != "assistant" and said:
                changed = chat.with_message(number, message | {"content": PROBE})
                # Of neighbours with one role a template may write only the first, or the last.
                beside = [each["role"] for each in chat.messages[max(number - 1, 0) : number + 2]]
                key = ("role", number == 0, bool(chat.tools), _arguments(chat), *beside) if said in text else None
                if not self._is_written(key, text, render, [changed]):
                    raise ValueError(
                        f"messages[{number}]: the chat template writes nothing for a message of the role {role!r}: "
                        "give a template that does as model.chat_template"
                    )
            if message.get("tool_calls"):
                self._check_calls(text, chat, number, render)

    def check_turns(self, traced: Trace, chat: Chat, weights: Sequence[float], *, accept: bool) -> bool:
        """Whether the template leaves out thoughts of trained turns because these are not the last.

        Raises ValueError for them unless they are accepted, and in any case for thoughts that it writes in no turn and
        for other content that it leaves out.
        """
        text, left_out = traced.text, False
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            if not weights[number]:
                left_out |= self._check_context(traced, chat, weights, number, accept=accept)
                continue
            for part, words, changed in _parts(message):
                written = _is_in(traced, number, words, changed)
                key = (part, self._template.source(chat.tools), *_kind(chat, number)) if written else None
                if self._is_written(key, text, self._render, [chat.with_message(number, changed)]):
                    continue
                where = f"messages[{number}]"
                if part == "content":
                    what = "its content beside its tool_calls" if message.get("tool_calls") else "the assistant's words"
                    raise ValueError(
                        f"{where}: the chat template does not write {what}: give a template that does as "
                        "model.chat_template, or try data.split_turns=true, since some write it in the last turn"
                    )
                alone = chat.until(number + 1)
                if not self._is_written(None, self._render(alone), self._render, [alone.with_message(number, changed)]):
                    prompt = self._prompt(chat.until(number))
                    behind = ", or write it after the thought that the prompt opens, with data.split_turns=true"
                    raise ValueError(
                        f"{where}: the chat template does not write its reasoning: give a template that does as "
                        "model.chat_template"
                        + ("" if number in chat.moved else ", or put the reasoning into the content")
                        + (behind if opened_thought(prompt) else "")
                    )
                if not accept:
                    raise ValueError(
                        f"{where}: the chat template leaves out the thoughts of earlier turns, so this one would be "
                        f"trained as an answer without a thought: {CHOICES}; a template that keeps them, such as "
                        "model.chat_template=builtin:qwen3-thinking, trains all turns of a row at once"
                    )
                left_out = True
        return left_out

    def _check_context(self, traced: Trace, chat: Chat, weights: Sequence[float], number: int, *, accept: bool) -> bool:
        """Whether a turn that is not trained lacks a thought, or words, with which the model is prompted for a later
        turn that is. Raises ValueError for that unless it is accepted. Where the last turn alone is trained it follows
        its prompt in any case.
        """
        later = next((at for at in range(number + 1, len(chat.messages)) if weights[at]), None)
        if later is None or not any(weights[:-1]):
            return False
        asked = chat.until(later)
        for part, words, changed in _parts(chat.messages[number]):
            written = _is_in(traced, number, words, changed)
            key = ("context", part, self._template.source(chat.tools), *_kind(chat, number)) if written else None
            if self._is_written(key, traced.text, self._render, [chat.with_message(number, changed)]):
                continue
            prompt = self._prompt(asked)
            if self._is_written(None, prompt, self._prompt, [asked.with_message(number, changed)]):
                if not accept:
                    raise ValueError(
                        f"messages[{number}]: the chat template leaves out the {part} of this turn once others follow, "
                        f"though the model is prompted with it for messages[{later}]: {CHOICES}"
                    )
                return True
        return False

    def unread_keys(self, chat: Chat, keys: Collection[str], known: Collection[str]) -> set[str]:
        """Keys of messages, of `keys`, that change nothing of what the template writes: `messages[].KEY (ROLE)`.

        Those in `known` were found before and are not tried again.
        """
        text, found = self._render(chat), set()
        for number, message in enumerate(chat.messages):
            for key, changes in _changed_keys(message, keys):
                name, kind = f"messages[].{key} ({message['role']})", _kind(chat, number)
                if name in found or name in known:
                    continue
                tried = ("key", key, message["role"], self._template.source(chat.tools), *kind)
                changed = [chat.with_message(number, each) for each in changes]
                if not any(self._is_written(tried, text, self._render, [each]) for each in changed):
                    found.add(name)
        return found

    def _check_calls(self, text: str, chat: Chat, number: int, render: Render) -> None:
        message = chat.messages[number]
        calls = message["tool_calls"]
        for place, call in enumerate(calls):
            function = call.get("function")
            said = function if isinstance(function, dict) else call
            changes: list[dict[str, Any]] = [{"name": PROBE}]
            if said.get("arguments") not in (None, "", "{}", {}):
                changes.append({"arguments": "{}" if isinstance(said["arguments"], str) else {}})
            others = [{"function": said | change} if said is function else change for change in changes]
            changed = [
                chat.with_message(number, message | {"tool_calls": [*calls[:place], call | other, *calls[place + 1 :]]})
                for other in others
            ]
            key = ("call", self._template.source(chat.tools), place, len(calls), len(changes), *_kind(chat, number))
            if not self._is_written(key, text, render, changed):
                which = f"tool_calls[{place}]" if len(calls) > 1 else "tool_calls"
                beside = " beside content (null where there is none)" if message.get("content") else ""
                raise ValueError(
                    f"messages[{number}]: the chat template does not write its {which}{beside}: give a template that "
                    "does as model.chat_template"
                )

    def _is_written(self, key: tuple[Any, ...] | None, text: str, render: Render, changed: list[Chat]) -> bool:
        """Whether the text depends on what is changed. A `key` that was seen to be written is not tried again."""
        if key is not None and key in self._written:
            return True
        try:
            if any(render(chat) == text for chat in changed):
                return False
        except ValueError:  # the template refuses the change, so it reads it
            pass
        if key is not None:
            self._written.add(key)
        return True

    def _render(self, chat: Chat) -> str:
        return self._template.trace(chat).text

    def _prompt(self, chat: Chat) -> str:
        return self._template.trace(chat, prompt=True).text


def _kind(chat: Chat, number: int) -> tuple[Any, ...]:
    """What a template's choice of the parts of a turn may depend on."""
    following = [(message["role"], bool(message.get("tool_calls"))) for message in chat.messages[number + 1 :]]
    has = [bool(chat.messages[number].get(part)) for part in _PARTS]
    return *has, bool(chat.tools), _arguments(chat), *following[:1], frozenset(following)


def _arguments(chat: Chat) -> str:
    return json.dumps(chat.kwargs, sort_keys=True) if chat.kwargs else ""


def _is_in(traced: Trace, number: int, words: str, others: Message) -> bool:
    """Whether words of message `number` occur in what is written for it more often than in its `others`."""
    if number not in traced.blocks:
        return False
    return traced.text[slice(*traced.blocks[number])].count(words) > sum(
        _occurrences(others.get(part), words) for part in _PARTS
    )


def _occurrences(value: Any, words: str) -> int:
    """Of words in the texts within a value."""
    if isinstance(value, str):
        return value.count(words)
    inner: Iterable[Any] = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return sum(_occurrences(each, words) for each in inner) if isinstance(value, dict | list) else 0


def _changed_keys(message: Message, keys: Collection[str]) -> Iterator[tuple[str, list[Message]]]:
    """Those of `keys` that hold something, of the message and as `tool_calls[].KEY` of its calls, each with the message
    without it and with another value of it.
    """
    for key in sorted(message.keys() & set(keys)):
        if message[key] not in (None, "", [], {}):
            yield key, _without_and_with(message, key)
    calls = message.get("tool_calls") or []
    for place, call in enumerate(calls):
        function = call.get("function")
        inside = isinstance(function, dict)
        for holder in (call, function) if inside else (call,):
            for key in sorted(holder):
                if f"tool_calls[].{key}" not in keys or holder[key] in (None, "", [], {}):
                    continue
                others = _without_and_with(holder, key)
                changed = others if holder is call else [call | {"function": other} for other in others]
                yield (
                    f"tool_calls[].{key}",
                    [message | {"tool_calls": [*calls[:place], each, *calls[place + 1 :]]} for each in changed],
                )


def _without_and_with(mapping: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [{other: value for other, value in mapping.items() if other != key}, mapping | {key: PROBE}]


def _parts(message: Message) -> Iterator[tuple[str, str, Message]]:
    """The thoughts and the content of a turn: their words, and the message with others in their place."""
    content = message.get("content") or ""
    if thought := message.get("reasoning_content"):
        if thought.strip():
            yield "thought", thought.strip(), message | {key: PROBE for key in REASONING if key in message}
        if content.strip():
            yield "content", content.strip(), message | {"content": PROBE}
        return
    # Some templates read one thought in the content, and leave out the text before it and other thoughts.
    pieces = MARKS.split(content)
    for at in range(0, len(pieces), 2):
        if words := pieces[at].strip():
            part = "thought" if pieces[at + 1 : at + 2] in _ENDS else "content"
            changed = [*pieces[:at], pieces[at].replace(words, PROBE), *pieces[at + 1 :]]
            yield part, words, message | {"content": "".join(changed)}
