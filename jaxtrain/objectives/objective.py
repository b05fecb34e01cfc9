"""What a training objective is: a frozen dataclass of numbers that is called with scores.

An objective of your own is a frozen dataclass with the members of `Objective`. Its fields are compile-time constants;
what changes during a run travels in the batch, as a signal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jaxtrain.types import Array, Batch, Mean, Metric, Norm, Scores


@dataclass(frozen=True)
class Logp:
    """The token's log-probability, where the temperature divides the logits. Differentiable."""

    temperature: float = 1.0


@dataclass(frozen=True)
class Entropy:
    """The entropy of the distribution that `Logp` is taken of. As a metric only, unless `differentiable`."""

    differentiable: bool = False


@dataclass(frozen=True)
class Correct:
    """Whether the token was the most probable one."""


@dataclass(frozen=True)
class Value:
    """What a scalar head gives for the state before the token (a critic). Differentiable."""


Request = Logp | Entropy | Correct | Value
"""A score that an objective asks for: the field of its name in `Scores`."""


class Objective(Protocol):
    """The loss of a step, as data and a pure function.

    It may also have `prepare(score, batch) -> signals`. That is called once for a step, over the whole global batch,
    without gradient and dropout, before the batch is cut into microbatches; `score(*requests)` gives scores under the
    present parameters, and the signals it returns are added to the batch.
    """

    @property
    def needs(self) -> tuple[Request, ...]:
        """The scores it reads. Those it does not ask for are None."""
        ...

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the per-token arrays that must be in `Batch.signals`, those of `prepare` included."""
        ...

    @property
    def separable(self) -> bool:
        """Whether the derivative by each score of token t depends on the scores of token t alone.

        The step is then faster. Wrongly True costs time; the gradient is right in either case.
        """
        ...

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, Mapping[str, Metric]]:
        """The loss [] of a microbatch, and metrics.

        Losses of the microbatches are added up, so their divisors are those of the whole batch: `norm`.
        """
        ...


Score = Callable[..., Scores]
"""`score(*requests)`: scores [B, T] of the whole batch."""


@runtime_checkable
class Prepared(Protocol):
    """An objective with signals of its own."""

    def prepare(self, score: Score, batch: Batch) -> Mapping[str, Array]: ...


def weighted_mean(values: Array, weights: Array) -> Mean:
    """The metric: the mean of values [B, T] over the weighted tokens."""
    return Mean(jnp.sum(values * weights), jnp.sum(weights))
