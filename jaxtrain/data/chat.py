"""Conversations -> token ids and the loss weight of each token, for any chat template.

The ids are those of the tokenizer's own `apply_chat_template`, and one more where it leaves the last turn open: the
token that ends it. The weights are found in the rendered text (`answers.py`) and carried to the tokens by their
places in it, so they cannot change the ids. What a template leaves out of a conversation is an error
(`left_out.py`).
"""

import logging
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.answers import Answer, Answers, added_by_prompt
from jaxtrain.data.left_out import CHOICES, LeftOut
from jaxtrain.data.rendering import ANSWER, PROBE, USER, Chat, Template
from jaxtrain.data.thoughts import (
    MARKS,
    THOUGHTS,
    check_thought,
    opened_thought,
    split_thought,
    without_thought,
    words_before_thought,
)
from jaxtrain.data.tokens import TokenLocator, encode, token_weights, without_limits
from jaxtrain.data.tracing import Message, Trace

log = logging.getLogger(__name__)


class EncodedChat(NamedTuple):
    input_ids: np.ndarray  # [n] int32
    loss_weights: np.ndarray  # [n] float32
    thoughts_left_out: bool = False  # an earlier turn is trained without the thought that it should begin with
    thoughts_moved: bool = False  # from the content of a turn to its reasoning_content
    warnings: tuple[str, ...] = ()  # what may be wrong with how its turns end


_NOT_ENDED = "turns of the assistant are trained without a token that ends them, since the chat template"
_MARKS_WITHOUT_END = (
    f"{_NOT_ENDED} leaves it out of its {{% generation %}} marks, so the model does not learn to stop: put the token "
    "inside the marks, or remove the marks"
)
_NO_END = (
    f"{_NOT_ENDED} writes none where others follow: data.split_turns=true makes every turn a separate example and ends "
    "each as the last one"
)
_ENDED_TWICE = (
    "words of the assistant contain {!r}, which ends its turns in the chat template, so the model learns to stop "
    "there: remove it from the data"
)


class ChatTokenizer:
    """A tokenizer with a chat template, as a function of conversations. Safe to call from several threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
    ):
        """`template_kwargs` are arguments of the template that a conversation's own override; `date`
        (year-month-day) is today's where the template writes it, by default the clock's.

        Raises ValueError for a tokenizer without a chat template.
        """
        self._template = Template(tokenizer, template_kwargs or {}, date)
        self.reads = self._template.reads  # the arguments that the template knows
        self._answers = Answers(self._template, tokenizer)
        self._left_out = LeftOut(self._template)
        self._tokenizer = tokenizer
        self._backend = without_limits(tokenizer)
        self._locate = TokenLocator(tokenizer)

    def __call__(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        loss_on: Literal["assistant", "all"] = "assistant",
        thoughts: Literal["check", "accept", "prompted"] = "check",
    ) -> EncodedChat:
        """Encode a conversation.

        `weights` are the loss weights of the messages; None is 1 for each. With `loss_on="assistant"` those of the
        assistant's apply to the assistant's own tokens and their end-of-turn token, and everything else weighs 0. With
        `loss_on="all"` they apply to whole turns of any role, and text outside of turns weighs 1.

        Templates leave out the thoughts of earlier turns. Where such a turn is trained, or is part of the prompt for
        one that is, `thoughts="check"` is an error and `"accept"` reports it in the result. A last turn that is trained
        alone follows the prompt for it; with `"prompted"` also where the template does not write the thought that its
        prompt opens.

        Raises ValueError where the template refuses the conversation, leaves out a part of it (`tools`, tool calls, the
        reasoning or the content of a turn that is trained), or the tokens of a turn cannot be located.
        """
        weights = [1.0] * len(messages) if weights is None else weights
        assert len(weights) == len(messages)
        chat = self._template.chat(messages, tools, template_kwargs)
        for number, message in enumerate(chat.messages):
            if weights[number] and message["role"] == "assistant" and MARKS.search(message.get("content") or ""):
                check_thought(message, f"messages[{number}]", self._template.thought_form(chat).keyed)
        traced = self._template.trace(chat)
        self._left_out.check(traced.text, chat, lambda changed: self._template.trace(changed).text)
        asked = None
        answered_before = any(message["role"] == "assistant" for message in chat.messages[:-1])
        # A template may write earlier turns of the assistant otherwise once the last, if it alone is trained, follows.
        if thoughts == "prompted" or (loss_on == "assistant" and not any(weights[:-1]) and answered_before):
            asked = self._asked_for_last(chat, needed=thoughts == "prompted")
        rewritten = None
        if asked is not None and thoughts == "prompted":
            rewritten = self._behind_opened_thought(traced, asked.text, chat)
        text, answers = rewritten or (traced.text, self._answers.find(traced, chat, weights))
        left_out = False
        if rewritten is None:
            left_out = self._left_out.check_turns(traced, chat, weights, accept=thoughts == "accept")
            left_out |= self._check_prompts(answers, accept=thoughts == "accept", split=thoughts == "prompted")
            if asked is not None:
                text, answers = self._behind_prompt(text, answers, asked, chat)
        closing = self._answers.closing(traced, chat) if weights[-1] else None
        found = self._check_ends(text, answers, chat, closing, has_marks=rewritten is None and bool(traced.generated))
        spans = [(answer.start, answer.end, weights[answer.message]) for answer in answers]
        if loss_on == "all":
            spans = _turn_spans(traced, weights)
        located = self._locate(text)
        ids, values = located.ids, token_weights(located, spans, 1.0 if loss_on == "all" else 0.0)
        if closing is not None:
            ids = np.append(ids, np.int32(self._backend.token_to_id(closing)))
            values = np.append(values, np.float32(weights[-1]))
        return EncodedChat(ids, values, left_out, bool(chat.moved), found if loss_on == "assistant" else ())

    def unread_keys(
        self,
        messages: list[Message],
        keys: Collection[str],
        known: Collection[str],
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> set[str]:
        """Which of `keys` change nothing of what the template writes, as `messages[].KEY (ROLE)`; those in `known` are
        left out, untried. Raises ValueError where the template refuses the conversation.
        """
        return self._left_out.unread_keys(self._template.chat(messages, tools, template_kwargs), keys, known)

    def prompt(
        self, messages: list[Message], *, tools: list[Any] | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> np.ndarray:
        """The ids [n] int32 that make the model answer `messages`.

        Raises ValueError where the template fails, and where it leaves out `tools`, a message's `tool_calls` or what
        messages of another role than the assistant's say.
        """
        if not messages:
            raise ValueError("the assistant's turn comes first, so there is nothing to ask the model for it with")
        chat = self._template.chat(messages, tools, template_kwargs)
        text = self._prompt_text(chat)
        self._left_out.check(text, chat, self._prompt_text)
        return np.array(encode(self._backend, text, add_special_tokens=False).ids, np.int32)

    def reply(self, messages: list[Message], template_kwargs: dict[str, Any] | None = None) -> tuple[list[int], int]:
        """The ids between two turns of the assistant: the end of its turn, `messages` and the prompt for its next one;
        and how many of them end its turn (which a sampler may have drawn itself already).

        Only this is rendered, after a placeholder turn: earlier turns are never tokenised again.
        """
        chat = self._template.chat([USER, ANSWER, *messages], None, template_kwargs)
        text = self._prompt_text(chat)
        self._left_out.check(text, chat, self._prompt_text, first=2)
        _, *between = text.split(PROBE, 2)
        if len(between) != 2:
            raise ValueError("the chat template does not write an assistant's turn as it is: nothing can follow it")
        end, _ = self._answers.end_of_turn(between[1], 0, 0)
        encoding = encode(self._backend, between[1], add_special_tokens=False)
        return encoding.ids, sum(start < end for start, _ in encoding.offsets)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _prompt_text(self, chat: Chat) -> str:
        return self._template.trace(chat, prompt=True).text

    def _asked_for_last(self, chat: Chat, *, needed: bool) -> Trace | None:
        try:
            return self._template.trace(chat.until(len(chat.messages) - 1), prompt=True)
        except ValueError:
            if needed and len(chat.messages) > 1:
                raise
            return None  # a template of whole conversations, which has no prompts, or nothing to prompt with

    def _behind_opened_thought(self, traced: Trace, prompt: str, chat: Chat) -> tuple[str, list[Answer]] | None:
        """The text and the last turn where the prompt opens a thought that the template does not write, as the
        templates of DeepSeek-R1's distillations do; None where it is written, or there is no thought.
        """
        last = len(chat.messages) - 1
        begin = opened_thought(prompt)
        thought, answer = split_thought(chat.messages[last])
        if traced.text.startswith(prompt) or not begin or not thought.strip():
            return None
        if words_before_thought(chat.messages[last]):
            raise ValueError(
                f"messages[{last}]: the prompt opens a thought, so the turn must begin with its only one, and this one "
                "has words or another thought before its last thought"
            )
        bare = chat.with_message(last, without_thought(chat.messages[last]))
        written = self._template.trace(bare)
        (found,) = self._answers.find(written, bare, [0.0] * last + [1.0])
        blank = answer[: len(answer) - len(answer.lstrip())] or "\n\n"
        turn = f"{thought.strip()}\n{dict(THOUGHTS)[begin]}{blank}{written.text[found.start : found.end]}"
        text = prompt + turn + written.text[found.end :]
        return text, [Answer(last, len(prompt), len(prompt) + len(turn))]

    def _behind_prompt(self, text: str, answers: list[Answer], prompt: Trace, chat: Chat) -> tuple[str, list[Answer]]:
        """The text and the last turn after the prompt for it, where the template writes what comes before otherwise
        once the turn follows, as that of GPT-OSS leaves out the thought of a call before an answer.

        Raises ValueError where the two do not fit.
        """
        if not answers or text.startswith(prompt.text):
            return text, answers
        asking = chat.until(len(chat.messages) - 1)
        start, asked = answers[0].start, added_by_prompt(prompt, self._template.trace(asking).text)
        if text.startswith(prompt.text.removesuffix(asked)):
            return text, answers
        if not asked or not text.endswith(asked, 0, start):
            raise ValueError(
                f"messages[{len(asking.messages)}]: the chat template writes the messages before this turn otherwise "
                "once it follows, so it cannot be trained as the model is prompted for it: give the turn a weight of "
                "0, or another template as model.chat_template"
            )
        moved = len(prompt.text) - start
        shifted = [answer._replace(start=answer.start + moved, end=answer.end + moved) for answer in answers]
        return prompt.text + text[start:], shifted

    def _check_prompts(self, answers: list[Answer], *, accept: bool, split: bool) -> bool:
        """Whether a turn cannot follow the prompt for it. Raises ValueError unless that is accepted.

        `split`: the turn is an example of its own already.
        """
        for answer in answers:
            if answer.unlike and not accept:
                raise ValueError(
                    f"messages[{answer.message}]: the chat template prompts for this turn with {answer.unlike!r} and "
                    "writes it otherwise, so what is trained would not be what the model must write: "
                    + _advice(answer.unlike, self.reads)
                    + ("" if split else f"; {CHOICES}")
                )
        return any(answer.unlike for answer in answers)

    def _check_ends(
        self, text: str, answers: list[Answer], chat: Chat, closing: str | None, *, has_marks: bool
    ) -> tuple[str, ...]:
        """Warnings about how the trained turns end; `closing` is the token that is added after the last message.

        Raises ValueError for a turn of which the template writes nothing but its end.
        """
        turns: dict[int, str] = {}
        for answer in answers:
            turns[answer.message] = turns.get(answer.message, "") + text[answer.start : answer.end].rstrip()
        found: dict[str, None] = {}
        for number, turn in turns.items():
            end = self._answers.ending(turn)
            if not turn.removesuffix(end).strip():
                raise ValueError(
                    f"messages[{number}]: the chat template writes nothing of this assistant's turn but its end, so an "
                    "empty answer would be trained"
                )
            end = end or (closing if number == len(chat.messages) - 1 else None)
            if not end:
                found[_MARKS_WITHOUT_END if has_marks else _NO_END] = None
            elif end in (chat.messages[number].get("content") or ""):
                found[_ENDED_TWICE.format(end)] = None
        return tuple(found)


def _advice(asked: str, reads: Collection[str]) -> str:
    """What to do about a turn that cannot follow its prompt `asked`, under a template that reads these arguments."""
    begin = opened_thought(asked)
    if not begin:
        return "the prompt holds an empty thought and the turn has one: remove its thought, or let the prompt open one"
    advice = f"the prompt opens a thought with {begin} that this turn does not have: give the turn one"
    if "enable_thinking" in reads:
        advice += ", or data.chat_template_kwargs={enable_thinking: false}, which puts an empty one into the prompt"
    return f"{advice}, or give a template whose prompt opens none as model.chat_template"


def _turn_spans(traced: Trace, weights: Sequence[float]) -> list[tuple[int, int, float]]:
    """Whole turns whose weight is not 1, of any role."""
    weighted = [number for number, weight in enumerate(weights) if weight != 1]
    blocks = traced.blocks if weighted else {}
    for number in weighted:
        if number not in blocks:
            raise ValueError(
                f"messages[{number}]: the chat template does not write this turn in a loop over the messages, so its "
                "weight cannot be applied; use data.loss_on=assistant"
            )
    return [(*blocks[number], weights[number]) for number in weighted]
