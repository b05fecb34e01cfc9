"""Thoughts of the assistant's turns: under a key of the message, or between marks in its content."""

from __future__ import annotations

import re

from jaxtrain.data.tracing import Message

THOUGHTS = (("<think>", "</think>"), ("<|channel>thought", "<channel|>"))  # how templates begin and end a thought
MARKS = re.compile(f"({'|'.join(re.escape(mark) for marks in THOUGHTS for mark in marks)})")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the key that holds an assistant's reasoning


def opened_thought(prompt: str) -> str:
    """The beginning of a thought that a prompt leaves open, if it does."""
    return next((begin for begin, end in THOUGHTS if prompt.rfind(begin) > prompt.rfind(end)), "")


def split_thought(message: Message) -> tuple[str, str]:
    """The thought and the answer of a turn, whether the thought has a separate key or is in the content."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    begin, end = THOUGHTS[0]
    thought, found, answer = content.rpartition(end)
    return (thought.rpartition(begin)[2], answer) if found else ("", content)


def words_before_thought(message: Message) -> str:
    """The content before its last thought."""
    thoughts, _, _ = ("" if message.get("reasoning_content") else message["content"]).rpartition(THOUGHTS[0][1])
    return thoughts.rpartition(THOUGHTS[0][0])[0].strip()


def without_thought(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key not in REASONING}
    return kept | {"content": split_thought(message)[1].lstrip()} if message.get("content") else kept


def with_reasoning_key(message: Message, keyed: frozenset[str], opened: str) -> Message:
    """With the thought at the beginning of the content under the key instead, if its marks begin with one of `keyed`.

    A prompt that opens a thought with `opened` makes data whose content has only the end of it.
    """
    content = message["content"]
    if any(key in message for key in REASONING):
        return message
    for begin, end in THOUGHTS:
        thought, ended, answer = content.partition(end)
        whole = thought.lstrip().startswith(begin) or (begin == opened and begin not in content)
        if begin in keyed and ended and whole:
            thought = thought.replace(begin, "", 1).strip()
            return message | {"content": answer.lstrip()} | (dict.fromkeys(REASONING[:2], thought) if thought else {})
    return message


def check_thought(message: Message, where: str, keyed: frozenset[str]) -> None:
    """Raises ValueError for a turn whose content has a thought that would be trained twice, cut off, or as words.

    `keyed`: the marks that the chat template does not know in the content, though it reads reasoning_content.
    """
    content = message.get("content") or ""
    begin, end = next((marks for marks in THOUGHTS if content.lstrip().startswith(marks[0])), ("", ""))
    if begin and message.get("reasoning_content"):
        raise ValueError(f"{where}: it has a thought in its content and another one beside it: keep one of them")
    if begin and end not in content:
        raise ValueError(
            f"{where}: the content begins a thought with {begin} that does not end: one that was cut off would be "
            "trained as a whole answer"
        )
    if any(begin in keyed and (begin in content or end in content) for begin, end in THOUGHTS):
        raise ValueError(
            f"{where}: the chat template reads thoughts in reasoning_content alone, and would write their marks as "
            "words: a thought in the content must be its only one and be at its beginning"
        )
