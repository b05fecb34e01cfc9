"""A row's conversation: messages checked, other tools' names and JSON converted, weights read, added nulls left out."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

from jaxtrain.data.columns import (
    LARGEST_WEIGHT,
    RENDERED_COLUMNS,
    TEMPLATE_COLUMNS,
    Row,
    from_alpaca,
    left_out_by_map,
    row_format,
)
from jaxtrain.data.merging import Turn, merge_turns
from jaxtrain.data.nulls import tool_call_without_fillings, tool_without_fillings, without_nulls, written_by_datasets
from jaxtrain.data.thoughts import REASONING
from jaxtrain.data.tracing import Message

_ROLES = {  # of ShareGPT, ms-swift and OpenAI's function calls, beside those that templates know
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles whose content is the JSON of one call or of a list of them
_CALL_KEYS = ("name", "arguments", "type", "id", "index")  # of a call or of the function in it
# The roles that may precede each role; None is the beginning.
_AFTER = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": (None, "system", "developer", "user", "tool"),
    "tool": ("assistant", "tool"),
}
_NOTHING = (None, "", [], {})
_PLAIN_KEYS = {"role", "content"}
_WEIGHT_KEYS = ("weight", "train", "loss", "loss_scale")  # of a message: OpenAI's, axolotl's, ms-swift's
# Keys of a message that are read here, whether the chat template names them or not.
KNOWN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *_WEIGHT_KEYS, *REASONING}
# Keys of a message whose meaning is known and that would change what is trained, and what to do instead.
_UNSUPPORTED_KEYS = {
    **dict.fromkeys(
        ("train_detail", "training_detail", "training", "trainable", "mask", "masked", "loss_mask", "loss_weight"),
        "give the whole message a `weight`",
    ),
    "tool_responses": "write each as a message of the role tool, between the call and the words after it",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text is supported"),
}


class Conversation(NamedTuple):
    messages: list[Message]
    weights: list[float | None]  # the loss weight that the row gives each message; None where it gives none
    first_trained: int  # messages before this one are the prompt, which is not trained
    tools: list[Any] | None
    template_kwargs: dict[str, Any] | None  # further arguments of the chat template
    nulls_left_out: tuple[str, ...] = ()  # arguments of tool calls whose null was taken for a filling, on no evidence

    def trained(self, loss_on: str) -> list[float]:
        """The loss weight of each message under `data.loss_on`. Raises ValueError for one that would be ignored."""
        if loss_on == "all":
            return [1.0 if weight is None else weight for weight in self.weights]
        all_answers = [
            n for n in range(self.first_trained, len(self.messages)) if self.messages[n]["role"] == "assistant"
        ]
        answers = all_answers[-1:] if loss_on == "last" else all_answers
        trained = [0.0] * len(self.messages)
        for number, weight in enumerate(self.weights):
            if number in answers:
                trained[number] = 1.0 if weight is None else weight
            elif weight and not (weight == 1 and number in all_answers):  # 1 is what every answer has
                what = "the prompt" if number < self.first_trained else f"the {self.messages[number]['role']}"
                raise ValueError(
                    f"messages[{number}]: weight {weight:g} on a turn of {what}, which data.loss_on={loss_on} does not "
                    "train: remove the weight, or choose another data.loss_on (assistant, all)"
                )
        return trained


def conversation(row: Row, merge: Collection[str] = ()) -> Conversation:
    """The conversation of a row with messages, with a prompt and a completion, or with Alpaca's columns.

    `merge` is `data.merge`. Raises ValueError.
    """
    kind = row_format(row)
    if kind == "instruction+output":
        if row["output"] is None:
            raise ValueError("the column 'output' is null")
        row = from_alpaca(row)
        kind = row_format(row)
    if kind == "messages":
        column = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
        found = _read(row, {"messages": _parsed(row[column], column)}, merge)
    elif kind == "prompt+completion":
        prompt, completion = row["prompt"], row["completion"]
        if prompt is None or completion is None:
            raise ValueError(f"the column {'prompt' if prompt is None else 'completion'!r} is null")
        lists = messages_in(prompt), messages_in(completion)
        if None not in lists:
            prompt, completion = lists
        elif lists == (None, None) and isinstance(prompt, str) and isinstance(completion, str):
            prompt, completion = [_turn("user", prompt)], [_turn("assistant", completion)]
        elif isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("prompt and completion must both be strings or both be lists of messages")
        found = _read(row, {"prompt": prompt, "completion": completion}, merge)
    else:
        raise ValueError(f"a row of {kind!r} is not a conversation: it needs messages, or prompt and completion")
    _check_turns(found.messages, found.first_trained)
    return found


def question(row: Row, merge: Collection[str] = ()) -> Conversation:
    """The messages of a row's column `prompt`, a string or a list of messages. Raises ValueError."""
    prompt = row["prompt"]
    return _read(row, {"prompt": [_turn("user", prompt)] if isinstance(prompt, str) else prompt}, merge)


def messages_in(prompt: Any) -> list[Any] | None:
    """The messages of a prompt or a completion: a list, or its JSON. None for any other text."""
    if isinstance(prompt, list):
        return prompt
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("["):
        return None
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):  # text that begins with a bracket
        return None
    messages = isinstance(found, list) and all(
        isinstance(each, dict) and {"role", "from"} & each.keys() for each in found
    )
    return found if messages and found else None


def _read(row: Row, columns: dict[str, Any], merge: Collection[str]) -> Conversation:
    tools = _tools(row) if row.get("tools") or row.get("functions") else None
    kwargs = row.get("chat_template_kwargs") or None
    kwargs = kwargs and _parsed(kwargs, "chat_template_kwargs")
    system = None if row.get("system") == "" else row.get("system")
    if not isinstance(system, str | None):
        raise ValueError(f"system must be a string, not {type(system).__name__}; {left_out_by_map('system')}")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError("chat_template_kwargs must be a mapping")
    for column, value in columns.items():
        if not isinstance(value, list) or not value:
            raise ValueError(f"{column} must be a list of messages that is not empty")
    filled = written_by_datasets(columns.values(), tools)
    tools = tool_without_fillings(tools, filled=filled) if tools else None
    guessed: list[str] | None = [] if filled else None
    turns = [
        Turn(*_message(message, where := f"{column}[{number}]", tools, guessed), column == "prompt", where)
        for column, value in columns.items()
        for number, message in enumerate(value)
    ]
    if system is not None:
        turns = _with_system(turns, system)
    if merge:
        turns = merge_turns(turns, merge)
    return Conversation(
        messages=[turn.message for turn in turns],
        weights=[turn.weight for turn in turns],
        first_trained=sum(turn.in_prompt for turn in turns),
        tools=tools,
        template_kwargs=without_nulls(kwargs) if filled else kwargs,
        nulls_left_out=tuple(guessed or ()),
    )


def _tools(row: Row) -> list[Any] | None:
    """The schemas of the row's tools: its column `tools`, or OpenAI's old `functions`. Bare schemas are wrapped, as a
    server gives tools to the chat template."""
    found: dict[str, list[Any]] = {}
    for column in ("tools", "functions"):
        value = _parsed(row.get(column) or None, column)
        if not value:
            continue
        tools = [_parsed(tool, f"{column}[{at}]") for at, tool in enumerate(value)] if isinstance(value, list) else []
        if not tools or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"{column} must be a list of mappings; {left_out_by_map(column)}")
        found[column] = [_wrapped_schema(tool) for tool in tools]
    if len(found) == 2 and found["tools"] != found["functions"]:
        raise ValueError("the columns 'tools' and 'functions' differ: keep one of them")
    return next(iter(found.values()), None)


def _wrapped_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with its schema under `function`, also where that is beside `type`, as in OpenAI's Responses API."""
    bare = tool.get("function") is None and isinstance(tool.get("name"), str) and tool.get("type") in (None, "function")
    schema = {key: value for key, value in tool.items() if key not in ("type", "function")}
    return {"type": "function", "function": schema} if bare else tool


def keys_of_messages(row: Row) -> set[str]:
    """The keys of the row's messages that hold something, and as `tool_calls[].KEY` unknown ones of their calls."""
    columns = [row[column] for column in RENDERED_COLUMNS if column in row and column not in TEMPLATE_COLUMNS]
    messages = [message for column in columns for message in messages_in(column) or () if isinstance(message, dict)]
    found = {key for message in messages for key, value in message.items() if value not in _NOTHING}
    calls = [call for message in messages if "tool_calls" in found for call in _calls_of(message)]
    functions = [call["function"] for call in calls if isinstance(call.get("function"), dict)]
    of_calls = {key for call in (*calls, *functions) for key, value in call.items() if value not in _NOTHING}
    return found | {f"tool_calls[].{key}" for key in of_calls - {"function", *_CALL_KEYS}}


def _calls_of(message: Message) -> list[dict[str, Any]]:
    """The tool calls of a message, or those that they are the JSON of."""
    calls = message.get("tool_calls")
    calls = json.loads(calls) if isinstance(calls, str) and calls.strip() else calls
    calls = (
        [json.loads(call) if isinstance(call, str) else call for call in calls if call]
        if isinstance(calls, list)
        else []
    )
    return [call for call in calls if isinstance(call, dict)]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(turns: list[Turn], system: str) -> list[Turn]:
    """With the words of the column `system` as the first turn, which must not say anything else."""
    first = turns[0]
    if first.role not in ("system", "developer"):
        return [Turn(_turn("system", system), None, first.in_prompt, "system"), *turns]
    if first.message.get("content") != system:
        raise ValueError(f"the column 'system' and {first.where} are two system messages: remove one of them")
    return turns


def _message(message: Any, where: str, tools: Any, guessed: list[str] | None) -> tuple[Message, float | None]:
    """A checked message, without its weight, and the weight. `guessed`: as of `tool_call_without_fillings`."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a mapping with role and content, not {type(message).__name__}")
    if _is_plain(message):
        return message, None
    weight = _weight(message, where)
    message = {key: value for key, value in message.items() if key not in _WEIGHT_KEYS}
    message = _converted(message, where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _AFTER:
        raise ValueError(f"{where}: unknown role {role!r:.40}; known: {', '.join([*_AFTER, *_ROLES])}")
    for key in REASONING:
        if not isinstance(message.get(key), str | None):
            raise ValueError(f"{where}: {key} must be a string, not {type(message[key]).__name__}")
        if role != "assistant" and (message.get(key) or "").strip():
            raise ValueError(
                f"{where}: {key} beside the words of the {role}: only turns of the assistant have thoughts; remove it, "
                "or move it to the turn that it belongs to"
            )
    if isinstance(content, list):
        message = message | {"content": _joined_text(content, where)}
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: content must be a string, not {type(content).__name__}")
    calls = _parsed(message.pop("tool_calls", None) or None, f"{where}: tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise ValueError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
        message = message | {"tool_calls": [_tool_call(call, where, tools, guessed) for call in calls]}
    if not (message.get("content") or "").strip() and not calls and role in ("user", "assistant"):
        raise ValueError(f"{where}: the {role}'s turn is empty")
    if message.get("content") is None and role not in ("user", "assistant"):
        raise ValueError(f"{where}: the content of the {role}'s turn is null: give an empty string if it has none")
    return message, weight


def _is_plain(message: Message) -> bool:
    """Whether a message is a role that templates know and words, as most are: nothing of it needs to be converted."""
    if message.keys() != _PLAIN_KEYS:
        return False
    role, content = message["role"], message["content"]
    return isinstance(role, str) and role in _AFTER and isinstance(content, str) and bool(content.strip())


def _weight(message: Message, where: str) -> float | None:
    """The loss weight that a message gives itself; None where it gives none."""
    for key in message.keys() & _UNSUPPORTED_KEYS.keys():
        if message[key] not in (None, "", []):
            raise ValueError(f"{where}: {key} is not supported: {_UNSUPPORTED_KEYS[key]}")
    found: dict[str, float] = {}
    for key in _WEIGHT_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not 0 <= value < LARGEST_WEIGHT:
            raise ValueError(f"{where}: {key} must be true, false or a number that is not negative, not {value!r:.40}")
        found[key] = float(value)
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} contradict each other")
    return next(iter(found.values()), None)


def _converted(message: Message, where: str) -> Message:
    """A message under the names that templates know: ShareGPT's `from` and `value`, other roles, calls as content."""
    for keys in (("content", "value"), ("role", "from"), REASONING):
        given = {key: message[key] for key in keys if message.get(key) is not None}
        if len(given) > 1 and any(value != message[next(iter(given))] for value in given.values()):
            raise ValueError(f"{where}: {' and '.join(given)} contradict each other: keep one of them")
    if message.keys() & {"from", "value"}:  # each may be beside the other format's key
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        for ours, theirs in (("role", "from"), ("content", "value")):
            others[ours] = message.get(theirs) if message.get(ours) is None else message[ours]
        message = others
    role = message.get("role")
    calls = message.get("function_call")  # OpenAI's, before there were tool calls
    if role in _CALLS:
        calls, message = message.get("content"), message | {"content": None}
        if not calls:
            raise ValueError(f"{where}: the {role} is empty")
    if calls:
        if message.get("tool_calls"):
            raise ValueError(f"{where}: it has tool_calls and a function_call: remove one of them")
        calls = _parsed(calls, f"{where}: the function call")
        message = message | {"tool_calls": [_wrapped(call) for call in (calls if isinstance(calls, list) else [calls])]}
    message = {key: value for key, value in message.items() if key != "function_call"}
    return message | {"role": _ROLES[role]} if isinstance(role, str) and role in _ROLES else message


def _wrapped(call: Any) -> Any:
    bare = isinstance(call, dict) and "function" not in call
    return {"type": "function", "function": call} if bare else call


def _joined_text(parts: list[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: only text can be trained on, not {part!r:.80}")
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, where: str, tools: Any, guessed: list[str] | None) -> Message:
    """A tool call without added nulls. Arguments that are JSON stay text: templates differ in what they read."""
    call = _parsed(call, f"{where}: a tool call")
    if not isinstance(call, dict):
        raise ValueError(f"{where}: a tool call must be a mapping, not {type(call).__name__}")
    call = tool_call_without_fillings(call, tools, guessed)
    inner = call.get("function")
    function = inner if isinstance(inner, dict) else call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: a tool call's arguments") if arguments.strip() else None
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{where}: a tool call's arguments must be a mapping, not {type(arguments).__name__}")
    others = [name for name, value in function.items() if name not in _CALL_KEYS and value not in (None, "", [], {})]
    if arguments is None and others:
        raise ValueError(f"{where}: a tool call has no `arguments`, but {others[0]!r}: write them as `arguments`")
    return call


def _check_turns(messages: list[Message], first_trained: int) -> None:
    """Raises ValueError for roles in a wrong order. A completion, from message `first_trained` on, may follow a turn of
    the assistant in the prompt, as TRL renders it; calls may be in an assistant's words.
    """
    before = None
    for number, message in enumerate(messages):
        role = message["role"]
        if before not in _AFTER[role] and not (before == role == "assistant" and number == first_trained):
            follows = "comes first" if before is None else f"follows {before!r}"
            hint = "; data.merge can join turns" if before == role or role in ("system", "developer") else ""
            raise ValueError(f"messages[{number}]: wrong order of roles: {role!r} {follows}{hint}")
        before = role
    if before != "assistant":
        raise ValueError(f"messages[{len(messages) - 1}]: the last turn is the {before}'s; it must be the assistant's")


def _parsed(value: Any, what: str) -> Any:
    """`value`, or what it is the JSON of."""
    return _json(value, what) if isinstance(value, str) else value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what}: broken JSON: {error}") from None
