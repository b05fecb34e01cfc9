"""How full an engine is: the slots and the memory that it uses."""

from __future__ import annotations

from jaxtrain.nn.model import Model
from jaxtrain.parallel.sharding import device_bytes, row_shares
from jaxtrain.sample.capacity import slot_bytes
from jaxtrain.types import Params


class EngineUsage:
    """Counts over the device calls of an engine, until they are read."""

    def __init__(self, model: Model, slots: int):
        self._model, self._slots = model, slots
        self._begin()

    def _begin(self) -> None:
        self._calls = self._live = 0
        self._largest = (0, 0)  # rows and columns of the largest cache

    def count(self, live: int, rows: int, columns: int) -> None:
        """A device call with `live` samples, and a cache of `rows` x `columns`."""
        self._calls += 1
        self._live += live
        if rows * columns > self._largest[0] * self._largest[1]:
            self._largest = rows, columns

    def read(self, params: Params | None) -> dict[str, float]:
        """`engine/slots_in_use`, the mean share of the slots that held a sample, and `engine/memory_gib`, what weights
        and the largest cache take on a device, since the last call. Empty if there was no device call. `params` is
        None where the engine has released them.
        """
        if not self._calls:
            return {}
        rows, columns = self._largest
        cache = rows // row_shares(self._model.run.mesh) * slot_bytes(self._model, columns)
        weights = device_bytes(params)
        metrics = {
            "engine/slots_in_use": self._live / (self._calls * self._slots),
            "engine/memory_gib": (weights + cache) / 2**30,
        }
        self._begin()
        return metrics
