"""Conversations -> token ids and the loss weight of each token, for any chat template.

The ids are those of the tokenizer's own `apply_chat_template`. The weights are found in the rendered text and carried
to the tokens by their character offsets, so they cannot change the ids. Where the assistant speaks is found in this
order:

1. by the template's own `{% generation %}` marks;
2. by tracing (`tracing.py`): of what the template's loop writes for an assistant's message, the generation prompt
   belongs to the prompt, and everything after it, up to the end-of-turn token, is the assistant's. This also holds
   where a template rewrites earlier turns, as Qwen3's does with thinking;
3. where a template does not loop over its messages: by the difference between the conversation up to a turn and
   including it, which is an error where the one is not a prefix of the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.tokens import encode, token_weights, without_limits
from jaxtrain.data.tracing import Message, Span, Trace, names_read, refusal, trace

_PROBE = "jaxtrain-probe"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the key that holds an assistant's reasoning
_OTHER_ROLES = ("system", "developer", "tool")  # that a template may not know


class EncodedChat(NamedTuple):
    input_ids: np.ndarray  # [n] int32
    loss_weights: np.ndarray  # [n] float32


class ChatTokenizer:
    """A tokenizer with a chat template, as a function of conversations. Safe to call from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, which conversations need: give one "
                "as model.chat_template (a jinja file); prompt and completion that are strings can do without, with "
                "data.prompt_format=plain"
            )
        self._tokenizer = tokenizer
        self._backend = without_limits(tokenizer)
        self._special = tuple(sorted(tokenizer.added_tokens_encoder, key=len, reverse=True))
        self._headers = lru_cache(maxsize=256)(self._find_headers)
        self._rendered_roles: set[str] = set()  # whose words were seen in a rendered text: checked once

    def __call__(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        loss_on: Literal["assistant", "all"] = "assistant",
    ) -> EncodedChat:
        """Encode a conversation.

        `weights` are the loss weights of the messages; None is 1 for each. With `loss_on="assistant"` those of the
        assistant's apply to the assistant's own tokens and their end-of-turn token, and everything else weighs 0. With
        `loss_on="all"` they apply to whole turns of any role, and text outside of turns weighs 1.

        Raises ValueError where the template refuses the conversation, leaves out a part of it (`tools`, tool calls, the
        reasoning or the whole of a turn that is trained), or the tokens of a turn cannot be located.
        """
        messages = [_with_reasoning_names(message) for message in messages]
        weights = [1.0] * len(messages) if weights is None else weights
        assert len(weights) == len(messages)
        chat = _Chat(messages, weights, tools, template_kwargs or {})
        text = self.render(messages, tools=tools, template_kwargs=chat.kwargs)
        self._check_reasoning(text, chat)
        spans = self._assistant_spans(text, chat)
        self._check_not_empty(text, spans)
        if loss_on == "all":
            spans = self._turn_spans(text, chat)
        encoding = encode(self._backend, text, add_special_tokens=False)
        outside = 1.0 if loss_on == "all" else 0.0
        return EncodedChat(np.array(encoding.ids, np.int32), token_weights(encoding.offsets, spans, outside))

    def prompt(
        self, messages: list[Message], *, tools: list[Any] | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> np.ndarray:
        """The ids [n] int32 that make the model answer `messages`. Raises ValueError as `render` does."""
        text = self.render(messages, tools=tools, template_kwargs=template_kwargs or {}, add_generation_prompt=True)
        return np.array(encode(self._backend, text, add_special_tokens=False).ids, np.int32)

    def reply(self, messages: list[Message], template_kwargs: dict[str, Any] | None = None) -> tuple[list[int], int]:
        """The ids between two turns of the assistant: the end of its turn, `messages` and the prompt for its next one;
        and how many of them end its turn (which a sampler may have drawn itself already).

        Only this is rendered, after a placeholder turn: earlier turns are never tokenised again.
        """
        kwargs = template_kwargs or {}
        before = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        options: dict[str, Any] = {"tools": None, "template_kwargs": kwargs, "add_generation_prompt": True}
        text = self._apply(before + messages, **options)
        self._check_roles(text, before + messages, lambda changed: self._apply(changed, **options), len(before))
        _, *between = text.split(_PROBE, 2)
        if len(between) != 2:
            raise ValueError("the chat template does not write an assistant's turn as it is: nothing can follow it")
        end = self._end_of_turn(between[1], 0, 0)
        encoding = encode(self._backend, between[1], add_special_tokens=False)
        return encoding.ids, sum(start < end for start, _ in encoding.offsets)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None,
        template_kwargs: dict[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        """The text that the template makes of a conversation.

        Raises ValueError where the template fails, and where it leaves out `tools`, a message's `tool_calls` or what
        messages of a role say.
        """

        def apply(messages: list[Message], tools: list[Any] | None) -> str:
            return self._apply(
                messages, tools=tools, template_kwargs=template_kwargs, add_generation_prompt=add_generation_prompt
            )

        text = apply(messages, tools)
        self._check_roles(text, messages, lambda changed: apply(changed, tools))
        names = names_read(self._tokenizer.get_chat_template(tools=tools))
        if tools and "tools" not in names and apply(messages, None) == text:
            called = ", ".join(str((tool.get("function") or tool).get("name")) for tool in tools)
            raise ValueError(
                f"the chat template never writes the schemas of tools, so the model would not see {called}: give a "
                "template that does as model.chat_template, or leave the tools out"
            )
        for number, message in enumerate(messages):
            if not message.get("tool_calls") or "tool_calls" in names:
                continue
            if apply(_with_message(messages, number, _without(message, "tool_calls")), tools) == text:
                raise ValueError(
                    f"messages[{number}]: the chat template does not write its tool_calls: give a template that does "
                    "as model.chat_template"
                )
        return text

    def _check_roles(
        self, text: str, messages: list[Message], render: Callable[[list[Message]], str], start: int = 0
    ) -> None:
        """Raises ValueError where `text` does not depend on what a message from number `start` on says."""
        for number, message in enumerate(messages[start:], start):
            role = message["role"]
            if (
                role not in _OTHER_ROLES
                or role in self._rendered_roles
                or not str(message.get("content") or "").strip()
            ):
                continue
            try:
                changed = render(_with_message(messages, number, message | {"content": _PROBE}))
            except ValueError:  # the template refuses these words, so it reads them
                changed = None
            if changed == text:
                raise ValueError(
                    f"messages[{number}]: the chat template writes nothing for a message of the role {role!r}: give a "
                    "template that does as model.chat_template"
                )
            self._rendered_roles.add(role)

    def _apply(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None,
        template_kwargs: dict[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
        except Exception as error:  # a template runs any expression over the row, and may fail in any way
            raise refusal(error) from error
        assert isinstance(text, str)
        return text

    def _check_reasoning(self, text: str, chat: _Chat) -> None:
        """Raises ValueError for the reasoning of a trained turn under a template that never writes any."""
        if not names_read(self._tokenizer.get_chat_template(tools=chat.tools)).isdisjoint(_REASONING):
            return
        for number, message in enumerate(chat.messages):
            if chat.weights[number] and str(message.get("reasoning_content") or "").strip():
                without = _with_message(chat.messages, number, _without(message, *_REASONING))
                if self._apply(without, tools=chat.tools, template_kwargs=chat.kwargs) == text:
                    raise ValueError(
                        f"messages[{number}]: the chat template does not write its reasoning: give a template that "
                        "does as model.chat_template, or put the reasoning into the content"
                    )

    def _check_not_empty(self, text: str, spans: list[_Weighted]) -> None:
        """Raises ValueError for a trained turn of which the template writes nothing but its end."""
        words: dict[int, str] = {}
        for span in spans:
            if span.weight:
                words[span.message] = words.get(span.message, "") + text[span.start : span.end]
        for number, said in words.items():
            ending = next((token for token in self._special if said.rstrip().endswith(token)), "")
            if not said.rstrip().removesuffix(ending).strip():
                raise ValueError(
                    f"messages[{number}]: the chat template writes nothing of this assistant's turn but its end, so an "
                    "empty answer would be trained"
                )

    def _assistant_spans(self, text: str, chat: _Chat) -> list[_Weighted]:
        """The assistant's own words in the rendered text, end-of-turn tokens included."""
        assistant = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        traced = self._trace(chat)
        if traced.text != text:  # the template depends on more than it is given
            spans = self._spans_by_prefix(text, assistant, chat)
        elif traced.generated:
            spans = _of_messages(traced.generated, assistant, chat.weights)
        elif not traced.blocks().keys() >= set(assistant):
            spans = self._spans_by_prefix(text, assistant, chat)
        else:
            template = self._tokenizer.get_chat_template(tools=chat.tools)
            headers = self._headers(template, json.dumps(chat.kwargs, sort_keys=True))
            blocks = traced.blocks()
            spans = [(number, self._answer_within(text, blocks[number], headers)) for number in assistant]
        return [_Weighted(number, *span, chat.weights[number]) for number, span in spans]

    def _turn_spans(self, text: str, chat: _Chat) -> list[_Weighted]:
        """Whole turns whose weight is not 1, of any role."""
        weighted = [number for number, weight in enumerate(chat.weights) if weight != 1]
        blocks = self._trace(chat).blocks() if weighted else {}
        for number in weighted:
            if number not in blocks:
                raise ValueError(
                    f"messages[{number}]: the chat template does not write this turn in a loop over the messages, so "
                    "its weight cannot be applied; use data.loss_on=assistant"
                )
        return [_Weighted(number, *blocks[number], chat.weights[number]) for number in weighted]

    def _trace(self, chat: _Chat) -> Trace:
        template = self._tokenizer.get_chat_template(tools=chat.tools)
        return trace(
            template, chat.messages, {"tools": chat.tools, **self._tokenizer.special_tokens_map, **chat.kwargs}
        )

    def _answer_within(self, text: str, block: Span, headers: tuple[str, ...]) -> Span:
        start, end = block
        header = next((header for header in headers if text.startswith(header, start, end)), None)
        if header is None:
            raise ValueError(
                f"the chat template begins an assistant turn with {text[start : start + 40]!r} but prompts for one "
                f"with {headers[0]!r}: mark the assistant's part with {{% generation %}} in a model.chat_template"
            )
        return start + len(header), self._end_of_turn(text, start + len(header), end)

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """The end of the turn without what the template writes after its end-of-turn token, such as a line break."""
        stripped = start + len(text[start:end].rstrip())
        if any(text.endswith(token, start, stripped) for token in self._special):
            return stripped
        # Some templates write the end-of-turn token once, after the loop.
        after = next((token for token in self._special if text.startswith(token, end)), "")
        return end + len(after)

    def _find_headers(self, template: str, kwargs_json: str) -> tuple[str, ...]:
        """What may stand before an assistant's own words: the generation prompt, and how an earlier turn begins.

        They differ where the prompt holds more than the role (an empty thought, say), which earlier turns do not keep.
        """
        variables = {"tools": None, **self._tokenizer.special_tokens_map, **json.loads(kwargs_json)}
        user, answer = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}
        plain = trace(template, [user], variables).text
        prompted = trace(template, [user], {**variables, "add_generation_prompt": True})
        # Some templates write an end of the text in place of the prompt; the prompt is then what follows the loop.
        before = len(plain) if prompted.text.startswith(plain) else prompted.blocks()[0][1]
        full = trace(template, [user, answer, user, answer], variables)
        start, end = full.blocks()[1]
        return prompted.text[before:], full.text[start : full.text.index(_PROBE, start, end)]

    def _spans_by_prefix(self, text: str, assistant: list[int], chat: _Chat) -> list[tuple[int, Span]]:
        spans = []
        for number in assistant:
            options: dict[str, Any] = {"tools": chat.tools, "template_kwargs": chat.kwargs}
            before = self._apply(chat.messages[:number], add_generation_prompt=True, **options)
            after = self._apply(chat.messages[: number + 1], **options)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"messages[{number}]: the chat template writes this turn differently once others follow, so the "
                    "assistant's tokens cannot be located: mark them with {% generation %} in a model.chat_template"
                )
            spans.append((number, (len(before), self._end_of_turn(text, len(before), len(after)))))
        return spans


class _Chat(NamedTuple):
    messages: list[Message]
    weights: Sequence[float]  # of each message
    tools: list[Any] | None
    kwargs: dict[str, Any]  # further arguments of the template


class _Weighted(NamedTuple):
    """A run of the rendered text and the loss weight of its tokens."""

    message: int
    start: int
    end: int
    weight: float


def _of_messages(
    generated: list[tuple[int | None, Span]], assistant: list[int], weights: Sequence[float]
) -> list[tuple[int, Span]]:
    """Spans with the numbers of their messages, which a template that marks outside of a loop does not tell.

    Raises ValueError where the messages differ in weight and cannot be told apart.
    """
    if all(number is not None for number, _ in generated):
        return [(number, span) for number, span in generated if number is not None]
    if len(generated) == len(assistant):
        return [(number, span) for number, (_, span) in zip(assistant, generated, strict=True)]
    if len({weights[number] for number in assistant}) > 1:
        raise ValueError(
            "the chat template's {% generation %} marks are not in a loop over the messages, so the assistant's turns "
            "cannot be told apart, and not all of them are trained alike"
        )
    return [(assistant[0], span) for _, span in generated]


def _with_message(messages: list[Message], number: int, message: Message) -> list[Message]:
    return [*messages[:number], message, *messages[number + 1 :]]


def _without(message: Message, *keys: str) -> Message:
    return {key: value for key, value in message.items() if key not in keys}


def _with_reasoning_names(message: Message) -> Message:
    """Without nulls, and with the reasoning under every name that templates read, as transformers passes it on."""
    message = {key: value for key, value in message.items() if value is not None}
    found = [message[name] for name in _REASONING if name in message]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message
