"""Splits the text of an answer into its reasoning, its content and its tool calls, also while it is streamed."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtrain.data.thoughts import THOUGHTS


class CalledTool(NamedTuple):
    name: str
    arguments: str  # a JSON object


class Parts(NamedTuple):
    """The parts of a text, which more text only extends."""

    reasoning: str
    content: str
    calls: list[CalledTool]


Parser = Callable[[str, bool], Parts]
"""(text, final) -> parts. If the text is not `final`, parts leave out what more text may change."""

CallReader = Callable[[str, bool], tuple[str, list[CalledTool]]]
"""The same for a text without reasoning: content and calls."""


class Splitter:
    """Splits the text of one sample, piece by piece."""

    def __init__(self, parse: Parser):
        self._parse = parse
        self._text, self._sent = "", Parts("", "", [])

    def feed(self, text: str, final: bool) -> Parts:
        """What `text` adds to each part."""
        self._text += text
        before, self._sent = self._sent, self._parse(self._text, final)
        return Parts(
            self._sent.reasoning[len(before.reasoning) :],
            self._sent.content[len(before.content) :],
            self._sent.calls[len(before.calls) :],
        )

    @property
    def called(self) -> int:
        """The number of tool calls in the text so far."""
        return len(self._sent.calls)


def thought_of(prompt: str) -> str:
    """The beginning of a thought with which a prompt ends, if it does."""
    return next((begin for begin, _ in THOUGHTS if prompt.rstrip().endswith(begin)), "")


def parser(opened: str, read: CallReader | None) -> Parser:
    """The parser of answers to a prompt which ends with `opened`, the beginning of a thought, or "".

    A thought at the beginning of the text is its reasoning. The rest is read by `read`, or is the content.
    """

    def parse(text: str, final: bool) -> Parts:
        reasoning, rest = _split_thought(opened, text, final)
        content, calls = (rest, []) if read is None else read(rest, final)
        return Parts(reasoning, content, calls)

    return parse


def settled(text: str, marks: tuple[str, ...], final: bool) -> str:
    """`text` without an end that may become one of `marks`, unless it is `final`."""
    if final:
        return text
    longest = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - longest]


def _split_thought(opened: str, text: str, final: bool) -> tuple[str, str]:
    """The reasoning, and the text that follows it."""
    if opened:
        begin, inside = opened, text
    else:
        start = text.lstrip()
        begin = next((each for each, _ in THOUGHTS if start.startswith(each)), "")
        if not begin:
            undecided = any(each.startswith(start) for each, _ in THOUGHTS)
            return "", "" if undecided and not final else text
        inside = start.removeprefix(begin)
    end = dict(THOUGHTS)[begin]
    thought, closed, rest = inside.partition(end)
    if not closed:
        thought = settled(thought, (end,), final)
    return thought.strip(), rest.lstrip()
