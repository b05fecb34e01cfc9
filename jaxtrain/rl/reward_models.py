"""A reward model as a role: a scalar head that scores prompt and completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jaxtrain.nn.model import Model
from jaxtrain.rl.rollouts import Trajectory, pack, rows_needed
from jaxtrain.types import Array, Batch, Params


class RewardModel:
    """Callable: the head's value at the last token of every sample [n], computed on packed rows.

    It reads the policy's ids, so it must have the policy's tokenizer.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        model: Model,
        params: Params,
        place: Callable[[Batch], Batch],
        *,
        max_length: int,
        row_multiple: int,
    ):
        """`model.output` is the scalar head; `max_length` holds the longest sample; rows are placed by `place`."""
        self.name, self.weight = name, weight
        self._model, self._params, self._place = model, params, place
        self._max_length, self._row_multiple = max_length, row_multiple

    def __call__(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        rows = rows_needed(trajectories, self._max_length, self._row_multiple)
        packed = pack(trajectories, self._max_length, rows)
        bare = packed.batch._replace(signals={})
        values = np.asarray(jax.device_get(_values(self._model, self._params, self._place(bare))))
        return np.array([values[row, stop - 1] for row, _, stop in packed.spans], np.float64)


@partial(jax.jit, static_argnums=0)
def _values(model: Model, params: Params, batch: Batch) -> Array:
    return model.values(params, model.hidden(params, batch))
