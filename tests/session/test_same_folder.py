"""A `run.dir` that is another folder on another host is found at start, by all processes."""

import os
import socket
import subprocess
import sys

import pytest

HOST = """
import sys
import jax
from jaxtrain.config import parse_config
from jaxtrain.session import folder
address, host, run = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(address, num_processes=2, process_id=host)
folder._VISIBLE_WITHIN = 0.5
tree = {"recipe": "sft", "run": {"dir": run}, "model": {"config": {}}, "data": {"train": {"rows": [{"text": "x"}]}}}
try:
    with folder.open_run(parse_config(tree)):
        print("opened")
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("shared", [True, False])
def test_two_hosts_open_the_same_folder_or_none(tmp_path, shared):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    hosts = []
    for host in range(2):
        place = tmp_path / ("shared" if shared else f"host{host}")
        place.mkdir(exist_ok=True)
        command = [sys.executable, "-c", HOST, address, str(host), str(place / "run")]
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        hosts.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [host.communicate(timeout=120)[0] for host in hosts]
    for text in said:
        if shared:
            assert text.endswith("opened\n"), text
        else:
            assert "is not the same folder on all hosts: the processes 1 do not see what process 0 wrote there" in text
    assert not list(tmp_path.glob("*/run"))  # a start that is refused, or does nothing, leaves nothing behind
