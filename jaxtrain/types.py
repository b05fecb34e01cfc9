"""The records that all packages share.

Dimension letters, the same everywhere:

    B rows          T tokens of a row   D model width    N query heads   K key/value heads   H head width
    F hidden width  V vocabulary        L layers         E experts       S segments of a row G group size

Everything here is a NamedTuple, which is a JAX pytree without registration, so the data pipeline can use these records
without importing jax: an `Array` is a `numpy.ndarray` on the host and a `jax.Array` on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Array = Any
Params = dict[str, Any]
"""A nested dict whose leaves are arrays (or `jax.ShapeDtypeStruct`, where only shapes are known)."""


class Example(NamedTuple):
    """One sequence before it is packed. A per-token value at `t` belongs to the token at `t`, as in `Batch`.

    `signals` are further per-token values by name. They are cut, packed, evaluated, saved and resumed with the tokens.
    All examples of a stream have the same signals, of the same types.
    """

    input_ids: Array  # [n] int32
    loss_weights: Array  # [n] float32
    signals: Mapping[str, Array] = {}  # [n] or [n, k]


Bundle = tuple[Example, ...]
"""Examples that an objective reads together, such as a preference pair: neighbours in one row, never cut apart."""

_SIGNAL = "signals."  # before the name of a signal, where all arrays of a batch stand side by side


class Batch(NamedTuple):
    """Packed rows. One convention: a per-token value at `t` belongs to the token at `t`.

    `loss_weights[b, t]` weighs the prediction of `tokens[b, t]` from the tokens before it, so the first token of a
    segment, which nothing predicts, always has weight 0.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, restarts at 0 in every segment
    segment_ids: Array  # [B, T] int32, 1.. in every row; 0 is padding
    loss_weights: Array  # [B, T] float32
    signals: Mapping[str, Array] = {}  # further per-token values: [B, T] or [B, T, k]; 0 in padding
    bundle_ids: Array | None = None  # [B, T] int32, 1.. in every row; 0 is padding. None: each segment is a bundle

    def arrays(self) -> dict[str, Array]:
        """All arrays by name, a signal's as `signals.<name>`: what a file of batches holds."""
        fields = {name: array for name, array in self._asdict().items() if name != "signals" and array is not None}
        return fields | {_SIGNAL + name: array for name, array in self.signals.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Batch:
        """The inverse of `arrays`."""
        signals = {name.removeprefix(_SIGNAL): array for name, array in arrays.items() if name.startswith(_SIGNAL)}
        return cls(**{name: array for name, array in arrays.items() if not name.startswith(_SIGNAL)}, signals=signals)

    def map(self, function: Callable[[Array], Array]) -> Batch:
        """`function` of every array."""
        return self.from_arrays({name: function(array) for name, array in self.arrays().items()})


class Scores(NamedTuple):
    """What a model's head gives for every token: the value at `t` scores the token at `t`; 0 where its weight is 0.

    Those that were not asked for are None.
    """

    logp: Array = None  # [B, T] float32, natural logarithm of the token's probability
    entropy: Array = None  # [B, T] float32, nats, of the distribution the token was drawn from
    correct: Array = None  # [B, T] float32, 1 where the token was the most probable one; carries no gradient
    value: Array = None  # [B, T] float32, of a scalar head: the value of the state before the token


class Routing(NamedTuple):
    """Statistics of the routers of a mixture of experts: sums over the tokens that are not padding, by layer."""

    load: Array  # [L, E] float32, tokens that chose the expert; carries no gradient
    probability: Array  # [L, E] float32, sum of the router's probabilities
    z: Array  # [L] float32, sum of log(sum(exp(router logits)))^2
    tokens: Array  # [L] float32


class Norm(NamedTuple):
    """Counts over the whole global batch, taken before it is cut into microbatches."""

    tokens: Array  # [] float32, sum of the loss weights
    segments: Array  # [] float32, segments that hold a weighted token
    real: Array  # [] float32, tokens that are not padding


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
    opt_state: Any
    key: Array  # PRNG key; a step folds its number in and never advances it
    skipped: Array  # [] int32, steps skipped for a non-finite gradient, ever
    skipped_in_a_row: Array  # [] int32
