"""The driver of a Ray job: `python -m jaxtrain.launch.ray_driver TASK`, where TASK is a JSON object of `RayTask`.

Ray's JaxTrainer starts the workers, one process on each node, and calls `jax.distributed.initialize` in them. It is
alpha; this file was written for Ray 2.60.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from jaxtrain.launch.exits import USER_ERROR, describe_exit, may_restart
from jaxtrain.observe.logs import log_to_stderr
from jaxtrain.train.preemption import error_code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayTask:
    """What `RayBackend` asks of the driver; its fields are those of a `LaunchJob` and of the backend."""

    config: str
    overrides: list[str]
    nodes: int
    retries: int
    name: str
    resources_per_worker: dict[str, float]
    accelerator_type: str | None = None
    topology: str | None = None


class _StoppedRunError(Exception):
    """The run ended with another exit code than 0. Its argument is the code."""


def train_on_ray(task: RayTask) -> int:
    """Train, and restart from the last checkpoint after a failure. Returns the exit code.

    Every attempt gets new workers. Ray's own retries would also repeat an error of the config.
    """
    code = 0
    for restart in range(task.retries + 1):
        if restart:
            log.warning("starting again from the last checkpoint: restart %d of %d", restart, task.retries)
        code = _attempt(task)
        if not may_restart(code):
            break
        log.error("the run ended with %s", describe_exit(code))
    return code


def _attempt(task: RayTask) -> int:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    tpu = task.topology is not None
    gpu = "GPU" in task.resources_per_worker
    # With neither of them JaxTrainer does not connect the workers; on CPUs it connects them as for GPUs.
    variables = {} if tpu or gpu else {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as storage:  # Ray's own record; the run's folder has everything else
        trainer = JaxTrainer(
            _train,
            train_loop_config={"config": task.config, "overrides": task.overrides},
            jax_config=JaxConfig(use_tpu=tpu, use_gpu=not tpu),
            scaling_config=ScalingConfig(
                num_workers=task.nodes,
                use_gpu=gpu,
                use_tpu=tpu,
                topology=task.topology,
                accelerator_type=task.accelerator_type,
                resources_per_worker=dict(task.resources_per_worker) or None,
            ),
            run_config=RunConfig(
                name=task.name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": variables},
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            return _exit_code(error.worker_failures)
        except TrainingFailedError as error:
            log.error("%s", error)
            return 1
    return 0


def _train(given: dict[str, Any]) -> None:
    """What each worker does, in a thread of a process in which Ray has initialised `jax.distributed`."""
    from jaxtrain.recipes.run import run_file

    log_to_stderr()
    if code := run_file(given["config"], given["overrides"]):
        raise _StoppedRunError(code)


def _exit_code(failures: dict[int, Exception]) -> int:
    """That of `jaxtrain train` for the workers' exceptions; an error of the user's is the cause of the others."""
    codes = []
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)  # Ray wraps what a worker raised
        log.error("worker %d: %s", rank, cause)
        codes.append(cause.args[0] if isinstance(cause, _StoppedRunError) else error_code(cause))
    return USER_ERROR if USER_ERROR in codes else codes[0]


def main() -> None:
    log_to_stderr()
    # Relative paths are in the job's working directory, for workers too.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    sys.exit(train_on_ray(RayTask(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
