"""The words every other file speaks.

Dimension letters, the same everywhere:

    B rows          T tokens of a row   D model width    N query heads   K key/value heads   H head width
    F hidden width  V vocabulary        L layers         E experts       S segments of a row G group size

Everything here is a NamedTuple, which is a JAX pytree without registration, so the data pipeline can speak these
words without importing jax: an `Array` is a `numpy.ndarray` on the host side and a `jax.Array` on the device side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Array = Any
Params = dict[str, Any]
"""A nested dict whose leaves are arrays (or `jax.ShapeDtypeStruct`, where only shapes are known)."""


class Batch(NamedTuple):
    """Packed rows. One convention: a per-token value at `t` belongs to the token at `t`.

    `loss_weights[b, t]` weighs the prediction of `tokens[b, t]` from the tokens before it, so the first token of a
    segment, which nothing predicts, always has weight 0.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, restarts at 0 in every segment
    segment_ids: Array  # [B, T] int32, 1.. in every row; 0 is padding
    loss_weights: Array  # [B, T] float32
    signals: Mapping[str, Array] = {}  # further per-token values: [B, T] or [B, T, k]


class Scores(NamedTuple):
    """What a model's head gives for every token: the value at `t` scores the token at `t`; 0 where its weight is 0.

    Those that were not asked for are None.
    """

    logp: Array = None  # [B, T] float32, natural logarithm of the token's probability
    entropy: Array = None  # [B, T] float32, nats, of the distribution the token was drawn from
    correct: Array = None  # [B, T] float32, 1 where the token was the most probable one; carries no gradient
    value: Array = None  # [B, T] float32, of a scalar head: the value of the state before the token


class Routing(NamedTuple):
    """What the routers of a mixture of experts did: sums over the tokens that are no padding, layer by layer."""

    load: Array  # [L, E] float32, tokens that chose the expert; carries no gradient
    probability: Array  # [L, E] float32, sum of the router's probabilities
    z: Array  # [L] float32, sum of log(sum(exp(router logits)))^2
    tokens: Array  # [L] float32


class Norm(NamedTuple):
    """Counts over the whole global batch, taken before it is cut into microbatches."""

    tokens: Array  # [] float32, sum of the loss weights
    segments: Array  # [] float32, segments that hold a weighted token
    real: Array  # [] float32, tokens that are no padding


class Mean(NamedTuple):
    """A metric as numerator and denominator, so that it adds exactly over microbatches and hosts.

    Add with `train.step.add_metrics`: `+` would join the tuples.
    """

    total: Array
    weight: Array

    @property
    def value(self) -> Array:
        """The mean; 0 where nothing was counted."""
        return self.total / (self.weight + (self.weight == 0))


class Max(NamedTuple):
    """A metric that keeps the largest of its values over microbatches and steps."""

    value: Array


class Min(NamedTuple):
    """A metric that keeps the smallest."""

    value: Array


Metric = Mean | Max | Min


class TrainState(NamedTuple):
    """Everything a step changes. The static module graph lives in the step's closure."""

    step: Array  # [] int32, optimizer steps taken, skipped ones included
    params: Params  # what the optimizer trains
    frozen: Params  # what it leaves alone: the base weights under LoRA, else {}
    opt_state: Any
    key: Array  # PRNG key; a step folds its number in and never advances it
    skipped: Array  # [] int32, steps skipped for a non-finite gradient, ever
    skipped_in_a_row: Array  # [] int32
