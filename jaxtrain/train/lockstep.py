"""What the processes of a run decide together: whether to stop, and whether any of them still has data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.train.preemption import Interrupted, Preemption
from jaxtrain.types import Array, Batch


class Answer:
    """What was proposed, taken over all processes. Reading waits for the all-gather, and so for the step before it."""

    def __init__(self, flags: Array | np.ndarray):
        self._flags = flags

    def _read(self) -> np.ndarray:
        self._flags = np.asarray(self._flags)
        return self._flags

    @property
    def signal(self) -> int:
        """The signal that asks to stop, the largest where processes got several; 0 for none."""
        return int(self._read()[0])

    @property
    def more(self) -> bool:
        """Whether any process has another batch."""
        return bool(self._read()[1])

    @property
    def failed(self) -> bool:
        """Whether any process met an error."""
        return bool(self._read()[2])


class Agreement:
    """One small all-gather a step, which tells every process the same at the same step.

    It is dispatched before a step and read before the next one, so the host still runs one step ahead of the device.
    All calls must come from the main thread, in the same order on all processes: collectives are matched by order.
    A single process asks nobody.
    """

    def __init__(self, preemption: Preemption, mesh: Mesh):
        self._preemption, self._several = preemption, jax.process_count() > 1
        self._mesh = mesh
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda flags: flags.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._of_step = self._of_check = Answer(np.zeros(3, np.int32))

    def propose(self, *, more: bool, failed: bool = False) -> Answer:
        """Send off what this process knows about the step after the one that is dispatched next."""
        self._of_step = self._gather(more, failed)
        return self._of_step

    def started(self) -> None:
        """Say that a step is done (see `Preemption`)."""
        self._preemption.started()

    def stopping(self) -> int:
        """The signal after which to stop once the step under way is done, 0 for none: the same on all processes."""
        return self._of_step.signal if self._several else self._preemption.requested

    def signal(self) -> int:
        """The signal that made `check` raise `Interrupted`, or work of this process."""
        return self._of_check.signal or self._preemption.requested

    def check(self) -> None:
        """Raise `Interrupted` where any process was asked to stop by the time of the check before this one.

        For work between two steps, such as an evaluation. All processes raise at the same check.
        """
        if not self._several:
            self._preemption.check()
            return
        before, self._of_check = self._of_check, self._gather(False, False)
        if before.signal:
            self._of_check = before
            raise Interrupted

    def _gather(self, more: bool, failed: bool) -> Answer:
        flags = np.array([[self._preemption.requested, more, failed]], np.int32)
        if not self._several:
            return Answer(flags[0])
        rows = jax.make_array_from_callback((self._mesh.size, 3), self._places, lambda index: flags)
        return Answer(self._largest(rows))


class Stream(Protocol):
    """This process's rows of the global batches."""

    def __next__(self) -> Batch: ...

    def has_next(self) -> bool:
        """Whether another batch comes; waits until that is known."""
        ...

    def padding(self) -> Batch:
        """A batch of padding, of the same shape."""
        ...


class Lockstep(Iterator[Batch]):
    """As many batches on every process: one that is exhausted adds batches of padding until all are.

    An error in one process's data ends all of them after the same step.
    """

    def __init__(self, stream: Stream, agreement: Agreement):
        self._stream, self._agreement = stream, agreement
        self._answer: Answer | None = None
        self._error: Exception | None = None

    def __next__(self) -> Batch:
        if jax.process_count() == 1:
            return next(self._stream)
        answer = self._answer or self._look_ahead()
        if self._error is not None:
            raise self._error
        if answer.failed:
            raise ValueError("another process cannot go on with its data: its own output says why")
        if not answer.more:
            raise StopIteration
        batch = next(self._stream) if self._stream.has_next() else self._stream.padding()
        self._answer = self._look_ahead()
        return batch

    def _look_ahead(self) -> Answer:
        more = False
        try:
            more = self._stream.has_next()
        except Exception as error:  # whatever it is, it is raised once the others know
            self._error = error
        return self._agreement.propose(more=more, failed=self._error is not None)
