"""Jobs of two processes: one fails, is killed, stands still or is asked to stop while the other waits for it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

THIS = socket.gethostname()
HOST = """
import sys, time
import numpy as np
from jaxtrain.config.distributed import DistributedSection
from jaxtrain.train.job import Job
from jaxtrain.train.preemption import Interrupted, Preemption, exit_code

def steps(process, what):
    from jax.experimental import multihost_utils
    for step in range(1, 10_000):
        if step == 3:
            job.preemption.started()
            print("step 3", file=sys.stderr, flush=True)
            if what == "error" and process == 1:
                raise RuntimeError("row 17 is odd")
            while what == "slow" and process == 1 and not job.preemption.requested:
                time.sleep(0.01)  # the other process waits for this one
        with job.watchdog.waits(f"step {step}"):
            signals = multihost_utils.process_allgather(np.array(job.preemption.requested))
        if signals.any():
            print("stopped after", step, file=sys.stderr, flush=True)
            return exit_code(int(signals.max()))

process, what = int(sys.argv[1]), sys.argv[2]
try:
    with Preemption() as preemption:
        with Job(preemption, DistributedSection(step_timeout=3)) as job:
            if what == "start":
                print("step 0", file=sys.stderr, flush=True)
                time.sleep(60)
            code = steps(process, what)
    sys.exit(code)
except Interrupted as stopped:
    sys.exit(stopped.exit_code)
"""


def start(what: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    commands = [[sys.executable, "-c", HOST, str(process), what] for process in range(2)]
    return [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(process)}, stderr=subprocess.PIPE, text=True)
        for process, command in enumerate(commands)
    ]


@pytest.mark.parametrize(
    ("what", "signals", "codes", "said"),
    [
        ("error", [], [1, 1], f"process 1 on {THIS} failed, so all processes of the job end: RuntimeError: row 17 is"),
        ("", [(0, signal.SIGKILL)], [-9, 137], f"process 0 on {THIS} failed, so all processes of the job end: it was"),
        ("", [(1, signal.SIGKILL)], [137, -9], f"process 1 on {THIS} failed, so all processes of the job end: it was"),
        ("start", [(1, signal.SIGTERM)], [143, 143], "SIGTERM: stopped before the first step"),
        ("slow", [(0, signal.SIGTERM)], [143, 143], "stopped after 3"),
        # A process that stands still cannot end, and the one that waits for it must not save.
        ("", [(1, signal.SIGSTOP), (0, signal.SIGTERM)], [143, None], "has not come back within 3 seconds"),
    ],
    ids=["error", "kill 0", "kill 1", "SIGTERM at the start", "SIGTERM to one that waits", "SIGTERM and a frozen one"],
)
def test_both_processes_end_within_15_seconds(what, signals, codes, said):
    processes = start(what)
    try:
        outputs = [until_step(process) for process in processes]
        begin = time.monotonic()
        for target, number in signals:
            processes[target].send_signal(number)
        for index, process in enumerate(processes):
            if codes[index] is not None:
                assert process.stderr is not None
                outputs[index] += process.stderr.read()
                process.wait(60)
        assert time.monotonic() - begin < 15, outputs
        assert [process.poll() for process in processes] == codes, outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()
    survivors = [output for output, code in zip(outputs, codes, strict=True) if code is not None and code >= 0]
    assert all(said in output for output in survivors), outputs
    if None in codes:
        assert "Thread" in outputs[0] and "process_allgather" in outputs[0]
        assert f"process 1 on {THIS} does not answer" in outputs[0]
    else:
        assert not any("does not answer" in output for output in outputs), outputs
    if what != "error":
        assert not any("Traceback" in output for output in outputs), outputs


def until_step(process: subprocess.Popen) -> str:
    """What the process has written when it has reached the step."""
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if line.startswith("step"):
            return said
    raise AssertionError(said)


ALONE = """
import time
from jaxtrain.config.distributed import DistributedSection
from jaxtrain.train.job import Job
from jaxtrain.train.preemption import Preemption
with Preemption() as preemption, Job(preemption, DistributedSection(step_timeout=1)) as job:
    with job.watchdog.waits("step 9"):
        time.sleep(60)
"""


def test_the_watchdog_ends_a_run_of_one_process():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 124, done.stderr
    assert "error: step 9 has not come back within 1 seconds (distributed.step_timeout)" in done.stderr
    assert "most recent call first" in done.stderr
