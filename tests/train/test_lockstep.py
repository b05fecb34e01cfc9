import signal

import jax
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.train.lockstep import Agreement, Decision, Lockstep
from jaxtrain.train.preemption import Interrupted, Preemption
from jaxtrain.train.watchdog import Watchdog


class Batches:
    """A stream of `count` batches of a process; with `error`, an exception after the last."""

    def __init__(self, count, error=None):
        self.left, self.error = count, error

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return tiny.packed_batch([[5]], 8)

    def has_next(self):
        if not self.left and self.error:
            raise self.error
        return self.left > 0

    def padding(self):
        return tiny.packed_batch([[]], 8)


class Others:
    """The agreement with another process that has `count` batches, or an error in its data after them."""

    def __init__(self, count, failed=False):
        self.left, self.failed = count, failed
        self.watchdog = Watchdog()

    def propose(self, *, more, failed=False):
        others, self.left = self.left > 0, self.left - 1
        return Decision([0, more or others, failed or (self.failed and not others), 0])


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)


def weights(lockstep):
    return [int(batch.segment_ids.sum()) for batch in lockstep]


@pytest.mark.parametrize(("ours", "theirs"), [(3, 1), (1, 3), (2, 2), (0, 2)])
def test_a_process_without_data_takes_steps_of_padding(two_processes, ours, theirs):
    assert weights(Lockstep(Batches(ours), Others(theirs))) == [5] * ours + [0] * (theirs - ours)


def test_an_error_of_the_data_is_raised_after_the_batches_before_it(two_processes):
    lockstep = Lockstep(Batches(1, KeyError("row 7")), Others(3))
    assert int(next(lockstep).segment_ids.sum()) == 5
    with pytest.raises(KeyError, match="row 7"):
        next(lockstep)


def test_the_error_of_another_process_ends_this_one(two_processes):
    lockstep = Lockstep(Batches(5), Others(1, failed=True))
    next(lockstep)
    with pytest.raises(ValueError, match="another process cannot go on with its data"):
        next(lockstep)


def test_one_process_takes_its_stream_as_it_is():
    agreement = Agreement(Preemption(), make_mesh(MeshSection()))
    assert weights(Lockstep(Batches(2), agreement)) == [5, 5]


def test_one_process_decides_by_its_own_signals():
    preemption = Preemption()
    agreement = Agreement(preemption, make_mesh(MeshSection()))
    decision = agreement.propose(more=True)
    assert (decision.signal, decision.more, decision.failed) == (0, True, False)
    agreement.check()
    assert agreement.stopping() == 0
    preemption._requested = signal.SIGTERM
    assert agreement.stopping() == agreement.signal() == signal.SIGTERM
    with pytest.raises(Interrupted):
        agreement.check()
