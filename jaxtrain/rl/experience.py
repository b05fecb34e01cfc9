"""Experience: one rollout's samples as packed rows with every signal that the updates read."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.losses.policy import divergence
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.rl.advantages import Outcomes
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.rollouts import Packed, Trajectory, pack, rows_needed
from jaxtrain.roles.role import Role
from jaxtrain.types import Batch


@dataclass
class Experience:
    """Iterates over the batches that are still to be trained on, and counts them."""

    batches: list[Batch]  # one per minibatch, this host's rows, signals included
    updates: int  # optimizer steps in all: passes over the batches times their number
    metrics: dict[str, float] = field(default_factory=dict)  # of the rollout
    trajectories: list[Trajectory] = field(default_factory=list)  # with advantages; empty after a resume
    done: int = 0  # updates taken

    def __iter__(self) -> Iterator[Batch]:
        while self.done < self.updates:
            batch = self.batches[self.done % len(self.batches)]
            self.done += 1
            yield batch

    @property
    def in_progress(self) -> bool:
        return 0 < self.done < self.updates

    def save(self, path: Path) -> None:
        """Write what a resumed run needs to go on in the middle of the updates, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"metrics": np.array(json.dumps(self.metrics))}
        for number, batch in enumerate(self.batches):
            columns = batch._asdict()
            signals = columns.pop("signals")
            arrays |= {f"{number}.{name}": value for name, value in columns.items()}
            arrays |= {f"{number}.signals.{name}": value for name, value in signals.items()}
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, updates: int, done: int) -> Experience:
        """Raises ValueError where the file is missing."""
        if not path.is_file():
            raise ValueError(f"{path} is missing: it holds the samples that the newest checkpoint is in the middle of")
        with np.load(path) as stored:
            arrays = dict(stored)
        metrics = json.loads(str(arrays.pop("metrics")))
        columns: dict[int, dict[str, Any]] = {}
        for key, value in arrays.items():
            number, _, name = key.partition(".")
            batch = columns.setdefault(int(number), {"signals": {}})
            if name.startswith("signals."):
                batch["signals"][name.removeprefix("signals.")] = value
            else:
                batch[name] = value
        return cls([Batch(**columns[number]) for number in sorted(columns)], updates, metrics, done=done)


def make_experience(
    samples: Collected, config: RunConfig, algorithm: Algorithm, policy: Role, reference: Role | None, critic: Role | None
) -> Experience:
    """Pack trajectories, score them under the policy, the reference and the critic, and compute their advantages.

    With a single update the old policy is the present one, so its log-probabilities are only computed where the reward
    needs them.
    """
    assert config.rl is not None
    start = time.perf_counter()
    temperature, updates = config.rl.sampling.temperature, config.rl.updates
    parts = [list(part) for part in split_evenly(samples.trajectories, config.rl.minibatches)]
    multiple = row_shares(policy.mesh) * config.train.microbatches
    rows = max(rows_needed(part, config.data.max_length, multiple) for part in parts)
    packed = [pack(part, config.data.max_length, rows) for part in parts]
    penalised = algorithm.needs_reference and algorithm.kl_in == "reward"
    if updates > 1 or penalised:
        packed = [_with_signal(each, "old_logps", policy.logps(each.batch, temperature)) for each in packed]
    if reference is not None:
        packed = [_with_signal(each, "ref_logps", reference.logps(each.batch, temperature)) for each in packed]
    if critic is not None:
        packed = [_with_signal(each, "values", critic.values(each.batch)) for each in packed]

    trajectories = [t for part in parts for t in part]
    penalties, divergences = _penalties(packed, trajectories, algorithm) if penalised else (None, None)
    zeros = [np.zeros(len(t.completion_ids)) for t in trajectories]
    outcomes = Outcomes(
        rewards=np.array([t.reward for t in trajectories]),
        groups=np.array([t.prompt.number for t in trajectories]),
        masks=[t.loss_mask for t in trajectories],
        token_rewards=[
            zero if t.token_rewards is None else t.token_rewards for t, zero in zip(trajectories, zeros, strict=True)
        ],
        penalties=penalties or zeros,
        values=_gathered(packed, "values") if critic is not None else None,
    )
    found = algorithm.advantages(outcomes, algorithm.settings)
    batches, at = [], 0
    for each in packed:
        span = slice(at, at + len(each.spans))
        signals = {"advantages": found.advantages[span]}
        if found.returns is not None:
            signals["returns"] = found.returns[span]
        batches.append(each.spread(**signals).batch)
        at = span.stop
    metrics = dict(samples.metrics)
    metrics["time/logps"] = time.perf_counter() - start
    if divergences is not None:
        metrics["kl"] = divergences
    with_advantages = [t._replace(advantages=a) for t, a in zip(trajectories, found.advantages, strict=True)]
    return Experience(batches, updates, metrics, with_advantages)


def split_evenly(trajectories: Sequence[Trajectory], pieces: int) -> list[Sequence[Trajectory]]:
    """Runs of neighbours, of sizes as equal as possible; fewer runs where there are fewer samples."""
    bounds = np.linspace(0, len(trajectories), min(pieces, len(trajectories)) + 1).astype(int)
    return [trajectories[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]


def _with_signal(packed: Packed, name: str, values: np.ndarray) -> Packed:
    return packed._replace(batch=packed.batch._replace(signals={**packed.batch.signals, name: values}))


def _gathered(packed: list[Packed], name: str) -> list[np.ndarray]:
    return [values for each in packed for values in each.gather(each.batch.signals[name])]


def _penalties(
    packed: list[Packed], trajectories: Sequence[Trajectory], algorithm: Algorithm
) -> tuple[list[np.ndarray], float]:
    """beta times the KL estimate of every token that the model generated, and the mean estimate."""
    pairs = zip(_gathered(packed, "old_logps"), _gathered(packed, "ref_logps"), trajectories, strict=True)
    kls = [np.asarray(divergence(algorithm.kl, old, ref)) * t.loss_mask for old, ref, t in pairs]
    tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
    return [algorithm.beta * kl for kl in kls], float(sum(kl.sum() for kl in kls)) / max(tokens, 1)
