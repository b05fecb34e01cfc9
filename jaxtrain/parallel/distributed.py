"""Joins the processes of a job: `jax.distributed`, and the connections of `jaxtrain.parallel.peers`.

The only module that uses private names of JAX's distributed runtime; tried with jax 0.10.2.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed

from jaxtrain.config.distributed import DistributedSection
from jaxtrain.parallel import peers

log = logging.getLogger(__name__)

_KEY = "jaxtrain/peers"  # in the key-value store of jax.distributed


def initialize_distributed(section: DistributedSection, environ: Mapping[str, str] = os.environ) -> peers.Peers | None:
    """Join the other processes that a launcher has started. Must precede other uses of JAX; further calls are allowed.

    JAX detects TPU pods, Slurm, Open MPI and Kubernetes jobs; other launchers set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, or have called `jax.distributed.initialize`. The log names the launcher.
    Returns None in a job of one process, and in another thread than the main one, where Ray Train calls the function of
    a worker: Ray ends the other workers itself if one fails.

    Raises ValueError if JAX_COORDINATOR_ADDRESS is set and one of the others is not, or if process 0 has no reachable
    port for connections of `Peers`.
    """
    # The service would install a handler of SIGTERM, which `train.preemption` handles.
    jax.config.update("jax_enable_preemption_service", False)
    if peers.current is not None:
        return peers.current
    if jax.distributed.is_initialized():
        launcher = "a launcher that has initialized jax.distributed"
    elif (found := _find_launcher(environ)) is None:
        return None
    else:
        launcher, arguments = found
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=section.initialization_timeout,
            heartbeat_timeout_seconds=section.heartbeat_timeout,
            shutdown_timeout_seconds=section.shutdown_timeout,
        )
    state = distributed.global_state
    if state.num_processes == 1:
        return None
    log.info("process %d of %d, started by %s", state.process_id, state.num_processes, launcher)
    if threading.current_thread() is not threading.main_thread():
        return None
    _delay_abort()
    peers.current = _connect(section)
    return peers.current


def _find_launcher(environ: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """The launcher that has started several processes, and the arguments of `jax.distributed.initialize`."""
    if "JAX_COORDINATOR_ADDRESS" in environ:
        if not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= environ.keys():
            raise ValueError("JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be too")
        return "a launcher that sets JAX_COORDINATOR_ADDRESS", {
            "coordinator_address": environ["JAX_COORDINATOR_ADDRESS"],
            "num_processes": int(environ["JAX_NUM_PROCESSES"]),
            "process_id": int(environ["JAX_PROCESS_ID"]),
        }
    if "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return "TPU multislice", {}
    if len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return "a TPU pod", {}
    if int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "Slurm", {}
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI", {}
    if "JOB_COMPLETION_INDEX" in environ and "TPU_WORKER_HOSTNAMES" not in environ:
        if importlib.util.find_spec("kubernetes"):
            return "a Kubernetes job", {}
        log.info(
            "a pod of an indexed Kubernetes job: for a job of several pods install the package kubernetes, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    return None


def _delay_abort() -> None:
    """Let a thread that aborts the process sleep for 6 seconds first.

    JAX's client aborts its process as soon as process 0 has ended. `Peers` needs about a second to end it with the exit
    code and the message of the failure instead. The client's `missed_heartbeat_callback` cannot be a Python function:
    its argument has no Python type. A handler of Python's `signal` would run in the main thread, when it is too late;
    `sleep`, which POSIX allows in handlers, sleeps for as many seconds as the number of SIGABRT.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _connect(section: DistributedSection) -> peers.Peers:
    state = distributed.global_state
    within, unreachable = section.initialization_timeout, section.unreachable_timeout
    client: Any = state.client
    if state.process_id == 0:
        token = secrets.token_hex(16)
        try:
            ours, port = peers.Peers.listen(state.num_processes, token, section.port, within, unreachable)
        except OSError as error:
            raise ValueError(f"distributed.port={section.port} cannot be opened: {error}") from error
        client.key_value_set(_KEY, json.dumps([port, token]))
        return ours
    port, token = json.loads(client.blocking_key_value_get(_KEY, within * 1000))
    address = state.coordinator_address
    assert address is not None
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        return peers.Peers.connect(state.process_id, (host, port), token, within, unreachable)
    except OSError as error:
        raise ValueError(
            f"process {state.process_id} cannot connect to process 0 at {host}:{port} ({error}): open this port "
            "between the hosts, or choose an open one with distributed.port"
        ) from error
