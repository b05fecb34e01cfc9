"""The interface of environments, checks of their return values, and two small environments.

An environment reads and writes text, never tokens: `conversations` keeps the token ids that the model sampled and
renders only the environment's messages. Every sample of every prompt has a separate environment object. `reset`, `step`
and the factory may be `async`.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsFloat

import numpy as np

from jaxtrain.data.chat import Message

REWARD_PART = "environment"  # the name of its reward among the parts of a sample's reward
MAX_REWARD = float(np.finfo(np.float32).max)  # advantages are float32


class Opening(NamedTuple):
    """The start of a conversation."""

    messages: Sequence[Message]  # the conversation up to the model's first turn
    tools: Sequence[dict[str, Any]] = ()  # JSON schemas, for the chat template


class Reply(NamedTuple):
    """An environment's response to a turn of the model."""

    messages: Sequence[Message] = ()  # the next input of the model; an empty sequence ends the conversation
    reward: float = 0.0  # of the model's turn
    calls: int = 0  # tool calls in the model's turn
    failures: int = 0  # failed tool calls


class Environment(Protocol):
    """What the model interacts with over several turns."""

    def reset(self, row: Mapping[str, Any]) -> Opening | Awaitable[Opening]:
        """Start an episode from a row of the prompt data."""
        ...

    def step(self, text: str) -> Reply | Awaitable[Reply]:
        """Respond to a turn of the model. Not called for a truncated turn."""
        ...


Factory = Callable[[], Environment | Awaitable[Environment]]


def checked_opening(opening: Any) -> Opening:
    """Validate the return value of `reset`. Raises ValueError."""
    if not isinstance(opening, Opening):
        raise ValueError(f"reset must return an Opening, not {type(opening).__name__}")
    opening = opening._replace(messages=_checked_messages(opening.messages, "Opening"))
    if not opening.messages:
        raise ValueError("Opening.messages must not be empty")
    if isinstance(opening.tools, str | Mapping) or not all(isinstance(tool, Mapping) for tool in opening.tools):
        raise ValueError("Opening.tools must be a list of JSON schemas (mappings)")
    for number, tool in enumerate(opening.tools):
        _check_text(tool, f"Opening.tools[{number}]")
    return opening


def checked_reply(reply: Any) -> Reply:
    """Validate the return value of `step`; its reward becomes a float. Raises ValueError."""
    if not isinstance(reply, Reply):
        raise ValueError(f"step must return a Reply, not {type(reply).__name__}")
    reply = reply._replace(messages=_checked_messages(reply.messages, "Reply"))
    for name, count in (("calls", reply.calls), ("failures", reply.failures)):
        if not isinstance(count, int):
            raise ValueError(f"Reply.{name} must be an integer, not {type(count).__name__}")
    if not isinstance(reply.reward, SupportsFloat):
        raise ValueError(f"Reply.reward must be a number, not {type(reply.reward).__name__}")
    reward = float(reply.reward)
    if not abs(reward) <= MAX_REWARD:  # NaN too
        raise ValueError(f"Reply.reward must be finite in float32, not {reward}")
    return reply._replace(reward=reward)


def _checked_messages(messages: Any, what: str) -> list[Message]:
    """Validate messages; text parts are joined to one string."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"{what}.messages must be a list of messages, not {type(messages).__name__}")
    checked = []
    for number, message in enumerate(messages):
        where = f"{what}.messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must be a mapping with a role, not {message!r:.80}")
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list) and content:
            content = "".join(_text_of_part(part, where) for part in content)
        if not (isinstance(content, str) or (content is None and calls)):
            raise ValueError(f"{where}: content must be a string, not {type(content).__name__}")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise ValueError(f"{where}: tool_calls must be a list of mappings, not {calls!r:.80}")
        _check_text(message, where)
        checked.append({**message, "content": content} if "content" in message else dict(message))
    return checked


def _text_of_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: a part of the content must be {{'type': 'text', 'text': ...}}, not {part!r:.80}")
    return part["text"]


def _check_text(value: Any, where: str) -> None:
    """Raise ValueError for a string that cannot be encoded as UTF-8, which tokenizers need."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the text is not valid Unicode: {error.reason} at {error.start}") from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(key, where)
            _check_text(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_text(inner, where)


class NumberReversal:
    """Write the digits of the column `number` backwards, in three tries. The reward is the share of correct digits."""

    tries = 3

    def reset(self, row: Mapping[str, Any]) -> Opening:
        self._target, self._tries_left = str(row["number"])[::-1], self.tries
        question = f"Write {row['number']} backwards, as digits only."
        return Opening([{"role": "user", "content": question}])

    def step(self, text: str) -> Reply:
        self._tries_left -= 1
        answer = text.strip()
        # Digits without a counterpart are wrong: they count in the length below.
        right = sum(a == b for a, b in zip(answer, self._target, strict=False))
        reward = right / max(len(answer), len(self._target))
        if answer == self._target or not self._tries_left:
            return Reply(reward=reward)
        return Reply([{"role": "user", "content": "That is not right. Try again."}], reward)


class GuessingGame:
    """Guess the integer of the column `secret`. A correct guess is rewarded by 1, halved after every wrong one."""

    def __init__(self, largest: int = 20):
        self._largest = largest

    def reset(self, row: Mapping[str, Any]) -> Opening:
        self._secret, self._value = int(row["secret"]), 1.0
        question = f"I think of an integer from 1 to {self._largest}. Guess it. Answer with a number only."
        return Opening([{"role": "user", "content": question}])

    def step(self, text: str) -> Reply:
        numbers = re.findall(r"\d+", text)
        if not numbers:
            return Reply()
        guess = numbers[-1].lstrip("0")
        if guess == str(self._secret):
            return Reply(reward=self._value)
        self._value /= 2
        # Compare digits as strings: the model may write more digits than int() accepts.
        higher = (len(guess), guess) < (len(str(self._secret)), str(self._secret))
        return Reply([{"role": "user", "content": "Higher." if higher else "Lower."}])
