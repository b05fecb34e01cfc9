"""The protocol of training objectives: frozen dataclasses of numbers that are called with scores.

A user-defined objective is a frozen dataclass with the members of `Objective`. Its fields are compile-time constants;
values that change during a run are signals of the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped
from pydantic import PositiveFloat, PositiveInt

from jaxtrain.types import Array, Batch, Mean, Metric, Norm, Scores


@dataclass(frozen=True)
class Logp:
    """The token's log-probability, with logits divided by the temperature. Differentiable."""

    temperature: float = 1.0


@dataclass(frozen=True)
class Entropy:
    """The entropy of the distribution of `Logp`. It has a gradient only if `differentiable`."""

    differentiable: bool = False


@dataclass(frozen=True)
class Correct:
    """Whether the token is the most probable one."""


@dataclass(frozen=True)
class Value:
    """The output of a scalar head for the state before the token (a critic). Differentiable."""


@dataclass(frozen=True)
class Reward:
    """The output of a scalar head for the state at the token (a reward model). Differentiable."""


TEACHER_HIDDEN = "teacher_hidden"
"""The signal with the teacher's hidden states after its final norm, [B, T, E]."""

TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"
"""The signals with the ids that the teacher finds most probable at the token and their log-probabilities, [B, T, k]."""

TEACHER_FURTHER = "teacher_further"
"""The signal with the log-probability of the teacher's further tokens of a group, [B, T] at the student's first token
of it. `teacher_hidden` has there the state that predicts the teacher's first token."""

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """The divergence between the distributions of the teacher and of the student at the token. Differentiable.

    It is exact: over the whole vocabulary, from the signal `teacher_hidden` and the teacher's head. Both distributions
    are softmax(logits / temperature). The formulas are in `ops.divergence`.
    """

    kind: DivergenceKind = "forward_kl"
    beta: float = 0.5  # of `jsd`: the teacher's share of the mixture
    temperature: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(
                f"beta={self.beta} must be between 0 and 1: at these ends jsd and its gradient vanish; kind=forward_kl "
                "and kind=reverse_kl are what GKD defines there"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be more than 0")


@dataclass(frozen=True)
class SparseDivergence:
    """The forward KL from the teacher's top k log-probabilities, with the rest of the vocabulary as one bucket.
    Differentiable.

    The signals `teacher_ids` and `teacher_logps` hold them, under the same temperature. The score is a lower bound of
    that of `Divergence`. It is the field `divergence` of `Scores`, so that only one of the two can be requested.
    """

    temperature: PositiveFloat = 1.0


@dataclass(frozen=True)
class HybridDistance:
    """The distance of a group from a teacher with another vocabulary, at its first token: see `ops.hybrid`.
    Differentiable.

    It is the field `hybrid` of `Scores`, with its parts `matched` and `unmatched`. It reads the signals `group_place`,
    `teacher_hidden` and `teacher_further`, and the teacher's `MatchedHead`.
    """

    beta: float
    weights: tuple[float, float] | None  # of both parts; None: the matched share of the teacher's vocabulary, the rest


@dataclass(frozen=True)
class TopLogps:
    """The k largest log-probabilities of the distribution of `Logp`, in descending order. Differentiable.

    They are the fields `top_logps` and `top_ids` of `Scores`, [B, T, k]. k is at most the size of the vocabulary.
    """

    k: PositiveInt


ScoreRequest = Logp | Entropy | Correct | Value | Reward | Divergence | SparseDivergence | HybridDistance | TopLogps
"""A score that an objective requests: the field of the same name in `Scores`, unless it names another."""


@runtime_checkable
class Objective(Protocol):
    """The loss of a step, as data and a pure function.

    It may also have `prepare(score, batch) -> signals`. That is called once for a step, over the whole global batch,
    without gradient and dropout, before the batch is cut into microbatches; `score(*requests)` gives scores under the
    present parameters, and the signals it returns are added to the batch. And it may have `without_effect`: its fields
    that change nothing beside the values of the others, with the reason; a config that gives one is refused.
    """

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        """The requested scores. The others are None."""
        ...

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the required arrays in `Batch.signals`, including those of `prepare`."""
        ...

    @property
    def separable(self) -> bool:
        """Whether the derivative by each score of token t depends only on the scores of token t.

        The step is then faster. A wrong True makes it slower; the gradient is correct in both cases.
        """
        ...

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], Mapping[str, Metric]]:
        """The loss [] of a microbatch, and metrics.

        The losses of microbatches are summed, so their divisors must be those of the whole batch, `norm`.
        """
        ...


Score = Callable[..., Scores]
"""`score(*requests)` returns the scores of the whole batch."""


@runtime_checkable
class Prepared(Protocol):
    """An objective that computes signals itself."""

    def prepare(self, score: Score, batch: Batch) -> Mapping[str, Array]: ...


def mean_where(counted: Bool[Array, "B S"], values: Shaped[Array, "B S"]) -> Mean:
    """The metric: the mean of `values`, numbers or truth values, over the places that are counted."""
    return Mean(jnp.sum(jnp.where(counted, values, 0.0)), jnp.sum(counted))


def weighted_mean(values: Shaped[Array, "B T"], weights: Float[Array, "B T"]) -> Mean:
    """The metric: the mean of `values`, numbers or truth values, over the weighted tokens."""
    return Mean(jnp.sum(values * weights), jnp.sum(weights))
