"""Samples in the tokens of a teacher with another tokenizer, for on-policy distillation by its log-probabilities."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxtrain.data.aligned import teacher_encoder
from jaxtrain.data.alignment import Aligner, Groups
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.tokens import encode, without_limits
from jaxtrain.data.turn_ends import turn_end_ids
from jaxtrain.rl.privileged import PrivilegedPrompts
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.roles.role import Role
from jaxtrain.session.session import Session
from jaxtrain.session.teacher import needed_tokenizers


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


def translation(session: Session, role: Role) -> tuple[Translation, Callable[[Prompt], Prompt]]:
    """Of the samples, and of their prompts, for the teacher of a run with `teacher.aligned`.

    Raises ValueError for tokenizers that cannot be aligned, and for filtered sampling, whose distributions the teacher
    does not have.
    """
    config, section = session.config, session.config.teacher
    assert section is not None
    for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        if (value := getattr(config.sampling, name)) != off:
            raise ValueError(
                f"sampling.{name}={value} filters the student's tokens, and with teacher.aligned the teacher has "
                f"others: leave {name} out"
            )
    encoder = teacher_encoder(role.tokenizer, config.data, vocab_size=role.model.config.vocab_size)
    read: Callable[[Prompt], Prompt] = TeacherPrompts(encoder)
    if section.privileged_prompt is not None:
        read = PrivilegedPrompts(section.privileged_prompt, encoder)
    return Translation(Aligner(*needed_tokenizers(session, role)), role), read
