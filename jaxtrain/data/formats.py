"""A row's columns -> an `Example`. The columns are TRL's.

    input_ids              token ids as they are, optionally with labels (-100: not trained), completion_mask,
                           assistant_masks and attention_mask. Needs no tokenizer.
    messages               a conversation of {role, content[, tool_calls, reasoning_content, weight]}, or ShareGPT's
    prompt + completion    two lists of messages, or two strings (see `prompt_format`)
    text                   plain text; the end-of-sequence token is added and every token carries loss

Beside a conversation: `tools` (a list or its JSON) and `chat_template_kwargs` (a mapping or its JSON).

Two strings are a user's and an assistant's turn of the chat template by default, since a model that is trained on
questions and answers is then asked through that template. `prompt_format: plain` joins them as they are and adds the
end-of-sequence token, as TRL does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.columns import Row, check_columns, kind_of
from jaxtrain.data.messages import Conversation, conversation, question
from jaxtrain.data.packing import Example
from jaxtrain.data.token_ids import from_token_ids
from jaxtrain.data.tokens import encode, token_weights, without_limits


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
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._loss_on: Literal["assistant", "all"] = loss_on
        self._prompt_format = prompt_format

    def __call__(self, row: Row) -> Example:
        """Raises ValueError for a row that cannot be read, or that holds no token to learn from."""
        with _nesting_bounded():
            example = self._encode(row)
        if self._vocab_size is not None and example.input_ids.max(initial=0) >= self._vocab_size:
            raise ValueError(
                f"token id {example.input_ids.max()} is beyond the model's vocabulary of {self._vocab_size}"
            )
        if not example.loss_weights[1:].any():  # nothing predicts the first token
            raise ValueError(f"no token of this row carries loss ({len(example.input_ids)} tokens)")
        return example

    def prompt(self, row: Row) -> Prompt:
        """The row up to its last answer, as the model is asked for it, and that answer. Raises ValueError."""
        with _nesting_bounded():
            if self._is_plain(row):
                return Prompt(self._plain_ids(_string(row, "prompt")), _string(row, "completion"))
            if kind_of(row) not in ("messages", "prompt+completion"):
                raise ValueError("only conversations and prompt+completion can be asked for their answer")
            talk = conversation(row)
            ids = self._chat.prompt(talk.messages[:-1], tools=talk.tools, template_kwargs=talk.template_kwargs)
            return Prompt(ids, talk.messages[-1].get("content") or "")

    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        """The ids [n] of what the model is asked, and the row with its columns `prompt` and, if it has one, `answer`.

        A column `prompt` is a string or a list of messages. Without it a conversation is asked for its last turn, which
        becomes the `answer` unless the row has one. Raises ValueError.
        """
        with _nesting_bounded():
            if row.get("prompt") is None:
                if row.get("messages") is None and row.get("conversations") is None:
                    raise ValueError(
                        f"there is no prompt: this row has {', '.join(map(repr, row)) or 'no columns'}, and needs "
                        "`prompt` or `messages`; name them with data.train.columns, e.g. {prompt: question}"
                    )
                messages = conversation(row).messages
                row = {"answer": messages[-1].get("content"), **row, "prompt": messages[:-1]}
            if isinstance(row["prompt"], str) and self._prompt_format == "plain":
                return self._plain_ids(row["prompt"]), row
            asked = question(row)
            return self._chat.prompt(asked.messages, tools=asked.tools, template_kwargs=asked.template_kwargs), row

    def _encode(self, row: Row) -> Example:
        kind = kind_of(row)
        plain = self._is_plain(row)
        check_columns(row, "text" if plain else kind)
        if kind == "input_ids":
            return from_token_ids(row)
        if kind == "text":
            return self._from_plain("", _string(row, "text"))
        if plain:
            return self._from_plain(_string(row, "prompt"), _string(row, "completion"))
        return self._from_conversation(conversation(row))

    def _is_plain(self, row: Row) -> bool:
        """Whether the row is a prompt and a completion that are joined as they are."""
        if kind_of(row) != "prompt+completion" or not isinstance(row["prompt"], str):
            return False
        return self._prompt_format == "plain"

    def _from_conversation(self, talk: Conversation) -> Example:
        weights = talk.trained(self._loss_on)
        if not any(weights):
            raise ValueError("no message of this conversation is trained: all weights are 0")
        chat = self._chat(
            talk.messages,
            tools=talk.tools,
            template_kwargs=talk.template_kwargs,
            weights=weights,
            loss_on=self._loss_on,
        )
        if not chat.loss_weights.any():
            raise ValueError("no token of this conversation is the assistant's")
        return Example(chat.input_ids, chat.loss_weights)

    def _from_plain(self, prompt: str, completion: str) -> Example:
        """Loss on the completion and the end-of-sequence token. One tokenisation, so that ids are those of the text."""
        if not completion:
            raise ValueError("there is no text to learn" if not prompt else "the completion is empty")
        encoding = encode(self._backend, prompt + completion, add_special_tokens=True)
        learned = (0, len(prompt), len(prompt) + len(completion), 1.0)
        weights = token_weights(encoding.offsets, [learned], 1.0 if self._loss_on == "all" else 0.0)
        eos = self._eos
        ids = encoding.ids if encoding.ids[-1] == eos else [*encoding.ids, eos]
        weights = np.append(weights[: len(ids) - 1], np.float32(1))
        return Example(np.array(ids, np.int32), weights)

    def _plain_ids(self, text: str) -> np.ndarray:
        return np.array(encode(self._backend, text, add_special_tokens=True).ids, np.int32)

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


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a string, not {type(value).__name__}")
    return value


@contextmanager
def _nesting_bounded() -> Iterator[None]:
    """Values nested more deeply than Python can walk are a fault of their row."""
    try:
        yield
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
