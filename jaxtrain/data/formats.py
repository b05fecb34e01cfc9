"""A row's columns -> an `Example`. The columns are TRL's and Alpaca's.

    input_ids              token ids as they are, optionally with labels (-100: not trained), completion_mask,
                           assistant_masks, attention_mask and loss_weights. Needs no tokenizer.
    messages               a conversation of {role, content[, tool_calls, reasoning_content, weight]}, or ShareGPT's
                           `conversations`; also as JSON
    prompt + completion    two lists of messages, or two strings (see `prompt_format`)
    instruction + output   Alpaca's, with `input` and `history`: a prompt and a completion, or a conversation
    text                   plain text; the end-of-sequence token is added and every token carries loss

Beside a conversation: `system` (a string), `tools` or `functions` (a list or its JSON) and `chat_template_kwargs` (a
mapping or its JSON). Beside everything: `weight`, the loss weight of the row. Other columns are reported once
(`note_ignored`) or refused (columns.py).

Two strings are a user's and an assistant's turn of the chat template by default, since a model that is trained on
questions and answers is then asked through that template. `prompt_format: plain` joins them as they are and adds the
end-of-sequence token, as TRL does.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import threading
import warnings
from collections.abc import Collection
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.config import DataSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.columns import (
    WEIGHT,
    Row,
    check_columns,
    from_alpaca,
    ignored_columns,
    reference_answer,
    row_format,
    row_weight,
)
from jaxtrain.data.encoder import NESTING_BOUNDED, EvalPrompt, RowEncoder
from jaxtrain.data.fingerprints import tokenizer_fingerprint
from jaxtrain.data.messages import KNOWN_KEYS, Conversation, conversation, keys_of_messages, messages_in, question
from jaxtrain.data.nulls import left_out_warning
from jaxtrain.data.packing import Example, RowExamples, last_trained, weighed
from jaxtrain.data.sources import Source
from jaxtrain.data.token_ids import from_token_ids
from jaxtrain.data.tokens import TokenLocator, locate_plain, token_weights

log = logging.getLogger(__name__)

LossOn = Literal["assistant", "last", "all"]

_NOTHING = (None, "", [], {})  # values of arguments that a data set has for other rows

_WARNINGS = {  # by the counter of such rows
    "thoughts_left_out": "turns are trained without the thoughts that the chat template leaves out, as "
    "data.split_turns=false accepts",
    "thoughts_moved": "thoughts in the content are given to the chat template as reasoning_content, where it reads "
    "them: it would write their marks as words",
}


class Encoder(RowEncoder):
    """Rows of supervised fine-tuning -> examples."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        *,
        loss_on: LossOn = "assistant",
        prompt_format: Literal["chat", "plain"] = "chat",
        merge: Collection[str] = (),
        vocab_size: int | None = None,
        split_turns: bool | None = None,
        template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
    ):
        """`vocab_size` is the model's: ids beyond it, which a gather would silently clamp, are then an error.

        `split_turns` makes every turn of the assistant a separate example; False accepts that templates leave out
        the thoughts of earlier turns. `template_kwargs` and `date` are those of `ChatTokenizer`.

        Raises ValueError for settings that exclude each other.
        """
        if split_turns and loss_on == "all":
            raise ValueError(
                "data.split_turns=true would train prompts once for every turn that follows them: choose "
                "data.loss_on=assistant, or do not split"
            )
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._split_turns, self._template_kwargs, self._date = split_turns, template_kwargs, date
        self._warned: set[str] = set()
        self._loss_on: LossOn = loss_on
        self.prompt_format, self._merge = prompt_format, merge
        self._settings: dict[str, Any] = {
            "loss_on": loss_on,
            "prompt_format": prompt_format,
            "merge": sorted(merge),
            "vocab_size": vocab_size,
            "split_turns": split_turns,
            "template_kwargs": template_kwargs,
            "date": date,
        }
        if template_kwargs and tokenizer is not None:
            _ = self._chat  # raises where the chat template does not read them, before a row is
        self._lock = threading.Lock()
        self._noted: dict[str, set[str]] = {}  # by source: the columns that were reported as ignored

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was made: what it holds to encode faster is not sent to other processes."""
        return partial(type(self), **self._settings), (self._tokenizer,)

    @classmethod
    def configured(cls, tokenizer: PreTrainedTokenizerFast | None, data: DataSection, *, vocab_size: int) -> Encoder:
        """With the settings of a run. Raises ValueError for settings that exclude each other."""
        return cls(
            tokenizer,
            loss_on=data.loss_on,
            prompt_format=data.prompt_format,
            merge=data.merge,
            vocab_size=vocab_size,
            split_turns=data.split_turns,
            template_kwargs=data.chat_template_kwargs,
            date=data.date,
        )

    @property
    def fingerprint(self) -> str:
        """Changes with whatever decides the example that a row makes: the tokenizer, and all that was given here.

        Without a `date`, a chat template that writes one makes other examples every day.
        """
        template = str(self._tokenizer and self._tokenizer.chat_template)
        today = datetime.date.today().isoformat() if "strftime_now" in template else ""
        text = repr([tokenizer_fingerprint(self._tokenizer), self._settings, today])
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, row: Row) -> Example | RowExamples:
        """The example of a row; `RowExamples` where `split_turns` makes several of it, or the row adds to a counter.

        Raises ValueError for a row that cannot be read, or that holds no token to learn from.
        """
        with NESTING_BOUNDED:
            try:
                made = self._encode(row)
            except ValueError as error:
                if "refuses the conversation" not in str(error) or "system" not in str(error).lower():
                    raise
                hint = "data.merge=[system] joins a system message to the user's turn after it"
                raise ValueError(f"{error}; {hint}") from error
        if WEIGHT in row and (weight := row_weight(row)) != 1:
            if isinstance(made, RowExamples):
                made = made._replace(items=[weighed(example, weight) for example in made.items])
            else:
                made = weighed(made, weight)
        for example in made.items if isinstance(made, RowExamples) else [made]:
            if self._vocab_size is not None and example.input_ids.max(initial=0) >= self._vocab_size:
                raise ValueError(
                    f"token id {example.input_ids.max()} is beyond the model's vocabulary of {self._vocab_size}"
                )
            if not np.count_nonzero(example.loss_weights[1:]):  # nothing predicts the first token
                raise ValueError(f"no token of this row carries loss ({len(example.input_ids)} tokens)")
        return made

    def prompt(self, row: Row) -> EvalPrompt:
        """The row up to its last answer, as the model is asked for it, and that answer. Raises ValueError."""
        with NESTING_BOUNDED:
            if self._is_plain(row):
                row = _with_prompt(row)
                return EvalPrompt(self._plain_ids(_string(row, "prompt")), _string(row, "completion"))
            if row_format(row) in ("input_ids", "text"):
                raise ValueError("only conversations and prompts with a completion can be asked for their answer")
            talk = conversation(row, self._merge)
            self._unread(talk)
            ids = self._chat.prompt(talk.messages[:-1], tools=talk.tools, template_kwargs=talk.template_kwargs)
            return EvalPrompt(ids, talk.messages[-1].get("content") or "")

    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        """The ids [n] of what the model is asked, and the row with its columns `prompt` and, if it has one, `answer`.

        A column `prompt` is a string or a list of messages (or its JSON). Without it a conversation is asked for its
        last turn, which becomes the `answer` unless the row has one; so do `completion`, Alpaca's `output` and the
        `ground_truth` of verl's `reward_model`. Raises ValueError.
        """
        with NESTING_BOUNDED:
            if (answer := reference_answer(row)) is not None:
                row = row | {"answer": answer}
            if row.get("answer") is None and (completion := row.get("completion")) is not None:
                last = messages_in(completion) or [{"content": completion}]
                row = row | {"answer": last[-1].get("content") if isinstance(last[-1], dict) else None}
            if row.get("prompt") is None:
                if all(row.get(column) is None for column in ("messages", "conversations", "instruction")):
                    raise ValueError(
                        f"there is no prompt: this row has {', '.join(map(repr, row)) or 'no columns'}, and needs "
                        "`prompt` or `messages`; name them with data.train.columns, e.g. {prompt: question}"
                    )
                row = _with_prompt(row if "output" in row or row.get("instruction") is None else row | {"output": None})
            if row.get("prompt") is None:
                talk = conversation(row, self._merge)
                self._unread(talk)
                row = {"answer": talk.messages[-1].get("content"), **row, "prompt": talk.messages[:-1]}
            if isinstance(row["prompt"], str) and self.prompt_format == "plain":
                return self._plain_ids(row["prompt"]), row
            row = row | {"prompt": messages_in(row["prompt"]) or row["prompt"]}
            asked = question(row, self._merge)
            self._unread(asked)
            given: dict[str, Any] = {"tools": asked.tools, "template_kwargs": asked.template_kwargs}
            if keys := keys_of_messages({"prompt": row["prompt"]}) - KNOWN_KEYS:
                for name in sorted(self._chat.unread_keys(asked.messages, keys, self._warned, **given)):
                    self._warn(f"the chat template does not read {name} of prompts, so it changes nothing", about=name)
            return self._chat.prompt(asked.messages, **given), row

    def note_ignored(self, row: Row, source: Source) -> None:
        """Report what is not read of a source, of which `row` is one, each once: columns, and keys of messages that
        change nothing of what the chat template writes."""
        names = [*ignored_columns(row), *self.unread_keys(row, source)]
        if names or source.left_out or WEIGHT in row:
            self.note_names(names, source, row)

    def unread_keys(self, row: Row, source: Source) -> set[str]:
        """Keys of a row's messages that change nothing of what the chat template writes, of each role, without those
        that were reported for the source."""
        if row_format(row) in ("input_ids", "text") or self._is_plain(row):
            return set()
        keys = keys_of_messages(row) - KNOWN_KEYS
        if not keys:
            return set()
        with self._lock:
            known = frozenset(self._noted.get(source.section.path, ()))
        talk = conversation(row, self._merge)
        return self._chat.unread_keys(
            talk.messages, keys, known, tools=talk.tools, template_kwargs=talk.template_kwargs
        )

    def note_names(self, ignored: Collection[str], source: Source, row: Row) -> None:
        """Report columns and keys of a source that are not read, each once, and that a column weighs its rows."""
        path, columns = source.section.path, source.section.columns
        with self._lock:
            noted = self._noted.setdefault(path, {theirs or ours for ours, theirs in columns.items()})
            new = {*ignored, *source.left_out} - noted
            noted |= new
            weighs = row_weight(row) != 1 and WEIGHT not in columns and WEIGHT not in noted
            noted |= {WEIGHT} if weighs else set()
        if new:
            log.warning("%s: columns ignored: %s", path, ", ".join(sorted(new)))
        if weighs:
            log.info("%s: the column 'weight' is taken as the loss weight of each row", path)

    def _encode(self, row: Row) -> Example | RowExamples:
        kind = row_format(row)
        if kind == "chosen+rejected":
            raise ValueError("`chosen` and `rejected` are a pair of answers, for recipe preference or reward")
        plain = self._is_plain(row)
        check_columns(row, "text" if plain else kind)
        if kind == "input_ids":
            example = from_token_ids(row)
            return last_trained(example) if self._loss_on == "last" else example
        if kind == "text":
            return self._from_plain("", _string(row, "text"))
        if plain:
            row = _with_prompt(row)
            return self._from_plain(_string(row, "prompt"), _string(row, "completion"))
        return self._from_conversation(conversation(row, self._merge))

    def _is_plain(self, row: Row) -> bool:
        """Whether the row is a prompt and a completion that are joined as they are."""
        if self.prompt_format != "plain":
            return False
        kind = row_format(row)
        return kind == "instruction+output" or (kind == "prompt+completion" and isinstance(row["prompt"], str))

    def _from_conversation(self, talk: Conversation) -> Example | RowExamples:
        weights = talk.trained(self._loss_on)
        if not any(weights):
            raise ValueError("no message of this conversation is trained: all weights are 0")
        options: dict[str, Any] = {"tools": talk.tools, "template_kwargs": talk.template_kwargs}
        if self._split_turns:
            turns = [number for number, weight in enumerate(weights) if weight]
            chats = [
                self._chat(
                    talk.messages[: number + 1],
                    weights=[0.0] * number + [weights[number]],
                    thoughts="prompted",
                    **options,
                )
                for number in turns
            ]
        else:
            thoughts = "check" if self._split_turns is None else "accept"
            options |= {"weights": weights, "thoughts": thoughts}
            options["loss_on"] = "all" if self._loss_on == "all" else "assistant"
            chats = [self._chat(talk.messages, **options)]
        if not all(np.count_nonzero(chat.loss_weights) for chat in chats):
            raise ValueError("no token of this conversation is the assistant's")
        examples = [Example(chat.input_ids, chat.loss_weights) for chat in chats]
        for text in [text for chat in chats for text in chat.warnings]:
            self._warn(text)
        events = tuple(name for name in _WARNINGS if any(getattr(chat, name) for chat in chats))
        for name in events:
            self._warn(f"{_WARNINGS[name]}; such rows are counted as {name}")
        if talk.template_kwargs or talk.nulls_left_out:
            events += self._unread(talk)
        return examples[0] if len(examples) == 1 and not events else RowExamples(examples, events)

    def _unread(self, talk: Conversation) -> tuple[str, ...]:
        """The counters of what is not read of it, of which it warns."""
        given = talk.template_kwargs or {}
        unread = [name for name, value in given.items() if name not in self._chat.reads and value not in _NOTHING]
        for name in unread:
            self._warn(
                f"the column chat_template_kwargs has {name}, which the chat template does not read, so it changes "
                "nothing; such rows are counted as arguments_unread"
            )
        if talk.nulls_left_out:
            self._warn(left_out_warning(talk.nulls_left_out), about="nulls_left_out")
        return ("arguments_unread",) * bool(unread) + ("nulls_left_out",) * bool(talk.nulls_left_out)

    def _warn(self, text: str, about: str | None = None) -> None:
        """Once of each text, or of what it is about."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            warnings.warn(text, stacklevel=3)

    def _from_plain(self, prompt: str, completion: str) -> Example:
        """Loss on the completion and the end-of-sequence token. One tokenisation, so that ids are those of the text."""
        if not completion:
            raise ValueError("there is no text to learn" if not prompt else "the completion is empty")
        text = prompt + completion
        located = locate_plain(self._needed_tokenizer, self._locate, text)
        learned = (len(prompt), len(text), 1.0)
        weights = token_weights(located, [learned], 1.0 if self._loss_on == "all" else 0.0)
        ids, eos = located.ids, np.int32(self._eos)
        ids = ids if ids[-1] == eos else np.append(ids, eos)
        return Example(ids, np.append(weights[: len(ids) - 1], np.float32(1)))

    def steps(self, prompt: Any, steps: list[Any]) -> tuple[Example, list[int]]:
        """The example of a prompt and the steps of its answer, each with a line break; and the last token of each step.

        These are the texts of TRL's process reward models. Raises ValueError.
        """
        if self.prompt_format != "plain":
            raise ValueError("steps are joined as they are, without a chat template: set data.prompt_format=plain")
        if not isinstance(prompt, str) or not all(isinstance(step, str) and step for step in steps):
            raise ValueError("prompt must be a string, and its steps strings that are not empty")
        text, ends = prompt, []
        for step in steps:
            text += step + "\n"
            ends.append(len(text))
        located = locate_plain(self._needed_tokenizer, self._locate, text)
        real = np.flatnonzero(located.ends > located.starts)  # without tokens that the tokenizer adds
        last = real[np.searchsorted(located.starts[real], located.places(ends)) - 1].tolist()
        return Example(located.ids, np.zeros(len(located.ids), np.float32)), last

    def _plain_ids(self, text: str) -> np.ndarray:
        return locate_plain(self._needed_tokenizer, self._locate, text).ids

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(self._needed_tokenizer, template_kwargs=self._template_kwargs, date=self._date)

    @cached_property
    def _locate(self) -> TokenLocator:
        return TokenLocator(self._needed_tokenizer)

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


def _with_prompt(row: Row) -> Row:
    """A row of instruction and output with the columns that it stands for."""
    return from_alpaca(row) if row_format(row) == "instruction+output" else row


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a string, not {type(value).__name__}")
    return value
