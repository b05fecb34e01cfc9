"""What an environment is, and three small ones.

An environment sees text and says what happens next. It never sees a token: `conversations` keeps the model's own ids as
they were drawn, and renders only what the environment adds. One object is made for every sample of every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxtrain.data.chat import Message

PART = "environment"  # what its reward is called among the parts of a sample's reward


class Opening(NamedTuple):
    messages: Sequence[Message]  # the conversation up to the model's first turn
    tools: Sequence[dict[str, Any]] = ()  # JSON schemas, for the chat template


class Reply(NamedTuple):
    messages: Sequence[Message] = ()  # what the model reads next; nothing ends the conversation
    reward: float = 0.0  # for the turn that it answers
    calls: int = 0  # tools called in that turn ...
    failures: int = 0  # ... and how many of the calls failed


class Environment(Protocol):
    def reset(self, row: Mapping[str, Any]) -> Opening:
        """Begin, with a row of the prompt data."""
        ...

    def step(self, text: str) -> Reply:
        """Answer a turn of the model. Not called for a turn that was cut off by a limit."""
        ...


Factory = Callable[[], Environment]


class NumberReversal:
    """Write the digits of the column `number` backwards. Every try earns its share of right digits; three tries."""

    tries = 3

    def reset(self, row: Mapping[str, Any]) -> Opening:
        self._wanted, self._left = str(row["number"])[::-1], self.tries
        question = f"Write {row['number']} backwards, as digits only."
        return Opening([{"role": "user", "content": question}])

    def step(self, text: str) -> Reply:
        self._left -= 1
        given = text.strip()
        right = sum(a == b for a, b in zip(given, self._wanted, strict=False))
        reward = right / max(len(given), len(self._wanted))
        if given == self._wanted or not self._left:
            return Reply(reward=reward)
        return Reply([{"role": "user", "content": "That is not right. Try again."}], reward)


class GuessingGame:
    """Find the whole number of the column `secret`. The first guess is worth 1, and each further one half as much."""

    def __init__(self, most: int = 20):
        self._most = most

    def reset(self, row: Mapping[str, Any]) -> Opening:
        self._secret, self._worth = int(row["secret"]), 1.0
        question = f"I think of a whole number from 1 to {self._most}. Guess it. Answer with a number only."
        return Opening([{"role": "user", "content": question}])

    def step(self, text: str) -> Reply:
        numbers = re.findall(r"\d+", text)
        if not numbers:
            return Reply()
        guess, worth = int(numbers[-1]), self._worth
        if guess == self._secret:
            return Reply(reward=worth)
        self._worth /= 2
        return Reply([{"role": "user", "content": "Higher." if guess < self._secret else "Lower."}])
