"""Turns of a conversation that are joined on request (`data.merge`), for templates that want roles to alternate."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from jaxtrain.data.thoughts import REASONING
from jaxtrain.data.tracing import Message

_SYSTEM = ("system", "developer")
_JOINED_BY_ROLE = (*_SYSTEM, "user", "assistant")  # each result of a tool stays a separate turn


class Turn(NamedTuple):
    message: Message
    weight: float | None  # the loss weight that the row gives it; None where it gives none
    in_prompt: bool  # it is in the column `prompt`, which is not trained
    where: str  # as an error names it

    @property
    def role(self) -> str:
        return self.message["role"]


def merge_turns(turns: list[Turn], how: Collection[str]) -> list[Turn]:
    """Join neighbours, with a blank line between their contents.

    With "turns" in `how`, those of one role; with "system", system messages and the user's turn after them. Raises
    ValueError where one turn cannot say what two said: other weights, a prompt and its completion, words after calls.
    """
    merged: list[Turn] = []
    for turn in turns:
        while merged and _belong_together(merged[-1], turn, how):
            turn = _joined(merged.pop(), turn)
        merged.append(turn)
    return merged


def _belong_together(first: Turn, second: Turn, how: Collection[str]) -> bool:
    if "turns" in how and first.role == second.role and first.role in _JOINED_BY_ROLE:
        return True
    return "system" in how and first.role in _SYSTEM and second.role in (*_SYSTEM, "user")


def _joined(first: Turn, second: Turn) -> Turn:
    one, other = _said(first.message), _said(second.message)
    reason = None
    if first.in_prompt != second.in_prompt:
        reason = "one is in the prompt and the other in the completion"
    elif _weights_differ(first, second):
        reason = "their weights differ"
    elif one.get("tool_calls") and other.get("content"):
        reason = "it has words after tool calls"
    elif one.keys() & {"content", "tool_calls"} and other.keys() & set(REASONING):
        reason = "it has reasoning after words"
    else:
        differing = [
            key for key in one.keys() & other.keys() - {"role", "content", "tool_calls"} if one[key] != other[key]
        ]
        reason = f"they differ in {sorted(differing)[0]}" if differing else None
    if reason is not None:
        raise ValueError(f"{second.where}: data.merge cannot join it to the turn before: {reason}")
    contents = [said["content"] for said in (one, other) if "content" in said]
    calls = [*one.get("tool_calls", []), *other.get("tool_calls", [])]
    message = one | other | {"content": "\n\n".join(contents) if contents else None}
    weight = second.weight if first.weight is None else first.weight
    return Turn(message | {"tool_calls": calls} if calls else message, weight, first.in_prompt, first.where)


def _weights_differ(first: Turn, second: Turn) -> bool:
    """No weight means 1 for the assistant's turns. Other turns without one take that of the turn they are joined to."""
    weights = {turn.weight for turn in (first, second)}
    if "assistant" in (first.role, second.role):
        return len({1 if weight is None else weight for weight in weights}) > 1
    return len(weights - {None}) > 1


def _said(message: Message) -> Message:
    """Without keys that hold nothing."""
    return {key: value for key, value in message.items() if value not in (None, "", [])}
