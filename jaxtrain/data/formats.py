"""A row's columns -> an `Example`. The columns are TRL's.

    input_ids [+ labels]   token ids as they are; labels -100 carry no loss. Needs no tokenizer.
    messages               a conversation of {role, content[, tool_calls, reasoning_content]}, or ShareGPT's
    prompt + completion    two lists of messages, or two strings (see `prompt_format`)
    text                   plain text; the end-of-sequence token is added and every token carries loss

Beside a conversation: `tools` (a list or its JSON) and `chat_template_kwargs` (a mapping or its JSON).

Two strings are the one place where the field disagrees with itself. Here they become a user's and an assistant's turn
of the chat template by default, since whoever trains on questions and answers will ask through that template.
`prompt_format: plain` joins them as they are and adds the end-of-sequence token, as TRL does.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.chat import ChatTokenizer, Message, tokens_within, without_limits
from jaxtrain.data.packing import Example
from jaxtrain.data.sources import FORMATS, Row

IGNORED_LABEL = -100

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
# The roles that may stand before each role; None is the beginning.
_AFTER = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Prompt(NamedTuple):
    """A held-out question, and what the data set answers."""

    input_ids: np.ndarray  # [n] int32
    answer: str


class Encoder:
    """Rows, under our column names, -> examples. Every fault of a row is a ValueError. Safe to call from threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        *,
        loss_on: Literal["assistant", "all"] = "assistant",
        prompt_format: Literal["chat", "plain"] = "chat",
        vocab_size: int | None = None,
    ):
        """`vocab_size` is the model's: ids beyond it, which a gather would silently clamp, are then an error."""
        self._tokenizer, self._loss_on, self._prompt_format = tokenizer, loss_on, prompt_format
        self._vocab_size = vocab_size

    def __call__(self, row: Row) -> Example:
        """Raises ValueError for a row that cannot be read, or that holds no token to learn from."""
        example = self._encode(row)
        if self._vocab_size is not None and example.input_ids.max(initial=0) >= self._vocab_size:
            raise ValueError(
                f"token id {example.input_ids.max()} is beyond the model's vocabulary of {self._vocab_size}"
            )
        if not example.loss_weights[1:].any():  # nothing predicts the first token
            raise ValueError(f"no token of this row carries loss ({len(example.input_ids)} tokens)")
        return example

    def _encode(self, row: Row) -> Example:
        match kind_of(row):
            case "input_ids":
                return _from_ids(row)
            case "text":
                return self._from_plain("", _string(row, "text"))
            case "prompt+completion" if self._is_plain(row):
                return self._from_plain(_string(row, "prompt"), _string(row, "completion"))
            case _:
                messages, first_trained = conversation(row)
                return self._from_messages(row, messages, first_trained)

    def prompt(self, row: Row) -> Prompt:
        """The row up to its last answer, as the model is asked for it, and that answer. Raises ValueError."""
        if self._is_plain(row):
            encoding = self._backend.encode(_string(row, "prompt"), add_special_tokens=True)
            return Prompt(np.array(encoding.ids, np.int32), _string(row, "completion"))
        if kind_of(row) not in ("messages", "prompt+completion"):
            raise ValueError("only conversations and prompt+completion can be asked for their answer")
        messages, _ = conversation(row)
        return Prompt(self._chat.prompt(messages[:-1], **_template_options(row)), messages[-1].get("content") or "")

    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        """The ids [n] of what the model is asked, and the row with its columns `prompt` and, if it has one, `answer`.

        A column `prompt` is a string or a list of messages. Without it a conversation is asked for its last turn, which
        becomes the `answer` unless the row has one. Raises ValueError.
        """
        if "prompt" not in row:
            messages, _ = conversation(row)
            row = {"answer": messages[-1].get("content"), **row, "prompt": messages[:-1]}
        prompt = row["prompt"]
        if isinstance(prompt, str) and self._prompt_format == "plain":
            return np.array(self._backend.encode(prompt, add_special_tokens=True).ids, np.int32), row
        messages = [_turn("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
        return self._chat.prompt(messages, **_template_options(row)), row

    def _is_plain(self, row: Row) -> bool:
        if kind_of(row) != "prompt+completion" or not isinstance(row["prompt"], str):
            return False
        return self._prompt_format == "plain"

    def _from_messages(self, row: Row, messages: list[Message], first_trained: int) -> Example:
        chat = self._chat(messages, first_trained=first_trained, **_template_options(row))
        if not chat.mask.any():
            raise ValueError("no token of this conversation is the assistant's")
        mask = chat.mask if self._loss_on == "assistant" else np.ones_like(chat.mask)
        return Example(chat.input_ids, mask.astype(np.float32))

    def _from_plain(self, prompt: str, completion: str) -> Example:
        """Loss on the completion and the end-of-sequence token. One tokenisation, so that ids are those of the text."""
        if not completion:
            raise ValueError("there is no text to learn" if not prompt else "the completion is empty")
        encoding = self._backend.encode(prompt + completion, add_special_tokens=True)
        mask = tokens_within(encoding.offsets, [(len(prompt), len(prompt) + len(completion))])
        eos = self._eos
        ids = encoding.ids if encoding.ids[-1] == eos else [*encoding.ids, eos]
        mask = np.append(mask[: len(ids) - 1], True)
        if self._loss_on == "all":
            mask[:] = True
        return Example(np.array(ids, np.int32), mask.astype(np.float32))

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(self._needed_tokenizer)

    @cached_property
    def _backend(self) -> Any:
        return without_limits(self._needed_tokenizer)

    @property
    def _eos(self) -> int:
        eos = self._needed_tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ValueError("the tokenizer has no eos_token, so plain text would never learn to end")
        return eos

    @property
    def _needed_tokenizer(self) -> PreTrainedTokenizerFast:
        if self._tokenizer is None:
            raise ValueError("this row holds text, which needs a tokenizer (model.tokenizer)")
        return self._tokenizer


def kind_of(row: Row) -> str:
    """Which of `FORMATS` a row is, ShareGPT's `conversations` included. Raises ValueError where it is none."""
    for kind, columns in FORMATS.items():
        if all(column in row for column in columns):
            return kind
    if "conversations" in row:
        return "messages"
    raise ValueError(
        f"no columns to train on: this row has {', '.join(map(repr, row)) or 'none'}, and needs one of "
        f"{', '.join(FORMATS)}; name them with data.train.columns, e.g. {{prompt: question, completion: answer}}"
    )


def conversation(row: Row) -> tuple[list[Message], int]:
    """A row's checked messages, and the number of the first that may be trained on. Raises ValueError."""
    if kind_of(row) == "messages":
        messages = _messages(row["messages"] if "messages" in row else row["conversations"], "messages")
        first_trained = 0
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion must both be strings or both be lists of messages")
        if isinstance(prompt, str):
            prompt, completion = [_turn("user", prompt)], [_turn("assistant", completion)]
        before = _messages(prompt, "prompt")
        messages, first_trained = before + _messages(completion, "completion"), len(before)
    _check_turns(messages)
    return messages, first_trained


def _from_ids(row: Row) -> Example:
    ids = _int_list(row, "input_ids")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"input_ids: {ids.min()} is no token id")
    if "labels" not in row:
        return Example(ids, np.ones(len(ids), np.float32))
    labels = _int_list(row, "labels")
    if len(labels) != len(ids):
        raise ValueError(f"labels: {len(labels)} of them for {len(ids)} input_ids")
    trained = labels != IGNORED_LABEL
    wrong = np.flatnonzero(trained & (labels != ids))
    if len(wrong):
        at = wrong[0]
        raise ValueError(f"labels[{at}] is {labels[at]}, which must be input_ids[{at}] ({ids[at]}) or {IGNORED_LABEL}")
    return Example(ids, trained.astype(np.float32))


def _int_list(row: Row, column: str) -> np.ndarray:
    try:
        values = np.array(row[column])
    except ValueError:  # lists of different lengths
        values = np.array(None)
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise ValueError(f"{column} must be a list of integers")
    return values.astype(np.int32)


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a string, not {type(value).__name__}")
    return value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages that is not empty")
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a mapping with role and content, not {type(message).__name__}")
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    role, content = message.get("role"), message.get("content")
    if role not in _AFTER:
        raise ValueError(f"{where}: unknown role {role!r}; known: {', '.join(_AFTER)}")
    if isinstance(content, list):
        message = message | {"content": _joined_text(content, where)}
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: content must be a string, not {type(content).__name__}")
    if message.get("tool_calls"):
        message = message | {"tool_calls": [_tool_call(call, where) for call in message["tool_calls"]]}
    if not (message.get("content") or "").strip() and not message.get("tool_calls") and role in ("user", "assistant"):
        raise ValueError(f"{where}: the {role}'s turn is empty")
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    role = _SHAREGPT_ROLES.get(message["from"])
    if role is None:
        raise ValueError(f"{where}: unknown speaker {message['from']!r}; known: {', '.join(_SHAREGPT_ROLES)}")
    return _turn(role, message.get("value"))  # type: ignore[arg-type]


def _joined_text(parts: list[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: only text can be trained on, not {part!r:.80}")
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, where: str) -> Any:
    """Templates write arguments as JSON themselves, so arguments that are JSON already would be quoted twice."""
    if not isinstance(call, dict):
        raise ValueError(f"{where}: a tool call must be a mapping, not {type(call).__name__}")
    if isinstance(call.get("function"), dict):
        return call | {"function": _tool_call(call["function"], where)}
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


def _template_options(row: Row) -> dict[str, Any]:
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    tools = _json(tools, "tools") if isinstance(tools, str) else tools
    kwargs = _json(kwargs, "chat_template_kwargs") if isinstance(kwargs, str) else kwargs
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of mappings")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError("chat_template_kwargs must be a mapping")
    return {"tools": tools or None, "template_kwargs": kwargs}


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what}: broken JSON: {error}") from None
