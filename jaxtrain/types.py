"""The records that all packages share.

Dimension letters, the same everywhere:

    B rows          T tokens of a row   D model width    N query heads   K key/value heads   H head width
    F hidden width  V vocabulary        L layers         E experts       S segments of a row G group size

Everything here is a NamedTuple, which is a JAX pytree without registration, so the data pipeline can use these records
without importing jax: an `Array` is a `numpy.ndarray` on the host and a `jax.Array` on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import jax
    import numpy as np

    Array: TypeAlias = jax.Array | np.ndarray
    Params: TypeAlias = dict[str, "Params | Array | tuple[Any, ...]"]
    """A nested dict of arrays, of `jax.ShapeDtypeStruct` where only shapes are known, or of tuples of axis names.
    `Model.unstack` makes `layers` a tuple of such dicts."""
else:

    @runtime_checkable
    class Array(Protocol):
        """The union of `jax.Array` and `numpy.ndarray`, recognised without importing jax."""

        shape: tuple[int, ...]
        dtype: Any

    Params = dict[str, Any]  # beartype, which checks annotations in the tests, takes no recursive alias


def get_leaf(tree: Params, *path: str) -> Array:
    """The array at `path`."""
    *parents, last = path
    for name in parents:
        node = tree[name]
        assert isinstance(node, dict), path
        tree = node
    leaf = tree[last]
    assert isinstance(leaf, Array), path
    return leaf


class Example(NamedTuple):
    """One sequence before it is packed. A per-token value at `t` belongs to the token at `t`, as in `Batch`.

    `signals` are further per-token values by name. They are truncated, packed, evaluated, saved and resumed with the
    tokens. All examples of a stream have the same signals, with the same types.
    """

    input_ids: Array  # [n] int32
    loss_weights: Array  # [n] float32
    signals: Mapping[str, Array] = {}  # [n] or [n, k]


Bundle = tuple[Example, ...]
"""Examples that an objective reads together, such as a preference pair: adjacent in one row, never split."""

# Names of the signals of preferences, all [n] and of every token of an example:
SIGN = "sign"  # of a pair: 1 on the chosen answer's example, -1 on the rejected one's
MARGIN = "margin"  # of a pair: by how much the chosen answer is better
LABEL = "label"  # of a single answer: a score, or the probability that it is good
MISMATCHED = -1.0  # the label of an answer to another prompt, from which KTO estimates its KL divergence
REF_LOGPS = "ref_logps"  # the reference's log-probability of the token

# Names of the signals of an example that a teacher with another tokenizer reads in its own tokens, all [n] int32. A
# group is a run of tokens of the student and one of the teacher that write the same text.
TEACHER_TOKENS = "teacher_tokens"  # the teacher's token at this place, with the positions and segments of the student's
GROUP_PLACE = "group_place"  # of the student's token within its group: 1, 2 ...; 0 in no group
TEACHER_PLACE = "teacher_place"  # of the teacher's token within its group
TEACHER_SHIFT = "teacher_shift"  # at the student's first token of a group, the places to the teacher's first one
ALIGNED = (TEACHER_TOKENS, GROUP_PLACE, TEACHER_PLACE, TEACHER_SHIFT)  # what batches have for a teacher of other tokens
TEACHER_PROBS = "teacher_probs"  # [n, k + 1] float32 at such a token: see `objectives.uld`

_SIGNAL = "signals."  # prefix of the names of signals in `Batch.arrays`


class Batch(NamedTuple):
    """Packed rows. A per-token value at `t` belongs to the token at `t`.

    `loss_weights[b, t]` weighs the prediction of `tokens[b, t]` from the tokens before it, so the first token of a
    segment, which nothing predicts, always has weight 0. One that continues another segment is predicted by it.

    Two segments at most continue the same one, and follow it directly: the answers of a pair that share their prompt.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, restarts at 0 in every segment that continues no other
    segment_ids: Array  # [B, T] int32, 1.. in every row; 0 is padding
    loss_weights: Array  # [B, T] float32
    signals: Mapping[str, Array] = {}  # further per-token values: [B, T] or [B, T, k]; 0 in padding
    bundle_ids: Array | None = None  # [B, T] int32, 1.. in every row; 0 is padding. None: each segment is a bundle
    # [B, 3] float32: the weighted tokens, segments and bundles of samples that were left out before packing, which
    # `Norm` counts. They are summed over the rows: in which of them a sample is counted makes no difference
    left_out: Array | None = None
    # [B, T] int32: in a segment that continues another one of its row, the id of that one; 0 elsewhere. Its positions
    # go on after those of the other segment, whose tokens it attends to. None: no segment continues another
    prefix_ids: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """All arrays by name, those of signals as `signals.<name>`, for example for a file of batches."""
        fields = {name: array for name, array in self._asdict().items() if name != "signals" and array is not None}
        return fields | {_SIGNAL + name: array for name, array in self.signals.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Batch:
        """The inverse of `arrays`."""
        signals = {name.removeprefix(_SIGNAL): array for name, array in arrays.items() if name.startswith(_SIGNAL)}
        return cls(**{name: array for name, array in arrays.items() if not name.startswith(_SIGNAL)}, signals=signals)

    def map(self, function: Callable[[Array], Array]) -> Batch:
        """A batch with `function` applied to every array."""
        return self.from_arrays({name: function(array) for name, array in self.arrays().items()})


_NOT_REQUESTED: Any = None  # typed so that an objective need not check the scores that it requests


class Scores(NamedTuple):
    """Scores of all tokens: the value at `t` is that of the token at `t`; 0 where its weight is 0.

    Scores that the objective does not request are None.
    """

    logp: Array = _NOT_REQUESTED  # [B, T] float32, natural logarithm of the token's probability
    entropy: Array = _NOT_REQUESTED  # [B, T] float32, nats, of the distribution that the token is drawn from
    correct: Array = _NOT_REQUESTED  # [B, T] float32, 1 where the token is the most probable one; no gradient
    value: Array = _NOT_REQUESTED  # [B, T] float32, the output of a scalar head for the state before the token
    reward: Array = _NOT_REQUESTED  # [B, T] float32, the output of a scalar head for the state at the token
    divergence: Array = _NOT_REQUESTED  # [B, T] float32, nats, between the teacher's distribution and the student's
    hybrid: Array = _NOT_REQUESTED  # [B, T] float32, the distance of a group at its first token: see `ops.hybrid`
    matched: Array = _NOT_REQUESTED  # [B, T] float32, its part of the matched tokens; no gradient
    unmatched: Array = _NOT_REQUESTED  # [B, T] float32, its part of the others; no gradient
    top_logps: Array = _NOT_REQUESTED  # [B, T, k] float32, the largest log-probabilities at the token, descending
    top_ids: Array = _NOT_REQUESTED  # [B, T, k] int32, the ids that have them; no gradient


class Routing(NamedTuple):
    """Statistics of the routers of a mixture of experts: for each layer, sums over the tokens that are not padding."""

    load: Array  # [L, E] float32, tokens routed to the expert; no gradient
    probability: Array  # [L, E] float32, sum of the router's probabilities
    z: Array  # [L] float32, sum of log(sum(exp(router logits)))^2
    tokens: Array  # [L] float32


class Norm(NamedTuple):
    """Counts over the whole global batch, before it is split into microbatches. All but `real` include `left_out`."""

    tokens: Array  # [] float32, sum of the loss weights
    segments: Array  # [] float32, segments with a weighted token
    bundles: Array  # [] float32, bundles with a weighted token; without bundles, each segment counts
    real: Array  # [] float32, tokens that are not padding


class Mean(NamedTuple):
    """A metric as numerator and denominator, so that sums over microbatches and hosts are exact.

    Add with `train.step.add_metrics`: `+` concatenates the tuples.
    """

    total: Array
    weight: Array

    @property
    def value(self) -> Array:
        """The mean; 0 if the weight is 0."""
        return self.total / (self.weight + (self.weight == 0))


class Max(NamedTuple):
    """A metric whose values are combined by their maximum."""

    value: Array


class Min(NamedTuple):
    """A metric whose values are combined by their minimum."""

    value: Array


Metric = Mean | Max | Min


class TrainState(NamedTuple):
    """Everything that a step changes. The static module graph is in the step's closure."""

    step: Array  # [] int32, optimizer steps taken, skipped ones included
    params: Params  # the trained parameters
    opt_state: Any
    key: Array  # PRNG key, constant: a step folds in its number
    skipped: Array  # [] int32, steps skipped because of a non-finite gradient, in total
    skipped_in_a_row: Array  # [] int32
