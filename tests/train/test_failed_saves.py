"""A save that fails is attempted again, and the third failure in a row is an error."""

import resource
import signal
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from jaxtrain.train import checkpoint
from jaxtrain.train.checkpoint import CheckpointError, Checkpoints


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(checkpoint, "_RETRY_AFTER", 0.0)


class Refused:
    """Orbax refuses to write a number of `times`."""

    def __init__(self, monkeypatch, times: int):
        self.attempts, write = 0, ocp.training.Checkpointer.save_checkpointables_async

        def refuse(writer, step, parts, **arguments):
            self.attempts += 1
            if self.attempts > times:
                return write(writer, step, parts, **arguments)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", refuse)


def test_a_failed_save_is_attempted_again_while_its_arrays_exist(tmp_path, monkeypatch, no_delay):
    refused, state = Refused(monkeypatch, times=1), {"w": jnp.arange(8.0)}
    with pytest.warns(RuntimeWarning, match="could not save step 1 .*No space left.*attempted again"):  # noqa: SIM117
        with Checkpoints(str(tmp_path), 1, 1) as checkpoints:
            checkpoints.save(1, state, {}, {})
    assert refused.attempts == 2
    restored = Checkpoints(str(tmp_path), 1, 1).restore(state)
    assert restored is not None
    assert (restored.state["w"] == state["w"]).all()


def test_a_failed_save_does_not_replace_the_error_that_ends_the_run(tmp_path):
    """Orbax's threads fail while they write; the writer would raise their error when it is closed."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (
            pytest.raises(KeyError, match="of the run"),
            pytest.warns(RuntimeWarning, match="could not save step 1"),
            Checkpoints(str(tmp_path), 1, 1) as checkpoints,
        ):
            checkpoints.save(1, {"w": jnp.arange(1_000_000.0)}, {}, {})
            raise KeyError("of the run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_after_a_failed_save_whose_arrays_were_donated_a_newer_step_is_overdue(tmp_path, monkeypatch, no_delay):
    Refused(monkeypatch, times=1)
    older, newer = {"w": jnp.arange(8.0)}, {"w": jnp.ones(8)}
    with Checkpoints(str(tmp_path), 100, 1) as checkpoints:
        checkpoints.save(1, older, {}, {})
        assert checkpoints.overdue()
        older["w"].delete()
        with pytest.warns(RuntimeWarning, match="step 1 .*a newer step is saved"):
            checkpoints.save(2, newer, {}, {})
        checkpoints.wait()
        assert not checkpoints.overdue()
    assert checkpoints.steps() == [2]


def test_three_failures_in_a_row_are_an_error_and_a_success_starts_the_count_anew(tmp_path, monkeypatch, no_delay):
    state = {"w": jnp.arange(8.0)}
    with Checkpoints(str(tmp_path), 1, 5) as checkpoints:
        for step in (0, 1, 2):
            with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match="attempted again"):
                Refused(patched, times=1)
                checkpoints.save(step, state, {}, {})
                checkpoints.wait()
        Refused(monkeypatch, times=3)
        with (
            pytest.warns(RuntimeWarning),
            pytest.raises(CheckpointError, match=r"could not save step 3 .*step 2"),
        ):
            checkpoints.save(3, state, {}, {})
            checkpoints.wait()


def test_a_checkpoint_is_overdue_when_its_minutes_have_passed_since_the_last(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Checkpoints(str(tmp_path), 1000, 1, minutes=2) as checkpoints:
        assert not checkpoints.overdue()
        now[0] += 121
        assert checkpoints.overdue()
        checkpoints.save(1, {"x": jax.numpy.arange(3.0)}, {"0": {}}, {})
        assert not checkpoints.overdue()
    assert not Checkpoints(str(tmp_path), 1000, 1).overdue()
