import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.preemption import SIGNALS, Interrupted, Preemption, exit_code

PRELUDE = """
import os, signal, sys, time
from jaxtrain.train.preemption import Interrupted, Preemption, exit_code
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen) -> str:
    return process.communicate(timeout=120)[0]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_once_a_step_is_done(number):
    called = threading.Event()
    before = signal.getsignal(number)
    with Preemption() as preemption:
        preemption.started()
        preemption.on_request(called.set)
        preemption.check()
        assert preemption.requested == 0
        os.kill(os.getpid(), number)
        assert preemption.requested == number
        assert called.wait(5)
        with pytest.raises(Interrupted):
            preemption.check()
        late = threading.Event()
        preemption.on_request(late.set)
        assert late.is_set()
    assert signal.getsignal(number) == before
    assert exit_code(number) == 128 + number


def test_before_the_first_step_the_main_thread_is_interrupted_where_it_waits():
    start = time.monotonic()
    with pytest.raises(Interrupted) as raised, Preemption() as preemption, preemption:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()
        threading.Event().wait(30)
    assert time.monotonic() - start < 10
    assert raised.value.exit_code == 129
    assert "SIGHUP: stopped before the first step" in str(raised.value)


def test_a_signal_that_arrives_while_the_context_is_entered_has_its_exit_code():
    class Signalled(Preemption):
        def _install(self):
            super()._install()
            signal.raise_signal(signal.SIGHUP)

    preemption = Signalled()
    with pytest.raises(Interrupted) as raised, preemption:
        pass
    preemption._restore()  # as the end of the process does
    assert raised.value.exit_code == 129


def test_a_main_thread_that_does_not_answer_is_ended():
    # As one that compiles: what is raised in a finaliser is dropped.
    code = """
    class Deaf:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(60)
    with Preemption():
        deaf = Deaf()
        del deaf
        time.sleep(60)
    """
    process = spawn(code)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    said = output(process)
    assert process.returncode == 143, said
    assert "nothing new to save" in said
    assert "Traceback" not in said
    assert time.monotonic() - start < 15


def test_other_errors_of_finalisers_are_still_printed():
    code = """
    class Broken:
        def __del__(self):
            raise ValueError("of a finaliser")
    before = sys.unraisablehook
    with Preemption():
        Broken()
    assert sys.unraisablehook is before
    """
    process = spawn(code)
    said = output(process)
    assert process.returncode == 0 and "ValueError: of a finaliser" in said, said


def test_a_second_sigint_ends_the_process_at_once():
    code = """
    with Preemption() as preemption:
        preemption.started()
        print("ready", flush=True)
        while not preemption.requested:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(60)
    """
    process = spawn(code)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # others that follow do not disturb the saving
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "without saving" in output(process)
    assert process.returncode == 130
    assert time.monotonic() - start < 10


def test_sighup_stays_ignored_under_nohup():
    code = """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Preemption() as preemption:
        preemption.started()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        assert preemption.requested == 0
    print("alive")
    """
    assert output(spawn(code)).endswith("alive\n")


def test_outside_the_context_signals_do_what_they_did():
    code = """
    with Preemption() as preemption:
        preemption.started()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested == signal.SIGTERM
    print("outside", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    """
    process = spawn(code)
    assert "outside" in output(process)
    assert process.returncode == -signal.SIGTERM


HOST = """
    import json
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxtrain.train.checkpoint import Checkpoints
    from jaxtrain.train.lockstep import Agreement
    folder, address, host = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(address, num_processes=2, process_id=host)
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), (jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    values = np.arange(64.0, dtype=np.float32)
    state = {"w": jax.make_array_from_callback((64,), sharding, lambda index: values[index])}
    mine = {str(shard): {"read": shard, "bins": "x" * (host * 10)} for shard in range(4 * host, 4 * host + 4)}
    with Preemption() as preemption, Checkpoints(folder, every=1, keep=2) as checkpoints:
        agreement = Agreement(preemption, mesh)
        agreement.started()
        for step in range(1, 10_000):
            print("step", step, flush=True)
            time.sleep(0.01 * (1 + host))
            answer = agreement.propose(more=step < 3 and host == 1)
            assert answer.more == (step < 3)
            if agreement.stopping():
                checkpoints.save(step, state, mine, {"host": host})
                checkpoints.wait()
                restored = checkpoints.restore(state)
                assert sorted(restored.data_state) == sorted(map(str, range(8))), restored.data_state
                print("stopped", step, flush=True)
                sys.exit(exit_code(agreement.stopping()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_two_hosts_stop_at_one_step_and_one_host_goes_on(tmp_path, number):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    hosts = [spawn(HOST, tmp_path, address, host) for host in range(2)]
    for line in hosts[0].stdout or ():
        if line.startswith("step 3"):
            break
    hosts[1].send_signal(number)
    said = [output(host) for host in hosts]
    assert [host.returncode for host in hosts] == [exit_code(number)] * 2, said
    stopped = [re.findall(r"stopped (\d+)", text) for text in said]
    assert len(stopped[0]) == 1 and stopped[0] == stopped[1]
    restored = Checkpoints(tmp_path, 1, 1).restore({"w": jax.ShapeDtypeStruct((64,), jnp.float32)})
    assert restored is not None
    assert restored.step == int(stopped[0][0])
    assert sorted(restored.data_state, key=int) == [str(shard) for shard in range(8)]
    np.testing.assert_array_equal(restored.state["w"], np.arange(64.0))
