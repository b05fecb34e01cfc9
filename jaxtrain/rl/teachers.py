"""Teachers of samples: on-policy distillation, and self-distillation with a privileged prompt.

The student samples, and a frozen teacher scores the same tokens: by their log-probabilities, which become advantages,
or by its distributions, which a divergence compares with the student's (`session.teacher.BatchTeacher`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TeacherSection
from jaxtrain.config.rl_parts import PlacementSection
from jaxtrain.data.alignment import Groups, group_log_ratios
from jaxtrain.parallel.batches import host_rows, local_row_shares
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.evaluator import held_out_questions
from jaxtrain.rl.placement import trainer_devices
from jaxtrain.rl.privileged import privileged_prompts
from jaxtrain.rl.rollouts import (
    SUPPORTS,
    Packed,
    Prompt,
    SampleEncoder,
    Sampler,
    TokensAlone,
    Trajectory,
    pack_parts,
)
from jaxtrain.rl.translation import AlignedSamples, Translation, as_read, translation
from jaxtrain.roles.reference import reference_role
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.sample.requests import SamplingParams
from jaxtrain.session.reference import policy_devices
from jaxtrain.session.session import MetricValues, Session
from jaxtrain.session.teacher import (
    AlignedTeacher,
    BatchTeacher,
    HiddenStates,
    SharedText,
    batch_teacher,
    check_same_ids,
    teacher_role,
)
from jaxtrain.train.agree import gather_values
from jaxtrain.train.evaluate import evaluate, make_eval_step


class TeacherLogps:
    """Callable: the teacher's log-probabilities of the tokens of samples.

    A teacher with another tokenizer does not know the student's tokens. It returns the student's log-probabilities plus
    log q - log p of the token's group, spread over the group (`data.alignment.group_log_ratios`), and the student's own
    in no group. `metrics` then has `teacher_aligned`, the share of the samples' tokens that are in a group.
    """

    def __init__(
        self,
        role: Role,
        row_length: int,
        read: Callable[[Prompt], Prompt] | None = None,
        translate: Translation | None = None,
    ):
        """`read`: gives a prompt as the teacher reads it; default: the student's. `translate`: for a teacher with
        another tokenizer, which needs `read` as well.
        """
        self._role, self._row_length, self.read, self._translate = role, row_length, read, translate
        self.metrics: dict[str, float] = {}  # of the last call

    def __call__(
        self,
        packed: Sequence[Packed],
        trajectories: Sequence[Trajectory],
        temperature: float,
        own: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """[C] float32 of each trajectory, over its supports if it has them; those that are left out do not count.

        All processes call it together, each with its own trajectories.

        `packed`: the trajectories, in this order. They are packed again if the teacher reads other prompts or other
        tokens, or if its devices cannot share these rows. `own`: the student's log-probabilities [C] of each.

        Raises ValueError for a token that the teacher does not know.
        """
        shares, sizes = local_row_shares(self._role.model.run.mesh), [len(each.spans) for each in packed]
        if self._translate is not None:
            translated = [self._translate(t) for t in trajectories]
            again = self._packed_again(sizes, [each.trajectory for each in translated], shares)
            groups = [each.groups for each in translated]
            return self._relative(trajectories, groups, own, self._scored(again, temperature))
        self._check_ids(trajectories)
        if self.read is not None or any(len(each.batch.tokens) % shares for each in packed):
            packed = self._packed_again(sizes, trajectories, shares)
        return self._scored(packed, temperature)

    def _relative(
        self,
        trajectories: Sequence[Trajectory],
        groups: Sequence[Groups],
        own: Sequence[np.ndarray],
        theirs: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        found, aligned, tokens = [], 0, 0
        for t, of_both, mine, other in zip(trajectories, groups, own, theirs, strict=True):
            if not t.left_out:
                mine = mine + group_log_ratios(of_both, mine, other)
                aligned += int((of_both.student[:, 1] - of_both.student[:, 0]).sum())
                tokens += len(mine)
            found.append(mine)
        of_all = np.sum(gather_values((aligned, tokens)), 0)
        self.metrics = {"teacher_aligned": float(of_all[0] / max(of_all[1], 1))}
        return found

    def _scored(self, packed: Sequence[Packed], temperature: float) -> list[np.ndarray]:
        scored = [each.gather(host_rows(self._role.logps(each.batch, temperature))) for each in packed]
        return [values for part in scored for values in part]

    def _packed_again(self, sizes: Sequence[int], trajectories: Sequence[Trajectory], shares: int) -> list[Packed]:
        """Rows are as long as the student's, or a power of two times that for the sake of longer prompts, so that few
        programs are compiled."""
        if self.read is not None:
            trajectories = as_read(self.read, trajectories)
        longest = max(gather_values(max((t.length for t in trajectories if not t.left_out), default=0)))
        length = self._row_length
        while length < longest:
            length *= 2
        bounds = np.cumsum([0, *sizes]).tolist()
        parts = [trajectories[start:stop] for start, stop in itertools.pairwise(bounds)]
        return [_with_supports_alone(each) for each in pack_parts(parts, length, shares)]

    def _check_ids(self, trajectories: Sequence[Trajectory]) -> None:
        size = self._role.model.config.vocab_size
        for t in trajectories:
            if len(t.completion_ids) and (largest := int(t.completion_ids.max())) >= size:
                raise ValueError(
                    f"the student sampled token {largest}, and the teacher's vocabulary has {size}: it has no "
                    "probability of it"
                )


def _with_supports_alone(packed: Packed) -> Packed:
    signals = {name: array for name, array in packed.batch.signals.items() if name == SUPPORTS}
    return packed._replace(batch=packed.batch._replace(signals=signals))


def student_devices(
    placement: PlacementSection, teacher: TeacherSection | None, devices: Sequence[Any] | None = None
) -> Sequence[Any]:
    """The devices that train: those of `trainer_devices`, without those of `teacher.devices`. Raises ValueError."""
    trainer = trainer_devices(placement, devices)
    return policy_devices(teacher, devices) if teacher is not None and teacher.devices else trainer


def make_teacher(session: Session, policy: TrainedRole) -> TeacherLogps | BatchTeacher:
    """The teacher of `teacher.path`, loaded, or the model that the run starts from; `policy` is restored.

    Raises ValueError for one with other token ids, or on devices that cannot share the rows of a `BatchTeacher`.
    """
    config, section = session.config, session.config.teacher
    assert section is not None
    if config.algorithm.advantages is None:
        teacher = batch_teacher(session, policy)
        rows, shares = row_shares(policy.mesh) * config.train.microbatches, row_shares(teacher.role.mesh)
        if rows % shares:
            raise ValueError(
                f"teacher.devices={section.devices}: a step has a multiple of {rows} rows, the student's devices times "
                f"train.microbatches, which {shares} devices cannot share"
            )
        teacher.load()
        return teacher
    if section.path is None and not section.devices:
        role = reference_role(policy)  # which shares the frozen weights under LoRA
    else:
        if section.path is None:
            role = session.role("teacher", policy.section, session.frozen_mesh(section.devices))
        else:
            role = teacher_role(session)
            if not section.aligned:
                check_same_ids(session, policy, role)
        role.load()
    length = config.data.tokens_per_row()
    if section.aligned:
        _check_unfiltered(config.sampling)
        translate, read = translation(SharedText(session, role), role, section)
        return TeacherLogps(role, length, read, translate)
    return TeacherLogps(role, length, privileged_prompts(session, policy))


def _check_unfiltered(sampling: SamplingParams) -> None:
    for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        if (value := getattr(sampling, name)) != off:
            raise ValueError(
                f"sampling.{name}={value} filters the student's tokens, and with teacher.aligned the teacher has "
                f"others: leave {name} out"
            )


def sample_encoder(session: Session, teacher: TeacherLogps | BatchTeacher | None) -> SampleEncoder | None:
    """What the batches of a run hold of its samples; None: the signals of a policy objective."""
    section = session.config.teacher
    if isinstance(teacher, HiddenStates):
        return TokensAlone()
    if not isinstance(teacher, AlignedTeacher):
        return None
    assert section is not None
    return AlignedSamples(*translation(teacher.tokens, teacher.role, section), session.config.data.max_length)


def held_out_teacher(
    session: Session,
    policy: TrainedRole,
    sampler: Sampler,
    teacher: TeacherLogps | BatchTeacher,
    encode: SampleEncoder | None,
) -> Callable[[], MetricValues] | None:
    """An evaluator on one sample of each of the first `eval.generate` prompts, drawn as those of the training are.

    It has `eval_reverse_kl`, the mean of log p - log q over the sampled tokens; or the means of the objective's
    metrics, such as `eval_divergence`. None without `eval.generate`. `encode`: of `sample_encoder`.

    Raises ValueError for a prompt that the teacher cannot read, such as one whose row has no column that the template
    of the privileged ones names.
    """
    config = session.config
    assert config.rl is not None
    limit = config.data.max_length - config.rl.max_completion_length
    prompts = held_out_questions(session, session.encoder(policy), limit)
    if not prompts:
        return None
    read = getattr(teacher if isinstance(teacher, TeacherLogps) else encode, "read", None)
    if read is not None:
        for prompt in prompts:
            read(prompt)
    eval_step = jax.jit(make_eval_step(policy.model, config.objective))
    deal = Deal.of_run(config.rl.placement.processes_per_engine)

    def evaluate_samples() -> MetricValues:
        sampler.set_params(*policy.snapshot())
        trajectories = deal.sample(sampler, prompts, 1)
        (packed,) = pack_parts([trajectories], config.data.tokens_per_row(), local_row_shares(policy.mesh), encode)
        if not isinstance(teacher, TeacherLogps):
            batch = teacher(policy.place(packed.batch))

            def step(params, frozen, batch):
                return eval_step(params, frozen, batch, policy.teacher_head)

            return evaluate(step, policy.state.params, policy.frozen, {"": [batch]})
        temperature = config.objective.temperature
        own = packed.gather(host_rows(policy.logps(packed.batch, temperature)))
        theirs = teacher([packed], trajectories, temperature, own)
        triples = zip(own, theirs, trajectories, strict=True)
        parts = gather_values([(p - q)[t.loss_mask] for p, q, t in triples])
        gaps = np.concatenate([gap for part in parts for gap in part])
        return {"eval_reverse_kl": float(gaps.mean(dtype=np.float64)) if len(gaps) else 0.0}

    return evaluate_samples
