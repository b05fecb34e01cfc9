"""Experience: one rollout's samples as packed rows with every signal that the updates on them read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.objectives.kl import divergence
from jaxtrain.objectives.policy import ENTROPY_COEFFICIENTS
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.rl.advantages import Outcomes
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.rollouts import Packed, Trajectory, pack_parts
from jaxtrain.roles.role import Role
from jaxtrain.types import Batch


@dataclass
class Experience:
    """Iterates over the batches that are still to be trained on, and counts them."""

    minibatches: list[Packed]  # one per update of a pass, this host's rows, signals included
    updates: int  # optimizer steps in all: passes times minibatches
    trajectories: list[Trajectory] = field(default_factory=list)  # in the order of the rows; empty after a resume
    metrics: dict[str, float] = field(default_factory=dict)
    done: int = 0  # updates taken

    def __iter__(self) -> Iterator[Batch]:
        while self.done < self.updates:
            batch = self.minibatches[self.done % len(self.minibatches)].batch
            self.done += 1
            yield batch

    @property
    def in_progress(self) -> bool:
        return 0 < self.done < self.updates

    def add_signal(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Add a signal to all minibatches: an array [B, T] for each."""
        for number, values in enumerate(arrays):
            packed = self.minibatches[number]
            signals = {**packed.batch.signals, name: values}
            self.minibatches[number] = packed._replace(batch=packed.batch._replace(signals=signals))

    def spread_signal(self, name: str, values: Sequence[np.ndarray]) -> None:
        """Add a signal: an array [C] for each trajectory."""
        at = 0
        for number, packed in enumerate(self.minibatches):
            self.minibatches[number] = packed.spread(**{name: values[at : at + len(packed.spans)]})
            at += len(packed.spans)

    def gather(self, name: str) -> list[np.ndarray]:
        """A signal's values [C] of each trajectory."""
        return [values for packed in self.minibatches for values in packed.gather(packed.batch.signals[name])]

    def save(self, path: Path) -> None:
        """Write what a resumed run needs to go on in the middle of the updates, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{number}.{name}": array
            for number, packed in enumerate(self.minibatches)
            for name, array in packed.batch.arrays().items()
        }
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, updates: int, done: int) -> Experience:
        """What `save` wrote, after `done` of the updates. Raises ValueError where the file is missing."""
        if not path.is_file():
            raise ValueError(f"{path} is missing: it holds the samples that the newest checkpoint is in the middle of")
        minibatches: dict[int, dict[str, np.ndarray]] = {}
        with np.load(path) as stored:
            for key, array in stored.items():
                number, _, name = key.partition(".")
                minibatches.setdefault(int(number), {})[name] = array
        batches = [Batch.from_arrays(minibatches[number]) for number in sorted(minibatches)]
        return cls([Packed(batch, ()) for batch in batches], updates, done=done)


def pack_samples(samples: Collected, config: RunConfig, mesh: jax.sharding.Mesh) -> Experience:
    """Samples as minibatches of packed rows: runs of neighbours, of sizes as equal as possible."""
    assert config.rl is not None
    count = len(samples.trajectories)
    bounds = np.linspace(0, count, min(config.rl.minibatches, count) + 1).astype(int)
    parts = [samples.trajectories[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]
    minibatches = pack_parts(parts, config.data.max_length, row_shares(mesh) * config.train.microbatches)
    return Experience(minibatches, config.rl.updates, samples.trajectories)


def score_samples(
    experience: Experience, algorithm: Algorithm, policy: Role, reference: Role | None, critic: Role | None
) -> None:
    """Add the log-probabilities under the policy and the reference, and the critic's values, where they are needed.

    With a single update the old policy is the present one, so its log-probabilities are only computed where the reward
    needs them.
    """
    start = time.perf_counter()
    temperature = algorithm.objective.temperature
    batches = [packed.batch for packed in experience.minibatches]
    if experience.updates > 1 or algorithm.kl_in_reward:
        experience.add_signal("old_logps", [policy.logps(batch, temperature) for batch in batches])
    if reference is not None:
        experience.add_signal("ref_logps", [reference.logps(batch, temperature) for batch in batches])
    if critic is not None:
        experience.add_signal("values", [critic.values(batch) for batch in batches])
    experience.metrics["time/logps"] = time.perf_counter() - start


def add_advantages(experience: Experience, algorithm: Algorithm) -> None:
    """Add the advantages, the critic's returns, and the entropy bonus's coefficients where they follow the samples."""
    trajectories, objective = experience.trajectories, algorithm.objective
    zeros = [np.zeros(len(t.completion_ids)) for t in trajectories]
    outcomes = Outcomes(
        rewards=np.array([t.reward for t in trajectories]),
        groups=np.array([t.prompt.number for t in trajectories]),
        masks=[t.loss_mask for t in trajectories],
        token_rewards=[
            zero if t.token_rewards is None else t.token_rewards for t, zero in zip(trajectories, zeros, strict=True)
        ],
        penalties=_penalties(experience, algorithm) if algorithm.kl_in_reward else zeros,
        values=experience.gather("values") if algorithm.critic else None,
    )
    found = algorithm.advantages(outcomes, algorithm.settings)
    experience.spread_signal("advantages", found.advantages)
    if found.returns is not None:
        experience.spread_signal("returns", found.returns)
    if ENTROPY_COEFFICIENTS in objective.signals:
        coefficient = objective.coefficient_at(_entropy(trajectories))
        constant = [np.full(len(a), coefficient, np.float32) for a in found.advantages]
        experience.spread_signal(ENTROPY_COEFFICIENTS, constant)
        experience.metrics["entropy_coefficient"] = coefficient
    experience.trajectories = [t._replace(advantages=a) for t, a in zip(trajectories, found.advantages, strict=True)]


def _penalties(experience: Experience, algorithm: Algorithm) -> list[np.ndarray]:
    """beta times the KL estimate of every token that the model generated; its mean becomes the metric `kl`."""
    objective, trajectories = algorithm.objective, experience.trajectories
    pairs = zip(experience.gather("old_logps"), experience.gather("ref_logps"), trajectories, strict=True)
    kls = [np.asarray(divergence(objective.kl, old, ref)) * t.loss_mask for old, ref, t in pairs]
    tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
    experience.metrics["kl"] = float(sum(kl.sum() for kl in kls)) / max(tokens, 1)
    return [objective.beta * kl for kl in kls]


def _entropy(trajectories: Sequence[Trajectory]) -> float:
    """The mean entropy of the sampling distribution, estimated by the mean of -log p of the sampled tokens."""
    logps = np.concatenate([t.sampler_logps[t.loss_mask] for t in trajectories])
    return float(-logps.mean(dtype=np.float64)) if len(logps) else 0.0
