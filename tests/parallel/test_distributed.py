import importlib.util
import logging

import jax
import pytest

from jaxtrain.config.distributed import DistributedSection
from jaxtrain.parallel.distributed import initialize_distributed

JAX = {"JAX_COORDINATOR_ADDRESS": "one:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the calls of jax.distributed.initialize."""
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: found.append(options))
    return found


@pytest.mark.parametrize(
    ("environ", "joins"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "one"}, False),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "one", "TPU_WORKER_HOSTNAMES": "one"}, True),
        (JAX, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "one"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "one"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_only_a_job_of_several_processes_is_joined(environ, joins, calls):
    assert initialize_distributed(DistributedSection(), environ) is None  # the fake one has joined no others
    assert bool(calls) == joins


@pytest.mark.parametrize("installed", [True, False])
def test_a_pod_of_an_indexed_job_is_joined_by_the_kubernetes_client(installed, calls, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    with caplog.at_level(logging.INFO):
        initialize_distributed(DistributedSection(), {"JOB_COMPLETION_INDEX": "0"})
    assert bool(calls) == installed
    assert ("install the package kubernetes" in caplog.text) != installed


def test_the_timeouts_are_those_of_the_config(calls):
    section = DistributedSection(initialization_timeout=7, heartbeat_timeout=8, shutdown_timeout=9)
    initialize_distributed(section, JAX)
    assert calls == [
        {
            "coordinator_address": "one:1234",
            "num_processes": 2,
            "process_id": 1,
            "initialization_timeout": 7,
            "heartbeat_timeout_seconds": 8,
            "shutdown_timeout_seconds": 9,
        }
    ]


def test_a_job_that_was_joined_already_is_not_joined_again(calls, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    initialize_distributed(DistributedSection(), JAX)
    assert calls == []


def test_a_coordinator_without_a_place_in_the_job_is_an_error():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID"):
        initialize_distributed(DistributedSection(), {"JAX_COORDINATOR_ADDRESS": "one:1234"})
