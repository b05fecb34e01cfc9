"""Examples for a student and a teacher with different tokenizers: each row in the tokens of both, and their groups."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.config import DataSection
from jaxtrain.data.alignment import Aligner, Groups
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.columns import Row, row_format
from jaxtrain.data.encoder import EvalPrompt, RowEncoder
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import Overlong, RowExamples, fit
from jaxtrain.data.sources import Source
from jaxtrain.types import GROUP_PLACE, TEACHER_PLACE, TEACHER_SHIFT, TEACHER_TOKENS, Array, Example

log = logging.getLogger(__name__)


def teacher_encoder(tokenizer: PreTrainedTokenizerFast, data: DataSection, *, vocab_size: int) -> Encoder:
    """The encoder of a teacher with a tokenizer of its own. Its chat template may have other arguments than the
    student's, for which `data.chat_template_kwargs` are: those that it does not read are left out, with a warning.
    """
    unread = data.chat_template_kwargs.keys() - ChatTokenizer(tokenizer).reads if data.chat_template_kwargs else set()
    if unread:
        log.warning(
            "the teacher's chat template does not read %s of data.chat_template_kwargs: the student's alone gets them",
            ", ".join(sorted(unread)),
        )
        kept = {name: value for name, value in data.chat_template_kwargs.items() if name not in unread}
        data = data.model_copy(update={"chat_template_kwargs": kept})
    return Encoder.configured(tokenizer, data, vocab_size=vocab_size)


class AlignedEncoder(RowEncoder):
    """The student's examples with the signals `teacher_tokens`, `group_place`, `teacher_place` and `teacher_shift`.

    An example has as many places as the longer of its two tokenisations; the shorter one is followed by tokens without
    a weight, which no token before them sees. Both are cut to `data.max_length`; a group that the cut goes through is
    left out.
    """

    def __init__(self, student: Encoder, teacher: Encoder, aligner: Aligner, data: DataSection):
        """Raises ValueError for a `data.overlong` that cuts the two at different places of the text."""
        if data.overlong not in ("truncate", "drop"):
            raise ValueError(
                f"data.overlong={data.overlong} would cut the tokens of student and teacher at different places of the "
                "text: with a teacher of another tokenizer choose truncate or drop"
            )
        self._student, self._teacher, self._aligner = student, teacher, aligner
        self._max_length = data.max_length
        self._overlong: Overlong = data.overlong

    @property
    def fingerprint(self) -> str:
        settings = type(self).__name__, self._max_length, self._overlong
        text = repr((*settings, self._student.fingerprint, self._teacher.fingerprint))
        return hashlib.sha256(text.encode()).hexdigest()

    def note_ignored(self, row: Row, source: Source) -> None:
        self._student.note_ignored(row, source)

    def prompt(self, row: Row) -> EvalPrompt:
        return self._student.prompt(row)

    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        return self._student.question(row)

    def __call__(self, row: Row) -> RowExamples:
        """Raises ValueError for a row that cannot be read under one of the tokenizers, or whose answers differ."""
        if row_format(row) == "input_ids":
            raise ValueError("this row holds token ids, which a teacher with another tokenizer cannot read: give text")
        student = _examples(self._student(row))
        try:
            teacher = _examples(self._teacher(row)).items
        except ValueError as error:
            raise ValueError(f"under the teacher's tokenizer and chat template: {error}") from error
        if len(student.items) != len(teacher):
            raise ValueError(
                f"the row makes {len(student.items)} examples under the student's chat template, and {len(teacher)} "
                "under the teacher's"
            )
        items, events = [], set(student.events)
        for mine, other in zip(student.items, teacher, strict=True):
            fitted = fit(self._joined(mine, other), self._max_length, self._overlong)
            items += fitted.items
            events |= set() if fitted.event is None else {fitted.event}
        return RowExamples(items, tuple(sorted(events)))

    def _joined(self, student: Example, teacher: Example) -> Example:
        groups = self._aligner.examples(student, teacher).within(self._max_length)
        return aligned_example(student, teacher.input_ids, groups)


def aligned_example(student: Example, teacher_ids: Array, groups: Groups) -> Example:
    """The student's tokens and weights, with the signals `types.ALIGNED`: as long as the longer of both tokenisations.

    `teacher_ids` [m]: the whole text in the teacher's tokens. `groups`: their places in both.
    """
    length = max(len(student.input_ids), len(teacher_ids))
    shift = np.zeros(length, np.int32)
    shift[groups.student[:, 0]] = groups.teacher[:, 0] - groups.student[:, 0]
    places = Groups(*(_places(side, length) for side in groups))
    return Example(
        _padded(student.input_ids, length),
        _padded(student.loss_weights, length),
        {
            TEACHER_TOKENS: _padded(teacher_ids, length),
            GROUP_PLACE: places.student,
            TEACHER_PLACE: places.teacher,
            TEACHER_SHIFT: shift,
        },
    )


def _examples(made: Example | RowExamples) -> RowExamples:
    return made if isinstance(made, RowExamples) else RowExamples([made])


def _places(spans: np.ndarray, length: int) -> np.ndarray:
    """At every token its place in the group that it is in, from 1 on; 0 in none."""
    places = np.zeros(length, np.int32)
    for start, stop in spans:
        places[start:stop] = np.arange(1, stop - start + 1)
    return places


def _padded(values: Array, length: int) -> np.ndarray:
    return np.pad(np.asarray(values), (0, length - len(values)))
