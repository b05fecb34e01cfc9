"""Experience: the samples of one rollout as packed rows, with all signals that the updates need."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.objectives.kl import divergence
from jaxtrain.objectives.policy import ENTROPY_COEFFICIENTS, PolicyObjective
from jaxtrain.parallel.batches import host_rows, local_row_shares
from jaxtrain.rl.advantages import Advantages, Outcomes, teacher_terms
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.coefficients import Coefficients
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.pending import PendingRows
from jaxtrain.rl.rollouts import NOT_PACKED, Packed, SampleEncoder, Trajectory, pack_parts
from jaxtrain.rl.teachers import TeacherLogps
from jaxtrain.roles.role import Role
from jaxtrain.types import Batch

T = TypeVar("T")


@dataclass
class Experience:
    """An iterator over the batches of the remaining updates."""

    minibatches: list[Packed]  # one per update of a pass, this process's rows, including signals
    updates: int  # total number of updates: passes times minibatches
    # Of all processes, in outline those of others, in the order of the minibatches; empty after a resume.
    trajectories: list[Trajectory] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)  # after a resume those of `PendingRows`
    deal: Deal = field(default_factory=Deal)
    metrics: dict[str, float] = field(default_factory=dict)
    # Of this process's trajectories: [n] the critic's value of the state after one that was cut off, else 0; and [C] of
    # each the teacher's log-probabilities, if there is a teacher.
    last_values: np.ndarray | None = None
    teacher_logps: list[np.ndarray] = field(default_factory=list)
    estimates: Advantages | None = None  # of all trajectories, where they were estimated before packing
    done: int = 0  # number of completed updates

    def __iter__(self) -> Iterator[Batch]:
        while self.done < self.updates:
            batch = self.minibatches[self.done % len(self.minibatches)].batch
            self.done += 1
            yield batch

    @property
    def in_progress(self) -> bool:
        return 0 < self.done < self.updates

    def add_signal(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Add a signal: an array [B, T] for each minibatch."""
        for number, values in enumerate(arrays):
            packed = self.minibatches[number]
            signals = {**packed.batch.signals, name: values}
            self.minibatches[number] = packed._replace(batch=packed.batch._replace(signals=signals))

    @property
    def own(self) -> list[Trajectory]:
        """The trajectories of this process."""
        return self.deal.own(self.trajectories)

    def spread_signal(self, name: str, values: Sequence[np.ndarray]) -> None:
        """Add a signal: an array [C] for each trajectory of this process."""
        start = 0
        for number, packed in enumerate(self.minibatches):
            self.minibatches[number] = packed.spread(**{name: values[start : start + len(packed.spans)]})
            start += len(packed.spans)

    def gather(self, name: str) -> list[np.ndarray]:
        """A signal's values [C] of each trajectory of this process."""
        return [
            values for packed in self.minibatches for values in packed.gather(np.asarray(packed.batch.signals[name]))
        ]

    def of_all(self, values: Sequence[T]) -> list[T]:
        """A value for each trajectory, from those of every process for its own. All processes call it together."""
        return self.deal.merge(self.trajectories, values)

    def of_own(self, values: Sequence[T]) -> list[T]:
        """The values for the trajectories of this process, from those for all."""
        return [v for v, t in zip(values, self.trajectories, strict=True) if self.deal.owns(t.prompt.number)]

    def pending_rows(self) -> list[PendingRows]:
        """What a run needs that is resumed between the updates."""
        pairs = zip(self.minibatches, self.numbers or self._prompt_numbers(), strict=True)
        return [PendingRows(packed.batch, numbers) for packed, numbers in pairs]

    def _prompt_numbers(self) -> list[np.ndarray]:
        own, made = iter(self.own), []
        for packed in self.minibatches:
            numbers = np.zeros(packed.batch.tokens.shape, np.int32)
            for row, _, stop in packed.spans:
                t = next(own)
                if row != NOT_PACKED:
                    numbers[row, stop - t.length : stop] = 1 + t.prompt.number
            made.append(numbers)
        return made

    @classmethod
    def resumed(cls, rows: Sequence[PendingRows], updates: int, done: int, deal: Deal) -> Experience:
        """The experience of `pending_rows`, with `done` completed updates."""
        packed = [Packed(each.batch, ()) for each in rows]
        return cls(packed, updates, numbers=[each.numbers for each in rows], deal=deal, done=done)


def pack_samples(
    samples: Collected,
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    deal: Deal | None = None,
    weights: Mapping[str, float] | None = None,
    encode: SampleEncoder | None = None,
) -> Experience:
    """Pack the samples into minibatches of rows: contiguous parts, of sizes as equal as possible.

    Every process packs its own samples of each part. Samples that have no gradient because their advantage is 0 are
    left out; the metric `frac_advantage_zero` is their share. `weights`: as in `add_advantages`.
    `encode`: as in `pack_parts`.
    """
    assert config.rl is not None
    deal = deal or Deal.of_run()
    trajectories, estimates, metrics, algorithm = list(samples.trajectories), None, {}, config.algorithm
    router_loss = config.model.router_aux_loss_coef or config.model.router_z_loss_coef  # of all tokens
    if algorithm.zeros_have_no_gradient and not router_loss:
        assert algorithm.advantages is not None
        estimates = algorithm.advantages(_outcomes(trajectories, weights), algorithm.settings)
        zero = [not t.left_out and not a.any() for t, a in zip(trajectories, estimates.advantages, strict=True)]
        trajectories = [t._replace(left_out=t.left_out or none) for t, none in zip(trajectories, zero, strict=True)]
        metrics["frac_advantage_zero"] = float(np.mean(zero))
    count = len(trajectories)
    bounds = np.linspace(0, count, min(config.rl.minibatches, count) + 1).astype(int)
    parts = [deal.own(trajectories[start:stop]) for start, stop in itertools.pairwise(bounds.tolist())]
    minibatches = pack_parts(parts, config.data.tokens_per_row(), row_multiple(config, mesh), encode)
    return Experience(
        minibatches, config.rl.updates, samples.trajectories, deal=deal, metrics=metrics, estimates=estimates
    )


def row_multiple(config: RunConfig, mesh: jax.sharding.Mesh) -> int:
    """The number of rows of a process in a minibatch is a multiple of this."""
    return local_row_shares(mesh) * config.train.microbatches


def score_samples(
    experience: Experience,
    algorithm: Algorithm,
    policy: Role,
    reference: Role | None,
    critic: Role | None,
    teacher: TeacherLogps | None = None,
) -> None:
    """Add the log-probabilities under the policy, the reference and the teacher, and the critic's values, if they are
    needed.

    With a single update the old policy equals the current one, so its log-probabilities are computed only if the reward
    or the teacher's term needs them.
    """
    assert isinstance(algorithm.objective, PolicyObjective)
    start = time.perf_counter()
    temperature = algorithm.objective.temperature
    batches = [packed.batch for packed in experience.minibatches]
    if experience.updates > 1 or algorithm.kl_in_reward or teacher is not None:
        experience.add_signal("old_logps", [host_rows(policy.logps(batch, temperature)) for batch in batches])
    if reference is not None:
        experience.add_signal("ref_logps", [host_rows(reference.logps(batch, temperature)) for batch in batches])
    if teacher is not None:
        own = experience.gather("old_logps")
        experience.teacher_logps = teacher(experience.minibatches, experience.own, temperature, own)
        experience.metrics |= teacher.metrics
    if critic is not None:
        experience.add_signal("values", [host_rows(critic.values(batch)) for batch in batches])
    if critic is not None and algorithm.bootstrap:
        after = [packed.gather(host_rows(critic.rewards(packed.batch))) for packed in experience.minibatches]
        pairs = zip(itertools.chain(*after), experience.own, strict=True)
        experience.last_values = np.array([values[-1] if t.truncated and len(values) else 0 for values, t in pairs])
    experience.metrics["time/logps"] = time.perf_counter() - start


def add_advantages(
    experience: Experience,
    algorithm: Algorithm,
    weights: Mapping[str, float] | None = None,
    coefficients: Coefficients | None = None,
) -> None:
    """Add the advantages, the critic's returns, and the coefficients of an entropy bonus with a target.

    The teacher's terms are added to the advantages of the rewards.

    `weights`: of the parts of a reward; 1 where not given. `coefficients` of this rollout become those of the next.
    """
    trajectories, objective, last_values = experience.trajectories, algorithm.objective, experience.last_values
    assert algorithm.advantages is not None and isinstance(objective, PolicyObjective)
    coefficients = coefficients or Coefficients.initial(objective)
    entropy = _entropy(trajectories)
    estimates = experience.estimates
    if estimates is None:
        outcomes = _outcomes(trajectories, weights)
        if algorithm.kl_in_reward:
            outcomes = outcomes._replace(penalties=_penalties(experience, algorithm, coefficients.beta))
        if algorithm.critic:
            outcomes = outcomes._replace(
                values=experience.of_all(experience.gather("values")),
                last_values=None if last_values is None else np.array(experience.of_all(list(last_values))),
            )
        estimates = algorithm.advantages(outcomes, algorithm.settings)
    if algorithm.teacher_coefficient:
        pairs = zip(estimates.advantages, _teacher_terms(experience, algorithm), strict=True)
        estimates = estimates._replace(advantages=[of_rewards + term for of_rewards, term in pairs])
    experience.spread_signal("advantages", experience.of_own(estimates.advantages))
    if estimates.returns is not None:
        experience.spread_signal("returns", experience.of_own(estimates.returns))
    if ENTROPY_COEFFICIENTS in objective.signals:
        coefficient = objective.coefficient_at(entropy, coefficients.entropy)
        constant = [np.full(len(a), coefficient, np.float32) for a in estimates.advantages]
        experience.spread_signal(ENTROPY_COEFFICIENTS, experience.of_own(constant))
        experience.metrics["entropy_coefficient"] = coefficient
    if any(t.trained_mask.any() for t in trajectories):
        coefficients.update(objective, experience.metrics.get("kl", 0.0), entropy)
    experience.trajectories = [
        t._replace(advantages=a) for t, a in zip(trajectories, estimates.advantages, strict=True)
    ]


def _outcomes(trajectories: Sequence[Trajectory], weights: Mapping[str, float] | None) -> Outcomes:
    """The results of rewards and environments for the trajectories; `weights` of the parts of a reward."""
    zeros = [np.zeros(len(t.completion_ids)) for t in trajectories]
    names = sorted({name for t in trajectories for name in t.rewards})
    return Outcomes(
        rewards=np.array([t.reward for t in trajectories]),
        groups=np.array([t.prompt.number for t in trajectories]),
        masks=[t.trained_mask for t in trajectories],
        token_rewards=[
            zero if t.token_rewards is None else t.token_rewards for t, zero in zip(trajectories, zeros, strict=True)
        ],
        penalties=zeros,
        parts={name: np.array([t.rewards.get(name, np.nan) for t in trajectories]) for name in names},
        weights={name: (weights or {}).get(name, 1.0) for name in names},
    )


def _teacher_terms(experience: Experience, algorithm: Algorithm) -> list[np.ndarray]:
    """Those of every trajectory; the metric `reverse_kl` becomes the mean of log p - log q over the trained tokens."""
    pairs = zip(experience.teacher_logps, experience.gather("old_logps"), strict=True)
    log_ratios, masks = experience.of_all([q - p for q, p in pairs]), [t.trained_mask for t in experience.trajectories]
    tokens = sum(int(mask.sum()) for mask in masks)
    total = sum(float(ratio[mask].sum(dtype=np.float64)) for ratio, mask in zip(log_ratios, masks, strict=True))
    experience.metrics["reverse_kl"] = -total / max(tokens, 1)
    coefficient, discount = algorithm.teacher_coefficient, algorithm.teacher_discount
    return teacher_terms(log_ratios, masks, coefficient=coefficient, discount=discount)


def _penalties(experience: Experience, algorithm: Algorithm, beta: float) -> list[np.ndarray]:
    """beta times the KL estimate of every token that is trained; its mean becomes the metric `kl`."""
    objective, trajectories = algorithm.objective, experience.trajectories
    assert isinstance(objective, PolicyObjective)
    pairs = zip(experience.gather("old_logps"), experience.gather("ref_logps"), experience.own, strict=True)
    own = [np.asarray(divergence(objective.kl, old, ref)) * t.trained_mask for old, ref, t in pairs]
    kls = experience.of_all(own)
    tokens = sum(int(t.trained_mask.sum()) for t in trajectories)
    experience.metrics["kl"] = float(sum(kl.sum() for kl in kls)) / max(tokens, 1)
    if objective.kl_target is not None:
        experience.metrics["kl_coefficient"] = beta
    return [beta * kl for kl in kls]


def _entropy(trajectories: Sequence[Trajectory]) -> float:
    """The mean entropy of the sampling distribution, estimated by the mean of -log p of the sampled tokens."""
    logps = np.concatenate([t.sampler_logps[t.trained_mask] for t in trajectories])
    return float(-logps.mean(dtype=np.float64)) if len(logps) else 0.0
