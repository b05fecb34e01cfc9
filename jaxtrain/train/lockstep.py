"""Decisions that all processes of a run take together: whether to stop, and whether any of them has more data."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.train.agree import PeerError
from jaxtrain.train.preemption import Interrupted, Preemption
from jaxtrain.train.watchdog import Watchdog
from jaxtrain.types import Array, Batch


class Decision:
    """The maximum of the proposals of all processes. Reading it waits for the all-gather, and so for the last step."""

    def __init__(self, flags: Array | np.ndarray):
        self._flags = flags

    def _read(self) -> np.ndarray:
        self._flags = np.asarray(self._flags)
        return self._flags

    @property
    def signal(self) -> int:
        """The signal that requests to stop, the largest if processes received several; 0 for none."""
        return int(self._read()[0])

    @property
    def more(self) -> bool:
        """Whether any process has another batch."""
        return bool(self._read()[1])

    @property
    def failed(self) -> bool:
        """Whether any process had an error."""
        return bool(self._read()[2])

    @property
    def save_requested(self) -> bool:
        """Whether any process asked for a checkpoint."""
        return bool(self._read()[3])


class Agreement:
    """A small all-gather per step, so that all processes take the same decisions at the same step.

    It is dispatched before a step and read before the next one, so the host still runs one step ahead of the device.
    All calls must come from the main thread, in the same order on all processes: collectives are matched by order.
    With a single process there is no collective.
    """

    def __init__(
        self,
        preemption: Preemption,
        mesh: Mesh,
        save_due: Callable[[], bool] = lambda: False,
        watchdog: Watchdog | None = None,
    ):
        """`save_due` tells whether this process asks for a checkpoint."""
        self._preemption, self._several, self._save_due = preemption, jax.process_count() > 1, save_due
        self.watchdog = watchdog or Watchdog()  # of waits for the others and for data
        self._mesh = mesh
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda flags: flags.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._of_step = self._of_check = Decision(np.zeros(4, np.int32))

    def propose(self, *, more: bool, failed: bool = False) -> Decision:
        """Dispatch this process's proposal for the step after the one that is dispatched next."""
        self._of_step = self._gather(more, failed)
        return self._of_step

    def started(self) -> None:
        """Report that a step is done (see `Preemption`)."""
        self._preemption.started()

    def stopping(self) -> int:
        """The signal because of which to stop after the current step, 0 for none: the same on all processes."""
        with self.watchdog.waits("the agreement on a step"):
            return self._of_step.signal if self._several else self._preemption.requested

    def saving(self) -> bool:
        """Whether to save a checkpoint after the current step: the same on all processes."""
        return self._of_step.save_requested if self._several else self._save_due()

    def signal(self) -> int:
        """The signal because of which `check`, or other code of this process, raised `Interrupted`."""
        return self._of_check.signal or self._preemption.requested

    def check(self) -> None:
        """Raise `Interrupted` if any process had received a signal at the time of the previous check.

        For work between two steps, such as an evaluation. All processes raise at the same check.
        """
        if not self._several:
            self._preemption.check()
            return
        before, self._of_check = self._of_check, self._gather(False, False)
        if before.signal:
            self._of_check = before
            raise Interrupted

    def _gather(self, more: bool, failed: bool) -> Decision:
        flags = np.array([[self._preemption.requested, more, failed, self._save_due()]], np.int32)
        if not self._several:
            return Decision(flags[0])
        rows = jax.make_array_from_callback((self._mesh.size, 4), self._places, lambda index: flags)
        return Decision(self._largest(rows))


class AgreedSteps(Iterator[Batch]):
    """Batches of which all processes have equally many, with a proposal to stop or go on at each."""

    def __init__(self, batches: Iterable[Batch], agreement: Agreement):
        self._batches, self._agreement = iter(batches), agreement

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._agreement.propose(more=True)
        return batch


@runtime_checkable
class Stream(Protocol):
    """This process's rows of the global batches."""

    def __next__(self) -> Batch: ...

    def has_next(self) -> bool:
        """Whether there is another batch; waits until that is known."""
        ...

    def padding(self) -> Batch:
        """A batch of padding, of the same shape."""
        ...


class Lockstep(Iterator[Batch]):
    """Equally many batches on every process: a process whose data is exhausted gets batches of padding until all are.

    After an error in the data of one process, all processes raise at the same step.
    """

    def __init__(self, stream: Stream, agreement: Agreement):
        self._stream, self._agreement = stream, agreement
        self._decision: Decision | None = None
        self._error: Exception | None = None

    def __next__(self) -> Batch:
        watchdog = self._agreement.watchdog
        watchdog.waiting = ["the next batch"]
        try:
            return next(self._stream) if jax.process_count() == 1 else self._agreed()
        finally:
            watchdog.waiting = None

    def _agreed(self) -> Batch:
        decision = self._decision or self._peek_batch()
        if self._error is not None:
            raise self._error
        if decision.failed:
            raise PeerError("another process cannot go on with its data: see its own output for the reason")
        if not decision.more:
            raise StopIteration
        batch = next(self._stream) if self._stream.has_next() else self._stream.padding()
        self._decision = self._peek_batch()
        return batch

    def _peek_batch(self) -> Decision:
        more = False
        try:
            more = self._stream.has_next()
        except Exception as error:  # any error: raised in `__next__`, once the others have the flag
            self._error = error
        return self._agreement.propose(more=more, failed=self._error is not None)


def in_step(batches: Iterable[Batch], agreement: Agreement) -> Iterator[Batch]:
    """`batches` with an agreement at each: of a `Stream`, or of what all processes have equally many of."""
    return Lockstep(batches, agreement) if isinstance(batches, Stream) else AgreedSteps(batches, agreement)
