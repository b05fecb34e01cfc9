"""The teacher of distillation: a frozen model whose hidden states and head, or probabilities, the step reads."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.config import ModelSection
from jaxtrain.data.aligned import AlignedEncoder, teacher_encoder
from jaxtrain.data.alignment import Aligner
from jaxtrain.objectives.objective import TEACHER_FURTHER, TEACHER_HIDDEN, TopLogps
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import MatchedHead, match_vocabularies
from jaxtrain.parallel.batches import move_batch
from jaxtrain.parallel.sharding import RULES, param_specs, with_shardings
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.session.roles import RunRoles
from jaxtrain.session.session import Session
from jaxtrain.types import TEACHER_PROBS, Batch


class HiddenStates:
    """Adds the hidden states of the teacher to placed batches, and gives the student's steps its head.

    The teacher's forward pass runs once for a whole batch, before the student's step, without a gradient.
    """

    def __init__(self, session: Session, student: TrainedRole):
        """Raises ValueError for a teacher with other token ids than the student."""
        self._student, self._preset = student, session.config.mesh.preset
        self.encode = session.encoder(student)
        self.role = teacher_role(session)
        check_same_ids(session, student, self.role)

    def load(self) -> None:
        """Read the teacher's weights."""
        self.role.load()
        self._student.teacher_head = on_mesh(self.role.head(), self._student.mesh, self._preset)

    def __call__(self, batch: Batch) -> Batch:
        hidden = move_batch(self.role.hidden(batch), self._student.mesh)
        return batch._replace(signals={**batch.signals, TEACHER_HIDDEN: hidden})


class SharedText:
    """What student and teacher have in common if their tokenizers differ: `tokenizers` of both, an `aligner` of their
    tokens, and the teacher's encoder, `encode`."""

    def __init__(self, session: Session, teacher: Role):
        """Raises ValueError where a tokenizer is missing, and for tokenizers that cannot be aligned."""
        self.tokenizers = mine, other = session.tokenizer, teacher.tokenizer
        for key, tokenizer in (("model.tokenizer", mine), ("teacher.path", other)):
            if tokenizer is None:
                raise ValueError(f"{key}: there is no tokenizer, by which student and teacher are aligned")
        self.encode = teacher_encoder(other, session.config.data, vocab_size=teacher.model.config.vocab_size)
        self.aligner = Aligner(mine, other)


class AlignedTeacher:
    """A teacher with another tokenizer, whose tokens are a signal of the batch.

    It runs once for a whole batch, in the rows and segments of the student's, and what it finds is carried to the
    student's tokens by their groups (`data.alignment`).
    """

    def __init__(self, session: Session, student: TrainedRole):
        """Raises ValueError for tokenizers that cannot be aligned."""
        self._session, self._student = session, student
        self.role = teacher_role(session)
        self.tokens = SharedText(session, self.role)
        self._sizes = [role.model.config.vocab_size for role in (student, self.role)]

    @cached_property
    def encode(self) -> AlignedEncoder:
        """Of rows. Raises ValueError for a `data.overlong` that cuts the tokens of both at different places."""
        student, data = self._session.encoder(self._student), self._session.config.data
        return AlignedEncoder(student, self.tokens.encode, self.tokens.aligner, data)

    def load(self) -> None:
        """Read the teacher's weights."""
        self.role.load()


class RankedTeacher(AlignedTeacher):
    """Adds the teacher's largest probabilities to placed batches, for `ULD`."""

    def __init__(self, session: Session, student: TrainedRole):
        """Raises ValueError also for an objective of more ranks than a vocabulary has."""
        super().__init__(session, student)
        ranks = [request.k for request in session.config.objective.needs if isinstance(request, TopLogps)]
        if len(ranks) != 1:
            raise ValueError(f"an objective with the signal {TEACHER_PROBS} must also need the score TopLogps")
        (self._k,) = ranks
        if self._k > min(self._sizes):
            raise ValueError(f"objective.top_k={self._k} is more than the {min(self._sizes)} tokens of a vocabulary")

    def __call__(self, batch: Batch) -> Batch:
        probs = move_batch(self.role.group_probs(batch, self._k), self._student.mesh)
        return batch._replace(signals={**batch.signals, TEACHER_PROBS: probs})


class MatchedTeacher(AlignedTeacher):
    """Adds the teacher's states to placed batches, and gives the student's steps its head, for `GOLD`."""

    def __init__(self, session: Session, student: TrainedRole):
        """Raises ValueError also where no token is in both vocabularies."""
        super().__init__(session, student)
        self._preset = session.config.mesh.preset
        mine, other = (tokenizer.get_vocab() for tokenizer in self.tokens.tokenizers)
        self._ids = match_vocabularies(mine, other, *self._sizes)
        if not len(self._ids.student):
            raise ValueError("no token is in both vocabularies, which GOLD compares: use objective.name=ULD")

    def load(self) -> None:
        """Read the teacher's weights."""
        super().load()
        mesh = self._student.mesh
        ids = jax.device_put(self._ids, NamedSharding(mesh, PartitionSpec()))
        self._student.teacher_head = MatchedHead(on_mesh(self.role.head(), mesh, self._preset), ids)

    def __call__(self, batch: Batch) -> Batch:
        states = self.role.group_states(batch)
        found = {TEACHER_HIDDEN: states.hidden, TEACHER_FURTHER: states.further}
        moved = {name: move_batch(array, self._student.mesh) for name, array in found.items()}
        return batch._replace(signals={**batch.signals, **moved})


BatchTeacher = HiddenStates | RankedTeacher | MatchedTeacher
"""Adds what an objective compares the student with to placed batches; it is loaded separately."""


def batch_teacher(session: Session, student: TrainedRole) -> BatchTeacher:
    """The one that gives the signals of the run's objective, declared. Raises ValueError as its class does."""
    aligned = {TEACHER_PROBS: RankedTeacher, TEACHER_FURTHER: MatchedTeacher}
    kinds = (aligned[name] for name in session.config.objective.signals if name in aligned)
    return next(kinds, HiddenStates)(session, student)


def teacher_role(roles: RunRoles) -> Role:
    """The model of `teacher.path`, declared and not loaded, on its own devices if it has any."""
    section = roles.config.teacher
    assert section is not None
    mine = roles.config.model  # of which the teacher has what does not depend on the architecture
    model = ModelSection(
        path=section.path,
        compute_dtype=mine.compute_dtype,
        param_dtype=section.param_dtype or mine.compute_dtype,
        attention=mine.attention,
        vocab_multiple=mine.vocab_multiple,
    )
    return roles.role("teacher", model, roles.frozen_mesh(section.devices) if section.devices else None)


def check_same_ids(session: Session, student: TrainedRole, teacher: Role) -> None:
    """Raise ValueError unless a token id means the same to both; the vocabularies may be padded differently."""
    sizes = [role.model.config.vocab_size for role in (student, teacher)]
    mine, other = session.tokenizer, teacher.tokenizer
    if mine is None or other is None:
        if sizes[0] != sizes[1]:
            raise ValueError(f"teacher.path: its vocabulary has {sizes[1]} tokens, and the student's has {sizes[0]}")
        return
    if mine.get_vocab() != other.get_vocab():
        differing = sorted(mine.get_vocab().items() ^ other.get_vocab().items(), key=lambda item: item[1])
        raise ValueError(
            f"teacher.path={teacher.section.path} has another tokenizer than the student: {len(differing)} entries "
            f"differ, such as {differing[0]}. A divergence needs equal token ids; recipe distill needs none "
            "with objective.name=ULD or GOLD, and recipe rl with teacher.aligned=true or rl.algorithm=gold or uld"
        )
    if len(mine) > min(sizes):
        raise ValueError(f"the tokenizer has {len(mine)} tokens, and one of the models has only {min(sizes)}")


def on_mesh(head: Head, mesh: jax.sharding.Mesh, preset: str) -> Head:
    """The head on the devices of `mesh`, sharded as a student's is. Copies nothing that is there already. A head
    may be of shapes only."""
    axes = ("vocab", "embed") if head.transposed else ("embed", "vocab")
    shapes = {"teacher's head": head.weight}
    (sharding,) = param_specs({"teacher's head": axes}, shapes, RULES[preset], mesh).values()
    if isinstance(head.weight, jax.ShapeDtypeStruct):
        return replace(head, weight=with_shardings(head.weight, sharding))
    return replace(head, weight=jax.device_put(head.weight, sharding))
