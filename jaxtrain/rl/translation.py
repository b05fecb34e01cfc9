"""Samples in the tokens of a teacher with another tokenizer, for on-policy distillation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.config import TeacherSection
from jaxtrain.data.aligned import aligned_example
from jaxtrain.data.alignment import Aligner, Groups
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.packing import SignalTypes
from jaxtrain.data.tokens import encode, without_limits
from jaxtrain.data.turn_ends import turn_end_ids
from jaxtrain.rl.privileged import PrivilegedPrompts
from jaxtrain.rl.rollouts import Prompt, Trajectory, tokens_example
from jaxtrain.roles.role import Role
from jaxtrain.session.teacher import SharedText
from jaxtrain.types import ALIGNED, Example


class Translated(NamedTuple):
    trajectory: Trajectory  # with the teacher's tokens as its completion
    groups: Groups


class Translation:
    """Callable: a sample's text in the teacher's tokens, and the groups of both that write the same.

    A special token that ended the completion becomes the teacher's own end of a turn. Text that the teacher cannot read
    is in no group: bytes that are no UTF-8, such as half of a character, with what follows them, and a completion whose
    text its tokenizer changes.
    """

    def __init__(self, aligner: Aligner, teacher: Role):
        self._aligner, self._backend = aligner, without_limits(teacher.tokenizer)
        self._end = [*turn_end_ids(teacher.tokenizer), teacher.tokenizer.eos_token_id][0]

    def __call__(self, t: Trajectory) -> Translated:
        written = self._aligner.written(t.completion_ids)
        found = encode(self._backend, written.text, add_special_tokens=False).ids
        ids = np.array([*found, *[self._end] * written.ended], np.int32)
        try:
            groups = self._aligner.ids(t.completion_ids[: written.tokens], ids)
        except ValueError:
            groups = Groups.none()
        return Translated(t.with_completion(ids), groups)


class TeacherPrompts:
    """Callable: a prompt as the teacher reads it, under its own chat template."""

    def __init__(self, encode: RowEncoder):
        self._encode = encode

    def __call__(self, prompt: Prompt) -> Prompt:
        ids, _ = self._encode.question(dict(prompt.columns))
        return prompt._replace(ids=ids.astype(np.int32))


class AlignedSamples:
    """A `SampleEncoder` for `ULD` and `GOLD`: the examples that recipe distill makes of rows with the samples' texts.

    What the teacher reads is cut to `max_length` tokens; a group that the cut goes through is left out.
    """

    types: SignalTypes = dict.fromkeys(ALIGNED, (np.dtype(np.int32), ()))

    def __init__(self, translate: Translation, read: Callable[[Prompt], Prompt], max_length: int):
        """`read`: gives a prompt as the teacher reads it."""
        self._translate, self.read, self._max_length = translate, read, max_length

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        pairs = zip(trajectories, as_read(self.read, trajectories), strict=True)
        return [self._example(t, self._translate(reading)) for t, reading in pairs]

    def _example(self, t: Trajectory, translated: Translated) -> Example:
        starts = len(t.prompt.ids), len(translated.trajectory.prompt.ids)
        groups = Groups(*(side + start for side, start in zip(translated.groups, starts, strict=True)))
        teacher_ids = tokens_example(translated.trajectory).input_ids[: self._max_length]
        return aligned_example(tokens_example(t), teacher_ids, groups.within(self._max_length))


def as_read(read: Callable[[Prompt], Prompt], trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories with the prompts that a teacher reads, each made once for its group; those that are left out
    keep theirs."""
    prompts = {t.prompt.number: t.prompt for t in trajectories if not t.left_out}
    made = {number: read(prompt) for number, prompt in prompts.items()}
    return [t._replace(prompt=made.get(t.prompt.number, t.prompt)) for t in trajectories]


def translation(
    text: SharedText, teacher: Role, section: TeacherSection
) -> tuple[Translation, Callable[[Prompt], Prompt]]:
    """Of the samples, and of their prompts, for a teacher with another tokenizer."""
    read: Callable[[Prompt], Prompt] = TeacherPrompts(text.encode)
    if section.privileged_prompt is not None:
        read = PrivilegedPrompts(section.privileged_prompt, text.encode)
    return Translation(text.aligner, teacher), read
