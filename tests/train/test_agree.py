"""Exchanges between processes, some of which fail."""

import os
import socket
import subprocess
import sys

import pytest

from jaxtrain.train.agree import from_process_0, gather_values, on_all
from jaxtrain.train.preemption import Interrupted

PROGRAM = """
import sys
import jax
from jaxtrain.train.agree import from_process_0, gather_values, on_all
from jaxtrain.train.preemption import Interrupted

address, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, process)
assert gather_values({"process": process, "text": "x" * (process + 1) * 1000}) == [
    {"process": number, "text": "x" * (number + 1) * 1000} for number in range(2)
]
assert on_all(lambda: process) == process

def fail(error):
    def work():
        if process == 1:
            raise error
    try:
        on_all(work)
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}"

failed, interrupted = fail(RuntimeError("no memory")), fail(Interrupted()).partition(":")[0]
print(failed, interrupted, from_process_0(lambda: f"of {process}"), sep="|")
"""


def test_all_processes_know_of_an_error_of_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(n)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    printed = [process.communicate(timeout=100)[0].splitlines()[-1] for process in processes]
    assert printed == [
        "PeerError: process 1 of 2 failed: RuntimeError: no memory|Interrupted|of 0",
        "RuntimeError: no memory|Interrupted|of 0",
    ]


def test_a_single_process_exchanges_nothing():
    value = object()
    assert gather_values(value) == [value]
    assert on_all(lambda: value) is value and from_process_0(lambda: value) is value
    with pytest.raises(Interrupted):
        on_all(lambda: (_ for _ in ()).throw(Interrupted()))
