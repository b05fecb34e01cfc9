"""A save of two processes that fails on one of them."""

import os
import re
import socket
import subprocess
import sys

import pytest

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
        outputs = [process.communicate(timeout=280)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for printed in outputs:
        result, warned, end = printed[-3:]
        culprit = rf"could not save step 1 .*: process {failing} on {socket.gethostname()}: \w+Error: .*File too large"
        assert re.search(culprit, warned), printed
        attempts, seconds = end.split()
        assert int(attempts) == min(times + 1, 3) and float(seconds) < 200  # orbax's shortest timeout is 300
        assert result == "saved (2, 500000)" if times < 3 else re.search(culprit, result)
