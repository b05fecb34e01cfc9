"""A row's conversation: messages checked, ShareGPT's names converted, loss weights read, added nulls left out."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from jaxtrain.data.columns import Row, kind_of
from jaxtrain.data.nulls import tool_call_without_fillings, tool_without_fillings, without_nulls, written_by_datasets
from jaxtrain.data.tracing import Message

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# The roles that may precede each role; None is the beginning.
_AFTER = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_WEIGHT_KEYS = ("weight", "train", "loss")  # of a message: OpenAI's, axolotl's, ms-swift's
_UNSUPPORTED_KEYS = ("train_detail", "training_detail")  # axolotl's: parts of a message


class Conversation(NamedTuple):
    messages: list[Message]
    weights: list[float | None]  # the loss weight that the row gives each message; None where it gives none
    first_trained: int  # messages before this one are the prompt, which is not trained
    tools: list[Any] | None
    template_kwargs: dict[str, Any] | None  # further arguments of the chat template

    def trained(self, loss_on: str) -> list[float]:
        """The loss weight of each message under `data.loss_on`. Raises ValueError for one that would be ignored."""
        if loss_on == "all":
            return [1.0 if weight is None else weight for weight in self.weights]
        trained = []
        for number, (message, weight) in enumerate(zip(self.messages, self.weights, strict=True)):
            answer = message["role"] == "assistant" and number >= self.first_trained
            if weight and not answer:
                what = "the prompt" if number < self.first_trained else f"the {message['role']}"
                raise ValueError(
                    f"messages[{number}]: weight {weight:g} on a turn of {what}, which data.loss_on=assistant does not "
                    "train: remove the weight, or train on everything with data.loss_on=all"
                )
            trained.append((1.0 if weight is None else weight) if answer else 0.0)
        return trained


def conversation(row: Row) -> Conversation:
    """The conversation of a row with messages, or with a prompt and a completion. Raises ValueError."""
    kind = kind_of(row)
    if kind == "messages":
        column = "messages" if row.get("messages") is not None else "conversations"
        found = _read(row, {"messages": row[column]}, first_trained=0)
    elif kind == "prompt+completion":
        prompt, completion = row["prompt"], row["completion"]
        if prompt is None or completion is None:
            raise ValueError(f"the column {'prompt' if prompt is None else 'completion'!r} is null")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion must both be strings or both be lists of messages")
        if isinstance(prompt, str):
            prompt, completion = [_turn("user", prompt)], [_turn("assistant", completion)]
        first_trained = len(prompt) if isinstance(prompt, list) else 0
        found = _read(row, {"prompt": prompt, "completion": completion}, first_trained=first_trained)
    else:
        raise ValueError(f"a row of {kind!r} is no conversation: it needs messages, or prompt and completion")
    _check_turns(found.messages)
    return found


def question(row: Row) -> Conversation:
    """The messages of a row's column `prompt`, a string or a list of messages. Raises ValueError."""
    prompt = row["prompt"]
    prompt = [_turn("user", prompt)] if isinstance(prompt, str) else prompt
    return _read(row, {"prompt": prompt}, first_trained=len(prompt) if isinstance(prompt, list) else 0)


def _read(row: Row, columns: dict[str, Any], *, first_trained: int) -> Conversation:
    tools = row.get("tools")
    tools = _json(tools, "tools") if isinstance(tools, str) else tools
    kwargs = row.get("chat_template_kwargs")
    kwargs = _json(kwargs, "chat_template_kwargs") if isinstance(kwargs, str) else kwargs
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of mappings")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError("chat_template_kwargs must be a mapping")
    for column, value in columns.items():
        if not isinstance(value, list) or not value:
            raise ValueError(f"{column} must be a list of messages that is not empty")
    given = [message for value in columns.values() for message in value]
    filled = written_by_datasets(given) or tool_without_fillings(tools, filled=False) != tools
    places = [f"{column}[{number}]" for column, value in columns.items() for number in range(len(value))]
    read = [_message(message, place, filled=filled) for message, place in zip(given, places, strict=True)]
    return Conversation(
        messages=[message for message, _ in read],
        weights=[weight for _, weight in read],
        first_trained=first_trained,
        tools=tool_without_fillings(tools, filled=filled) or None,
        template_kwargs=without_nulls(kwargs) if filled else kwargs,
    )


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _message(message: Any, where: str, *, filled: bool) -> tuple[Message, float | None]:
    """A checked message, without its weight, and the weight. `filled`: nulls in its tool calls are fillings."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a mapping with role and content, not {type(message).__name__}")
    weight = _weight(message, where)
    message = {key: value for key, value in message.items() if key not in _WEIGHT_KEYS}
    if message.get("role") is None and message.get("from") is not None:
        message = _from_sharegpt(message, where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _AFTER:
        raise ValueError(f"{where}: unknown role {role!r}; known: {', '.join(_AFTER)}")
    if isinstance(content, list):
        message = message | {"content": _joined_text(content, where)}
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: content must be a string, not {type(content).__name__}")
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise ValueError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
        message = message | {"tool_calls": [_tool_call(call, where, filled=filled) for call in calls]}
    if not (message.get("content") or "").strip() and not calls and role in ("user", "assistant"):
        raise ValueError(f"{where}: the {role}'s turn is empty")
    return message, weight


def _weight(message: Message, where: str) -> float | None:
    """The loss weight that a message gives itself; None where it gives none."""
    for key in _UNSUPPORTED_KEYS:
        if message.get(key):
            raise ValueError(f"{where}: {key} is not supported: give the whole message a weight")
    found: dict[str, float] = {}
    for key in _WEIGHT_KEYS:
        value = message.get(key)
        if value is None:
            continue
        number = isinstance(value, bool | int) or (key == "weight" and isinstance(value, float))
        if not number or not math.isfinite(value) or value < 0 or (key != "weight" and value not in (0, 1)):
            allowed = "a number that is not negative" if key == "weight" else "true or false"
            raise ValueError(f"{where}: {key} must be {allowed}, not {value!r:.40}")
        found[key] = float(value)
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} contradict each other")
    return next(iter(found.values()), None)


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message["from"]
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where}: unknown speaker {speaker!r:.40}; known: {', '.join(_SHAREGPT_ROLES)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**others, "role": role, "content": message.get("value")}


def _joined_text(parts: list[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: only text can be trained on, not {part!r:.80}")
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, where: str, *, filled: bool) -> Message:
    """A tool call with its arguments as a mapping: templates write them as JSON, which would quote JSON twice."""
    if not isinstance(call, dict):
        raise ValueError(f"{where}: a tool call must be a mapping, not {type(call).__name__}")
    call = tool_call_without_fillings(call, filled=filled)
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": _with_parsed_arguments(inner, where)}
    return _with_parsed_arguments(call, where)


def _with_parsed_arguments(call: Message, where: str) -> Message:
    if not isinstance(call.get("arguments"), str):
        return call
    return call | {"arguments": _json(call["arguments"], f"{where}: a tool call's arguments")}


def _check_turns(messages: list[Message]) -> None:
    before = None
    for number, message in enumerate(messages):
        role = message["role"]
        if before not in _AFTER[role]:
            follows = "comes first" if before is None else f"follows {before!r}"
            raise ValueError(f"messages[{number}]: wrong order of roles: {role!r} {follows}")
        if role == "tool" and before == "assistant" and not messages[number - 1].get("tool_calls"):
            raise ValueError(f"messages[{number}]: a tool answers, but the assistant called none")
        before = role
    if before != "assistant":
        raise ValueError(f"messages[{len(messages) - 1}]: the last turn is the {before}'s; it must be the assistant's")


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what}: broken JSON: {error}") from None
