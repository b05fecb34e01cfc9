"""Rows of preferences -> examples: pairs of a better and a worse answer, and answers with a label.

    prompt + chosen + rejected    a pair: strings, lists of messages, or single messages. The prompt may be left out
                                  where `chosen` and `rejected` begin with it, as lists of messages do, or, with
                                  `prompt_format: plain`, strings; it may also be `messages` that end before the answer,
                                  or Alpaca's instruction
    margin                        of a pair: by how much the chosen answer is better
    ref_chosen_logps,             the reference's log-probabilities, of each token of the whole example (0 where it is
    ref_rejected_logps,           not trained), or their sum
    ref_logps
    label                         of an answer, in any of the formats of SFT: true or false, or a number
    completions + labels          steps of one answer to a prompt, each with a label

Beside these: `tools`, `system` and `chat_template_kwargs`, as for SFT.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.config import DataSection, RunConfig
from jaxtrain.data.columns import (
    LABEL_COLUMNS,
    OPTIONAL_COLUMNS,
    REFERENCE_COLUMNS,
    TEMPLATE_COLUMNS,
    WEIGHT,
    Row,
    from_alpaca,
)
from jaxtrain.data.encoder import EvalPrompt, RowEncoder
from jaxtrain.data.formats import Encoder
from jaxtrain.data.messages import KNOWN_KEYS, keys_of_messages, messages_in
from jaxtrain.data.packing import RowExamples
from jaxtrain.data.sources import Source
from jaxtrain.types import LABEL, MARGIN, MISMATCHED, REF_LOGPS, SIGN, Bundle, Example

_SIDES = ("chosen", "rejected")
_KNOWN = {"chosen", "rejected", *OPTIONAL_COLUMNS["chosen+rejected"], "margin", WEIGHT, *REFERENCE_COLUMNS}
_PREVIOUS = "row before"  # a column of ours: the last row before with another prompt


class PairRows(NamedTuple):
    """A pair as two rows of a prompt and a completion."""

    chosen: Row
    rejected: Row


def split_pair(row: Row, *, plain: bool) -> PairRows:
    """The two sides of a row with `chosen` and `rejected`. `plain`: strings are joined as they are.

    Raises ValueError for a row that is not a pair.
    """
    if missing := [side for side in _SIDES if row.get(side) is None]:
        has = ", ".join(repr(name) for name, value in row.items() if value is not None) or "none"
        raise ValueError(
            f"no {missing[0]!r} answer: this row has the columns {has}; name them with data.train.columns, e.g. "
            "{chosen: better, rejected: worse}"
        )
    prompt = _prompt(row)
    chosen, rejected = (_side(row[side], side) for side in _SIDES)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be messages")
    if isinstance(chosen, list):
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = _split_strings(chosen, rejected, plain=plain)
    rest = {name: row[name] for name in (*TEMPLATE_COLUMNS, WEIGHT) if name in row}
    return PairRows(*({**rest, "prompt": prompt, "completion": answer} for answer in (chosen, rejected)))


def _prompt(row: Row) -> Any:
    """The prompt of a pair, or None if it is left out."""
    if row.get("prompt") is not None:
        return messages_in(row["prompt"]) or row["prompt"]
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return messages_in(row[column]) or row[column]
    if row.get("instruction") is None:
        return None
    asked = from_alpaca({"output": None, **row})
    return asked["messages"][:-1] if "messages" in asked else asked["prompt"]


def _side(answer: Any, side: str) -> Any:
    answer = [answer] if isinstance(answer, dict) else messages_in(answer) or answer
    if not isinstance(answer, str | list) or not answer:
        raise ValueError(f"{side} must be a string or a list of messages that is not empty")
    return answer


def _split_messages(prompt: Any, chosen: list[Any], rejected: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    """The prompt, and what follows it on both sides, which may begin with it."""
    if isinstance(prompt, list):
        begin = len(prompt) if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt else 0
        return prompt, chosen[begin:], rejected[begin:]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    common = chosen[:shared]
    if prompt is None and not common:
        raise ValueError("there is no prompt: `chosen` and `rejected` do not begin with the same messages")
    if isinstance(prompt, str):
        asked = {"role": "user", "content": prompt}
        if not common:
            return [asked], chosen, rejected
        last = common[-1] if isinstance(common[-1], dict) else {}
        if last.get("content", last.get("value")) != prompt:
            raise ValueError(
                "`prompt` is not the last message before the answers in `chosen` and `rejected`: remove the column, or "
                "leave the prompt out of both"
            )
    return common, chosen[shared:], rejected[shared:]


def _split_strings(chosen: str, rejected: str, *, plain: bool) -> tuple[str, str, str]:
    """The common beginning, without a space at its end, and the rest of both, as TRL's `extract_prompt` splits them."""
    if not plain:
        raise ValueError(
            "chosen and rejected are whole texts without a `prompt`: give the column, or set data.prompt_format=plain "
            "to join strings as they are"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


class AnswerEncoder(RowEncoder):
    """What the encoders of answers share. `references`, by the `rows_key` of a source, are rows with further columns:
    log-probabilities of the reference."""

    references: Mapping[str, Any] = {}

    def __init__(self, encode: Encoder, data: DataSection, *, score_last: bool = False):
        """`encode` makes an example of a prompt and its answer. `score_last` weighs the last token of a text alone, at
        which a reward model is read."""
        self._encode, self._score_last = encode, score_last
        self._max_length, self._from_left = data.max_length, data.overlong == "keep_completion"

    @property
    def fingerprint(self) -> str:
        settings = type(self).__name__, self._score_last, self._encode.fingerprint
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Without `references`: worker processes get rows that have these columns."""
        return {name: value for name, value in vars(self).items() if name != "references"}

    @abstractmethod
    def reference_columns(self, row: Row) -> list[str]:
        """The columns with the reference's log-probabilities of the examples that the row makes, in their order."""

    def more_columns(self, source: Source, row: int) -> Row:
        found = self.references.get(source.section.rows_key)
        return {} if found is None else found[row]

    def prompt(self, row: Row) -> EvalPrompt:
        return self._encode.prompt(self._right(row))

    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        if row.get("chosen") is not None:
            return self._encode.question(self._right(row))
        return self._encode.question({name: value for name, value in row.items() if name != "completion"})

    def _right(self, row: Row) -> Row:
        """The prompt and the chosen answer of a pair, beside its other columns."""
        if row.get("chosen") is None:
            raise ValueError("without `chosen` no answer is known to be right: judge them by eval.rewards")
        return row | split_pair(row, plain=self._encode.prompt_format == "plain").chosen

    def _note_pair(self, row: Row, source: Source) -> None:
        names = {name for name in row if name not in _KNOWN and row[name] is not None}
        if keys_of_messages(row) - KNOWN_KEYS:
            for side in split_pair(row, plain=self._encode.prompt_format == "plain"):
                names |= self._encode.unread_keys(side, source)
        self._encode.note_names(names, source, {})

    def _answer(self, row: Row, events: set[str]) -> Example:
        """The one example of a prompt and its answer. Adds to `events` the counters that it adds to."""
        made = self._encode(row)
        if not isinstance(made, Example):
            if len(made.items) != 1:
                raise ValueError("data.split_turns makes several examples of an answer, which has one score")
            events.update(made.events)
            made = made.items[0]
        if not np.isin(made.loss_weights, (0, 1)).all():
            raise ValueError("weights of messages and rows must be 0 or 1 here: whole answers are compared")
        if not self._score_last:
            return made
        weights = np.zeros_like(made.loss_weights)
        weights[-1] = 1  # so that a text whose end is cut off is left out
        return made._replace(loss_weights=weights)

    def _with_logps(self, example: Example, row: Row, column: str) -> Example:
        """The example with the signal `ref_logps`, if the row has it: the log-probability of each token, of each token
        that `data.max_length` leaves, or their sum, which is then at the last trained token."""
        given, tokens = row.get(column), len(example.input_ids)
        if given is None:
            return example
        values = np.zeros(tokens, np.float32)
        if isinstance(given, list | np.ndarray):
            cut = len(given) < tokens and (self._from_left or len(given) == self._max_length)
            if len(given) != tokens and not cut:
                raise ValueError(f"{column}: {len(given)} log-probabilities for {tokens} tokens")
            values[tokens - len(given) if self._from_left else 0 :][: len(given)] = given
        elif isinstance(given, bool) or not isinstance(given, int | float):
            raise ValueError(f"{column} must be a number, or a list of one for each token")
        elif tokens > self._max_length:
            raise ValueError(
                f"{column} is a sum over {tokens} tokens, of which data.max_length={self._max_length} leaves out some"
            )
        else:
            values[np.flatnonzero(example.loss_weights)[-1]] = given
        return example._replace(signals={**example.signals, REF_LOGPS: values})


class PairEncoder(AnswerEncoder):
    """Pairs -> bundles of the chosen and the rejected example, with the signal `sign`: 1 and -1 on their tokens.

    A row's `margin` is a signal too. Pairs of equal answers are left out and counted: nothing can be learned from them.
    """

    bundle_size = 2

    def reference_columns(self, row: Row) -> list[str]:
        return [f"ref_{side}_logps" for side in _SIDES]

    def note_ignored(self, row: Row, source: Source) -> None:
        self._note_pair(row, source)

    def __call__(self, row: Row) -> Bundle | RowExamples:
        """Raises ValueError for a row that cannot be read, or that holds no token to learn from."""
        sides = split_pair(row, plain=self._encode.prompt_format == "plain")
        if sides.chosen["completion"] == sides.rejected["completion"]:
            return RowExamples([], ("equal_pairs",))
        margin, examples, events = _number(row, "margin"), [], set()
        for side, sign, column in zip(sides, (1, -1), self.reference_columns(row), strict=True):
            example = self._answer(side, events)
            signals: dict[str, np.ndarray] = {SIGN: np.full(len(example.input_ids), sign, np.int32)}
            if margin is not None:
                signals[MARGIN] = np.full(len(example.input_ids), margin, np.float32)
            examples.append(self._with_logps(example._replace(signals=signals), row, column))
        return RowExamples([tuple(examples)], tuple(sorted(events))) if events else tuple(examples)


class LabelEncoder(AnswerEncoder):
    """Answers with a label -> examples, with the signal `label` on all tokens: a pair gives two, labelled 1 and 0.

    With `mismatched` an example is a bundle with another one: its prompt with the answer of the last row before that
    has another prompt, whose label is `MISMATCHED`. KTO estimates its KL divergence from these.
    """

    def __init__(
        self,
        encode: Encoder,
        data: DataSection,
        *,
        score_last: bool = False,
        binary: bool = False,
        mismatched: bool = False,
    ):
        """With `score_last` steps of an answer are scored at their ends. `binary` labels are true or false."""
        super().__init__(encode, data, score_last=score_last)
        self._binary, self._mismatched = binary, mismatched
        self.bundle_size = 2 if mismatched else 1

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {'of another prompt' if self._mismatched else False}"

    def reference_columns(self, row: Row) -> list[str]:
        own = [f"ref_{side}_logps" for side in _SIDES] if row.get("chosen") is not None else ["ref_logps"]
        if not self._mismatched:
            return own
        return [name for column in own for name in (column, column.replace("_logps", "_KL_logps"))]

    def note_ignored(self, row: Row, source: Source) -> None:
        row = {name: value for name, value in row.items() if name not in (*LABEL_COLUMNS, *REFERENCE_COLUMNS)}
        if row.get("chosen") is not None:
            self._note_pair(row, source)
        elif row.keys() & {"messages", "conversations", "completion", "instruction", "text", "input_ids"}:
            self._encode.note_ignored(row, source)

    def more_columns(self, source: Source, row: int) -> Row:
        columns = super().more_columns(source, row)
        if not self._mismatched:
            return columns
        if source.stream is not None or len(source) < 2:
            raise ValueError(
                "the KL divergence of KTO is estimated from answers of other rows, which needs access by index and at "
                "least two rows: use objective.loss=apo_zero, which has none"
            )
        return columns | {_PREVIOUS: self._row_before(source, row)}

    def _row_before(self, source: Source, row: int) -> Row:
        """The last row before `row`, around the start of the source, whose prompt is another: several answers to one
        prompt often follow each other. The one before `row` itself where `row` cannot be read."""
        asked, before = self._asked(source[row]), source[(row - 1) % len(source)]
        for back in range(1, len(source)):
            other = source[(row - back) % len(source)]
            if asked is None or self._asked(other) not in (None, asked):
                return other
        if self._asked(before) is None:
            return before
        raise ValueError(
            "the KL divergence of KTO is estimated from answers to other prompts, and all rows have the same one: use "
            "objective.loss=apo_zero, which has none"
        )

    def _asked(self, row: Row) -> Any:
        """The prompt of a row; None where it cannot be read."""
        try:
            return self._answers(row)[0][0]["prompt"]
        except ValueError:
            return None

    def __call__(self, row: Row) -> Example | Bundle | RowExamples:
        """Raises ValueError for a row that cannot be read, or that holds no token to learn from."""
        if row.get("completions") is not None:
            return self._steps(row)
        answers, events = self._answers(row), set()
        made = [_labelled(self._answer(answer, events), label) for answer, label in answers]
        if self._mismatched:
            others = [answer["completion"] for answer, _ in self._answers(row[_PREVIOUS])][::-1]
            texts = [answer | {"completion": others[n % len(others)]} for n, (answer, _) in enumerate(answers)]
            mismatched = [_labelled(self._answer(text, events), MISMATCHED) for text in texts]
            made = [example for pair in zip(made, mismatched, strict=True) for example in pair]
        columns = self.reference_columns(row)
        made = [self._with_logps(example, row, column) for example, column in zip(made, columns, strict=True)]
        size = self.bundle_size
        items = made if size == 1 else [tuple(made[at : at + size]) for at in range(0, len(made), size)]
        return items[0] if len(items) == 1 and not events else RowExamples(items, tuple(sorted(events)))

    def _answers(self, row: Row) -> list[tuple[Row, float]]:
        """Rows of SFT and their labels."""
        if row.get("chosen") is not None and row.get("rejected") is not None:
            sides = split_pair(row, plain=self._encode.prompt_format == "plain")
            return [(sides.chosen, 1.0), (sides.rejected, 0.0)]
        label = _number(row, "label")
        if label is None:
            raise ValueError("there is no `label`; name it with data.train.columns, e.g. {label: liked}")
        if self._binary and label not in (0, 1):
            raise ValueError(f"label must be true or false, not {row['label']!r:.40}")
        answer = {name: value for name, value in row.items() if name not in ("label", _PREVIOUS, *REFERENCE_COLUMNS)}
        if self._mismatched and (answer.get("prompt") is None or answer.get("completion") is None):
            raise ValueError("this row needs the columns `prompt` and `completion` beside `label`")
        return [(answer, label)]

    def _steps(self, row: Row) -> Example:
        """The example of an answer in steps, scored at the end of each step that has a label."""
        steps, labels = row["completions"], row.get("labels")
        if not self._score_last:
            raise ValueError("`completions` are steps for a process reward model: use objective PointwiseReward")
        if not isinstance(labels, list) or not isinstance(steps, list) or len(labels) != len(steps):
            raise ValueError("`completions` and `labels` must be lists of the same length")
        example, ends = self._encode.steps(row.get("prompt"), steps)
        values, weights = np.zeros((2, len(example.input_ids)), np.float32)
        for end, label in zip(ends, labels, strict=True):
            if label is not None:
                values[end], weights[end] = _number({"labels": label}, "labels"), 1
        if not weights.any():
            raise ValueError("no step has a label")
        return example._replace(loss_weights=weights, signals={LABEL: values})


def answer_encoder(config: RunConfig, encode: Encoder) -> AnswerEncoder:
    """The encoder of recipe preference or reward: of pairs, or of answers with labels, as the objective reads them."""
    score_last, objective = config.recipe == "reward", config.objective
    if SIGN in objective.signals:
        return PairEncoder(encode, config.data, score_last=score_last)
    mismatched = getattr(objective, "mismatched", False)
    return LabelEncoder(encode, config.data, score_last=score_last, binary=not score_last, mismatched=mismatched)


def _labelled(example: Example, label: float) -> Example:
    return example._replace(signals={LABEL: np.full(len(example.input_ids), label, np.float32)})


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    if isinstance(value, str):  # of a CSV file, where everything is text
        with contextlib.suppress(ValueError):
            value = float({"true": "1", "false": "0"}.get(value.lower(), value))
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        raise ValueError(f"{column} must be true, false or a finite number, not {value!r:.40}")
    return float(value)
