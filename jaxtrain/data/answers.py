"""Locates the assistant's turns in a rendered conversation: from the end of the prompt to the token that ends its turn.

A turn is what the model must write once it is prompted with the messages before it, as the template prompts for it. It
is found in this order:

1. by the template's own `{% generation %}` marks, without what the prompt holds and what follows the end of the turn;
2. after the rendered prompt, where the conversation begins with it;
3. where a template rewrites earlier turns, as Qwen3's does with thoughts: in what its loop writes for the message
   (`tracing.py`), after the part of the prompt that begins it.

A turn ends with its last special token; if it has none, with the special token that begins the next message (GLM's
`<|user|>`), at which a model must stop just as well.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from jaxtrain.data.rendering import ANSWER, PROBE, USER, Chat, Template, probe_call
from jaxtrain.data.thoughts import THOUGHTS, opened_thought
from jaxtrain.data.tracing import Message, TextSpan, Trace, trace

_NOBODY: Message = {"role": ""}  # before the first message
_MAX_KINDS = 256  # of conversations of which the beginnings of turns are held
_Asked = tuple[str, bool, frozenset[str]]  # the role of the message before, whether it may switch thoughts, all roles


class Answer(NamedTuple):
    """A run of the rendered text that is the assistant's."""

    message: int
    start: int
    end: int
    unlike: str = ""  # the prompt for it, where the turn cannot follow that: one of them has a thought


class Answers:
    """Finds the assistant's turns under one template. Safe to call from threads."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerFast):
        self._template = template
        by_length = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: len(token.content), reverse=True)
        self._added = [token.content for token in by_length if token.content not in dict(THOUGHTS).values()]
        self._special = [token.content for token in by_length if token.special and token.content != tokenizer.bos_token]
        self._eos = str(tokenizer.eos_token) if tokenizer.eos_token is not None else None
        self._asked: dict[tuple[str, str, bool], dict[_Asked, str]] = {}
        self._header = lru_cache(maxsize=256)(self._find_header)
        self._after_user = lru_cache(maxsize=256)(self._find_after_user)
        self._within = lru_cache(maxsize=256)(self._find_within)

    def find(self, traced: Trace, chat: Chat, weights: Sequence[float]) -> list[Answer]:
        """The turns of the assistant that have a weight. Raises ValueError for one that cannot be located."""
        assistant = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        blocks, asked = traced.blocks, self._asked_of(chat)
        if not traced.generated:
            return [self._locate(traced.text, blocks, chat, number, asked) for number in assistant if weights[number]]
        answers = []
        for number, (start, end) in _of_messages(traced.generated, assistant, weights):
            unlike = ""
            if number is not None and number in blocks:
                try:
                    found = self._locate(traced.text, blocks, chat, number, asked)
                except ValueError:  # the marks alone decide where it begins
                    found = self._marked(traced.text, (start, end), chat, number)
                start, end, unlike = max(start, found.start), min(end, found.end), found.unlike
            answers.append(Answer(assistant[0] if number is None else number, start, end, unlike))
        return [answer for answer in answers if answer.start < answer.end]

    def closing(self, traced: Trace, chat: Chat) -> str | None:
        """The token to learn after the last message, a turn of the assistant that the template leaves open.

        None where the template ends it. Raises ValueError where there is no such token.
        """
        last = len(chat.messages) - 1
        start, end = traced.blocks.get(last, (0, len(traced.text)))
        if self.end_of_turn(traced.text, start, end, self._within_of(chat))[1]:
            return None
        calls = chat.messages[last].get("tool_calls")
        names = {"tool_call_id": probe_call()["id"], "name": probe_call()["function"]["name"]}
        follow: Message = {"role": "tool", "content": PROBE, **names} if calls else USER
        try:
            longer = self._template.trace(chat._replace(messages=[*chat.messages, follow]))
            begin, _ = longer.blocks[last + 1]
        except (ValueError, KeyError):  # refused, or not written in one run
            token = None
        else:
            token = next((token for token in self._special if longer.text[begin:].lstrip().startswith(token)), None)
        if token is None and self._eos is None:
            raise ValueError(
                "the chat template does not end the last turn and the tokenizer has no eos_token, so the model would "
                "never learn to stop: give a template that does as model.chat_template"
            )
        return token or self._eos

    def end_of_turn(
        self, text: str, start: int, end: int, within: frozenset[str] = frozenset(), *, is_last: bool = True
    ) -> tuple[int, bool]:
        """The end of a turn that is written from `start` to `end`, without what follows its last token, such as a line
        break; and whether a token ends it. `within`: tokens that end a part of a turn and not the turn.

        Where no token ends it, white space at its end belongs to it if it `is_last`, since the token that is then added
        (`closing`) comes after it. Otherwise it separates the turn from the next one.
        """
        stripped = start + len(text[start:end].rstrip())
        token = next((token for token in self._added if text.endswith(token, start, stripped)), None)
        if token is not None and token not in within:
            return stripped, True
        # Some templates end the text once, after the loop; in others the next message's first token ends the turn.
        after = next((token for token in self._special if text.startswith(token, end)), "")
        return (end + len(after) if after or is_last else stripped), bool(after)

    def ending(self, text: str) -> str:
        """The added token that a text ends with, if any; the end of a thought is none."""
        return next((token for token in self._added if text.endswith(token)), "")

    def _locate(
        self, text: str, blocks: dict[int, TextSpan], chat: Chat, number: int, asked: dict[_Asked, str]
    ) -> Answer:
        """`asked`: known beginnings of turns, by what comes before them; new ones are added. Rendering the prompt of
        every turn would take a time that grows with the square of their number.
        """
        block, before = blocks.get(number), chat.messages[number - 1] if number else _NOBODY
        following, within = chat.messages[number + 1 : number + 2], self._within_of(chat)
        is_last = not following
        results_inside = not is_last and following[0]["role"] == "tool" and number + 1 not in blocks
        roles = frozenset(message["role"] for message in chat.messages[:number])
        kind = (before["role"], _may_switch_thoughts(before), roles)
        if kind in asked and block is not None and not results_inside and text.startswith(asked[kind], *block):
            start = block[0] + len(asked[kind])
            return Answer(number, start, self.end_of_turn(text, start, block[1], within, is_last=is_last)[0])
        try:
            prompt, unlike = self._template.trace(chat.until(number), prompt=True), ""
        except ValueError:
            if before["role"] not in ("", "system", "developer") or block is None or results_inside:
                raise
            start, unlike = self._opening(text, block, chat, number)
            return Answer(number, start, self.end_of_turn(text, start, block[1], within, is_last=is_last)[0], unlike)
        if text.startswith(prompt.text):
            start = len(prompt.text)
            self._check_header(text, start, chat, number)
            if block is not None and start >= block[0]:
                asked[kind] = text[block[0] : start]
        elif block is not None:
            start, unlike = self._behind_header(text, block, prompt, chat, number)
        else:
            raise _rewritten(number)
        if block is not None and not results_inside:
            return Answer(number, start, self.end_of_turn(text, start, block[1], within, is_last=is_last)[0], unlike)
        alone = self._template.trace(chat.until(number + 1)).text
        end, _ = self.end_of_turn(alone, len(prompt.text), len(alone), within, is_last=is_last)
        turn = alone[len(prompt.text) : end]
        if not (alone.startswith(prompt.text) and text.startswith(turn, start)):
            if chat.messages[number].get("content") and chat.messages[number].get("tool_calls"):
                raise ValueError(
                    f"messages[{number}]: the chat template writes the words of this turn behind the results of its "
                    "tool calls, which the model does not see when it writes them: leave the words out, or make each "
                    "turn an example of its own with data.split_turns=true"
                )
            raise _rewritten(number)
        return Answer(number, start, start + len(turn), unlike)

    def _opening(self, text: str, block: TextSpan, chat: Chat, number: int) -> tuple[int, str]:
        """As `_behind_header`, of a turn that opens a conversation, where the template has no prompt without a user."""
        asked = self._after_user(self._template.source(chat.tools), _json(chat.kwargs))
        header = asked if text.startswith(asked, *block) else self._header_of(chat)
        if not text.startswith(header, *block):
            raise _rewritten(number)
        return block[0] + len(header), _unlike(text, block[0] + len(header), asked) if header != asked else ""

    def _check_header(self, text: str, start: int, chat: Chat, number: int) -> None:
        """Raises ValueError where the turn begins with a header that the prompt for it lacks."""
        header = self._after_user(self._template.source(chat.tools), _json(chat.kwargs))
        if header.strip() and text.startswith(header, start):
            raise ValueError(
                f"messages[{number}]: the chat template begins this turn with {header!r} and prompts for it without, "
                "so the model would have to write that: mark the assistant's part with {% generation %} in a "
                "model.chat_template, or give the turn a weight of 0"
            )

    def _header_of(self, chat: Chat) -> str:
        return self._header(self._template.source(chat.tools), _json(chat.kwargs))

    def _marked(self, text: str, span: TextSpan, chat: Chat, number: int) -> Answer:
        """A turn in marks that does not begin as the template prompts for it."""
        start, end = span
        is_last = number + 1 == len(chat.messages)
        end, _ = self.end_of_turn(text, start, end, self._within_of(chat), is_last=is_last)
        try:
            prompt = self._template.trace(chat.until(number), prompt=True)
            asked = added_by_prompt(prompt, self._template.trace(chat.until(number)).text)
        except ValueError:  # it renders whole conversations alone
            asked = ""
        return Answer(number, start, end, _unlike(text, start, asked))

    def _asked_of(self, chat: Chat) -> dict[_Asked, str]:
        """The known beginnings of turns in conversations with the same template, arguments and tools."""
        if any(map(_may_switch_thoughts, chat.messages)):
            return {}
        if len(self._asked) > _MAX_KINDS:
            self._asked.clear()
        return self._asked.setdefault((self._template.source(chat.tools), _json(chat.kwargs), bool(chat.tools)), {})

    def _behind_header(self, text: str, block: TextSpan, prompt: Trace, chat: Chat, number: int) -> tuple[int, str]:
        """Where a turn begins within its block, and the prompt where the turn cannot follow it."""
        start, end = block
        asked = added_by_prompt(prompt, self._template.trace(chat.until(number)).text)
        if text.startswith(asked, start, end):
            return start + len(asked), ""
        header = self._header_of(chat)
        if not text.startswith(header, start, end):
            raise ValueError(
                f"messages[{number}]: the chat template begins an assistant turn with {text[start : start + 40]!r} but "
                f"prompts for one with {asked!r}: mark the assistant's part with {{% generation %}} in a "
                "model.chat_template"
            )
        begin = start + len(header)
        return begin, _unlike(text, begin, asked)

    def _find_header(self, source: str, kwargs_json: str) -> str:
        """How an earlier turn of the assistant begins: without an empty thought, say, that the prompt may hold."""
        variables = self._template.variables | json.loads(kwargs_json)
        full = trace(source, [USER, ANSWER, USER, ANSWER], variables | {"tools": None})
        start, end = full.blocks[1]
        return full.text[start : full.text.index(PROBE, start, end)]

    def _find_after_user(self, source: str, kwargs_json: str) -> str:
        """What the prompt for an answer to a user has behind the user's words; empty where there is no such prompt."""
        variables = self._template.variables | json.loads(kwargs_json) | {"tools": None}
        try:
            return added_by_prompt(
                trace(source, [USER], variables | {"add_generation_prompt": True}),
                trace(source, [USER], variables | {"add_generation_prompt": False}).text,
            )
        except ValueError:
            return ""

    def _within_of(self, chat: Chat) -> frozenset[str]:
        if not any(message["role"] == "tool" or message.get("tool_calls") for message in chat.messages):
            return frozenset()
        return self._within(self._template.source(chat.tools), _json(chat.kwargs))

    def _find_within(self, source: str, kwargs_json: str) -> frozenset[str]:
        """Tokens that occur inside a turn with two tool calls: a token that ends a call does not end the turn."""
        calls = [probe_call(), probe_call("look")]
        chat = self._template.chat([USER, {"role": "assistant", "tool_calls": calls}], None, json.loads(kwargs_json))
        try:
            traced = trace(source, chat.messages, self._template.variables | chat.kwargs | {"tools": None})
            start, end = traced.blocks[1]
        except (ValueError, KeyError):  # refused, or not written in one run
            return frozenset()
        turn = traced.text[start:end].rstrip()
        return frozenset(token for token in self._added if token in turn.removesuffix(self.ending(turn)))


def _may_switch_thoughts(message: Message) -> bool:
    """Whether the words of a message may change the prompt after it, as `/no_think` does under some templates."""
    return "think" in str(message.get("content"))


def added_by_prompt(prompt: Trace, plain: str) -> str:
    """What a prompt has beyond the conversation so far, without which some templates write an end of the text."""
    added = prompt.text[len(plain) :] if prompt.text.startswith(plain) else ""
    return added or prompt.after_messages()


def _unlike(text: str, begin: int, asked: str) -> str:
    """The prompt `asked` where a turn that begins at `begin` cannot follow it: one of them has a thought."""
    thinks = any(text.startswith(opening, begin) for opening, _ in THOUGHTS)
    closed = any(closing in asked for _, closing in THOUGHTS)
    return asked if opened_thought(asked) or (thinks and closed) else ""


def _rewritten(number: int) -> ValueError:
    return ValueError(
        f"messages[{number}]: the chat template writes this turn differently once others follow, so the assistant's "
        "tokens cannot be located: mark them with {% generation %} in a model.chat_template, or make each turn an "
        "example of its own with data.split_turns=true"
    )


def _of_messages(
    generated: list[tuple[int | None, TextSpan]], assistant: list[int], weights: Sequence[float]
) -> list[tuple[int | None, TextSpan]]:
    """Spans with weight and their messages, which a template that marks outside of a loop does not show.

    Raises ValueError where the messages differ in weight and cannot be distinguished.
    """
    generated = _with_ends(generated)
    if all(number is not None for number, _ in generated):
        return [(number, span) for number, span in generated if number is not None and weights[number]]
    if len(generated) == len(assistant):
        pairs = zip(assistant, generated, strict=True)
        return [(number, span) for number, (_, span) in pairs if weights[number]]
    if len({weights[number] for number in assistant}) > 1:
        raise ValueError(
            "the chat template's {% generation %} marks are not in a loop over the messages, so the assistant's turns "
            "cannot be distinguished, and not all of them are trained alike"
        )
    return [(None, span) for _, span in generated]


def _with_ends(generated: list[tuple[int | None, TextSpan]]) -> list[tuple[int | None, TextSpan]]:
    """Marks after the loop that go on where those of a message end, as those of Phi-3's end of the text, as its."""
    joined: list[tuple[int | None, TextSpan]] = []
    for number, (start, end) in generated:
        if number is None and joined and joined[-1][0] is not None and joined[-1][1][1] == start:
            of, (begin, _) = joined[-1]
            joined[-1] = of, (begin, end)
        else:
            joined.append((number, (start, end)))
    return joined


def _json(kwargs: dict) -> str:
    return json.dumps(kwargs, sort_keys=True) if kwargs else "{}"
