"""A save that fails is attempted again, and the third failure in a row is an error."""

import os
import re
import socket
import subprocess
import sys
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


ON_ONE_OF_TWO = """
import resource, signal, sys, time, warnings
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from jaxtrain.train.checkpoint import CheckpointError, Checkpoints

address, folder = sys.argv[1:3]
process, failing, times = map(int, sys.argv[3:])
jax.distributed.initialize(address, 2, process)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits, attempts = resource.getrlimit(resource.RLIMIT_FSIZE), []
begin, create = Checkpoints._begin, AtomicRenameTemporaryPath.create

def limited(checkpoints, save):
    attempts.append(save.step)
    if process == failing == 1:
        size = 10_000 if len(attempts) <= times else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    begin(checkpoints, save)

async def refused(path):
    if process == failing and len(attempts) <= times:
        raise OSError(27, "File too large")
    return await create(path)

Checkpoints._begin, AtomicRenameTemporaryPath.create = limited, refused
rows = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
state = {"w": jax.make_array_from_callback((2, 500_000), rows, lambda at: np.ones((2, 500_000), np.float32)[at])}
warnings.simplefilter("always")
checkpoints = Checkpoints(folder, 1, 1)
start = time.monotonic()
with warnings.catch_warnings(record=True) as warned:
    try:
        checkpoints.save(1, state, {}, {})
        while not checkpoints._has_failed() and failing == process:
            time.sleep(0.05)
        checkpoints.close()
        print("saved", checkpoints.restore(state).state["w"].shape)
    except CheckpointError as error:
        print(error)
warned = {str(each.message) for each in warned if "could not save" in str(each.message)}
print(len(warned), *warned, sep="|")
print(len(attempts), time.monotonic() - start)
"""


@pytest.mark.parametrize(("failing", "times"), [(1, 1), (0, 3)])
def test_a_save_that_fails_on_one_process_fails_soon_on_both(tmp_path, failing, times):
    """Process 1 cannot write its files, for which process 0 waits at a barrier; process 0 cannot make the folders, for
    which process 1 waits in the key-value store."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ON_ONE_OF_TWO, address, str(tmp_path / "run"), *map(str, (n, failing, times))],
            env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for printed in outputs:
        result, warned, end = printed[-3:]
        culprit = rf"could not save step 1 .*: process {failing} on {socket.gethostname()}: \w+Error: .*File too large"
        assert re.search(culprit, warned), printed
        attempts, seconds = end.split()
        assert int(attempts) == min(times + 1, 3) and float(seconds) < 60
        assert result == "saved (2, 500000)" if times < 3 else re.search(culprit, result)
