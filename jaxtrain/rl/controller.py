"""The controller: sample -> score -> pack -> old and reference log-probabilities -> advantages -> n updates -> sync.

Every role is data: a model, its parameters, and compiled functions of them. Where the sampler runs (here, on other
devices, in other processes) is the sampler's business.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxtrain.lora import join
from jaxtrain.objectives.kl import divergence
from jaxtrain.objectives.policy import ENTROPY_COEFFICIENTS
from jaxtrain.rl.advantages import Outcomes
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.rollouts import Packed, Trajectory, pack, rows_needed
from jaxtrain.rl.sources import Source
from jaxtrain.train.loop import check_finite
from jaxtrain.train.step import Step, StepReport
from jaxtrain.types import Array, Batch, Params, TrainState

PerToken = Callable[[Params, Batch], Array]
"""(parameters, placed batch) -> [B, T]: log-probabilities or values."""


class Learner(NamedTuple):
    """A role that is trained."""

    state: TrainState
    step: Step
    per_token: PerToken  # of a policy: log-probabilities; of a critic: values

    @property
    def params(self) -> Params:
        return join(self.state.params, self.state.frozen)


class Reference(NamedTuple):
    """The policy that the KL is measured to: what the run started from. Its parameters never change.

    Under LoRA the base is the policy's own frozen weights, and `params` is what stands beside it: nothing for new
    adapters, which change nothing yet, or a copy of the adapters of `model.lora.path`.
    """

    params: Params
    per_token: PerToken


class Roles(NamedTuple):
    policy: Learner
    critic: Learner | None = None
    reference: Reference | None = None


class Plan(NamedTuple):
    """The numbers of a step."""

    iterations: int  # passes over its samples
    minibatches: int  # updates of a pass
    max_length: int  # T
    row_multiple: int  # rows of a batch are a multiple of this
    max_skipped_in_a_row: int

    @property
    def updates(self) -> int:
        return self.iterations * self.minibatches


class Experience(NamedTuple):
    """One step's samples, ready to be learned from."""

    batches: list[Batch]  # one per minibatch, on the host, signals included
    metrics: dict[str, float]
    trajectories: list[Trajectory]  # with advantages; empty where a resumed run goes on in the middle of its updates


class Update(NamedTuple):
    """What is yielded after every optimizer step."""

    step: int
    roles: Roles
    report: StepReport
    critic_report: StepReport | None
    batch: Batch
    experience: Experience
    done: int  # updates on this experience, this one included
    seconds: float  # of this update


class Pending(NamedTuple):
    """Where an interrupted run was in the middle of its updates."""

    experience: Experience
    done: int


def reinforce(
    roles: Roles,
    source: Source,
    algorithm: Algorithm,
    plan: Plan,
    place: Callable[[Batch], Batch],
    *,
    steps: int,
    inspection_dir: Path,
    pending: Pending | None = None,
) -> Iterator[Update]:
    """Take optimizer steps until `steps` have been taken in all or the prompts run dry, yielding after each."""
    number = int(roles.policy.state.step)
    recent: deque[Batch] = deque(maxlen=plan.max_skipped_in_a_row)
    while number < steps:
        if pending is not None:
            (experience, done), pending = pending, None
        else:
            collected = source(roles.policy.params, number)
            if collected is None:
                return
            experience, done = prepare(collected, roles, algorithm, plan, place), 0
        while done < plan.updates and number < steps:
            start = time.perf_counter()
            batch = experience.batches[done % len(experience.batches)]
            placed = place(batch)
            state, report = roles.policy.step(roles.policy.state, placed)
            critic_report = None
            if roles.critic is not None:
                critic_state, critic_report = roles.critic.step(roles.critic.state, placed)
                roles = roles._replace(critic=roles.critic._replace(state=critic_state))
            roles = roles._replace(policy=roles.policy._replace(state=state))
            number, done = number + 1, done + 1
            recent.append(batch)
            check_finite(report, recent, plan.max_skipped_in_a_row, number, inspection_dir)
            seconds = time.perf_counter() - start
            yield Update(number, roles, report, critic_report, batch, experience, done, seconds)


def prepare(
    collected: Collected, roles: Roles, algorithm: Algorithm, plan: Plan, place: Callable[[Batch], Batch]
) -> Experience:
    """Pack trajectories, score them under the policy, the reference and the critic, and find their advantages.

    With a single update the old policy is the present one and need not be asked, unless the reward needs it.
    """
    start = time.perf_counter()
    parts = [list(part) for part in _cut(collected.trajectories, plan.minibatches)]
    rows = max(rows_needed(part, plan.max_length, plan.row_multiple) for part in parts)
    packed = [pack(part, plan.max_length, rows) for part in parts]
    penalised = algorithm.needs_reference and algorithm.objective.kl_in == "reward"
    if plan.updates > 1 or penalised:
        packed = _scored(packed, "old_logps", roles.policy.params, roles.policy.per_token, place)
    if roles.reference is not None:
        # Joined now: a step donates the buffers of its state, the frozen ones too.
        params = join(roles.reference.params, roles.policy.state.frozen)
        packed = _scored(packed, "ref_logps", params, roles.reference.per_token, place)
    if roles.critic is not None:
        packed = _scored(packed, "values", roles.critic.params, roles.critic.per_token, place)

    trajectories = [t for part in parts for t in part]
    penalties, divergences = _penalties(packed, trajectories, algorithm) if penalised else (None, None)
    nothing = [np.zeros(len(t.completion_ids)) for t in trajectories]
    token_rewards = [
        none if t.token_rewards is None else t.token_rewards for t, none in zip(trajectories, nothing, strict=True)
    ]
    outcomes = Outcomes(
        rewards=np.array([t.reward for t in trajectories]),
        groups=np.array([t.prompt.number for t in trajectories]),
        masks=[t.loss_mask for t in trajectories],
        token_rewards=token_rewards,
        penalties=penalties or nothing,
        values=_gathered(packed, "values") if roles.critic is not None else None,
    )
    found = algorithm.advantages(outcomes, algorithm.settings)
    metrics = dict(collected.metrics)
    coefficient = algorithm.objective.coefficient_at(_entropy(trajectories))
    adaptive = ENTROPY_COEFFICIENTS in algorithm.objective.signals
    batches = []
    at = 0
    for each in packed:
        span = slice(at, at + len(each.spans))
        signals = {"advantages": found.advantages[span]}
        if found.returns is not None:
            signals["returns"] = found.returns[span]
        if adaptive:
            signals[ENTROPY_COEFFICIENTS] = [np.full(len(a), coefficient, np.float32) for a in found.advantages[span]]
        batches.append(each.spread(**signals).batch)
        at = span.stop
    if adaptive:
        metrics["entropy_coefficient"] = coefficient
    metrics["time/logps"] = time.perf_counter() - start
    if divergences is not None:
        metrics["kl"] = divergences
    with_advantages = [t._replace(advantages=a) for t, a in zip(trajectories, found.advantages, strict=True)]
    return Experience(batches, metrics, with_advantages)


def _cut(trajectories: Sequence[Trajectory], pieces: int) -> list[Sequence[Trajectory]]:
    """Runs of neighbours, as equal as can be; fewer runs where there are fewer samples."""
    bounds = np.linspace(0, len(trajectories), min(pieces, len(trajectories)) + 1).astype(int)
    return [trajectories[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]


def _scored(
    packed: list[Packed], name: str, params: Params, per_token: PerToken, place: Callable[[Batch], Batch]
) -> list[Packed]:
    """Add the signal `name`, taken on the devices."""
    scored = []
    for each in packed:
        values = np.asarray(jax.device_get(per_token(params, place(each.batch))))
        signals = dict(each.batch.signals) | {name: values}
        scored.append(each._replace(batch=each.batch._replace(signals=signals)))
    return scored


def _entropy(trajectories: Sequence[Trajectory]) -> float:
    """The mean entropy of the sampling distribution, estimated from the samples: the mean of -log p of their tokens."""
    logps = np.concatenate([t.sampler_logps[t.loss_mask] for t in trajectories])
    return float(-logps.mean(dtype=np.float64)) if len(logps) else 0.0


def _gathered(packed: list[Packed], name: str) -> list[np.ndarray]:
    return [values for each in packed for values in each.gather(each.batch.signals[name])]


def _penalties(
    packed: list[Packed], trajectories: Sequence[Trajectory], algorithm: Algorithm
) -> tuple[list[np.ndarray], float]:
    """beta times the KL estimate of every token of the model's, and the mean estimate."""
    pairs = zip(_gathered(packed, "old_logps"), _gathered(packed, "ref_logps"), trajectories, strict=True)
    kls = [np.asarray(divergence(algorithm.objective.kl, old, ref)) * t.loss_mask for old, ref, t in pairs]
    tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
    return [algorithm.objective.beta * kl for kl in kls], float(sum(kl.sum() for kl in kls)) / max(tokens, 1)
