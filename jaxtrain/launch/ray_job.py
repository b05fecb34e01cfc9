"""A job of a Ray cluster, such as one of KubeRay."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat

from jaxtrain.config.load import merged_text
from jaxtrain.launch.backend import Backend
from jaxtrain.launch.job import LaunchJob, shell_words

log = logging.getLogger(__name__)

_POLL_SECONDS = 5.0


class RayBackend(Backend):
    """A job whose driver, `jaxtrain.launch.ray_driver`, trains with Ray's JaxTrainer. Needs `jaxtrain[ray]`.

    The cluster's image has jaxtrain, and its nodes share the file system of `run.dir`.

    address: of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the cluster of this machine.
    working_dir: a folder that is sent to the cluster and contains CONFIG; default: CONFIG alone is sent.
    resources_per_worker: for example {GPU: 8}; a worker is one process.
    accelerator_type, topology: of a TPU slice, for example TPU-V5P and 4x4x4.
    """

    address: str | None = None
    working_dir: Path | None = None
    resources_per_worker: dict[str, PositiveFloat] = Field(default_factory=dict)
    accelerator_type: str | None = None
    topology: str | None = None

    def render(self, job: LaunchJob) -> str:
        submission = {"entrypoint": self._entrypoint(job), "runtime_env": self._runtime_env(job)}
        return yaml.safe_dump(submission, sort_keys=False, width=1000)

    def submit(self, job: LaunchJob) -> int:
        """Submit the job and show its output until it ends. Ctrl-C leaves it running."""
        client = self._client()
        with _sent_folder(self.working_dir, job.config) as folder:
            runtime_env = self._runtime_env(job) | {"working_dir": str(folder)}
            number = client.submit_job(
                entrypoint=self._entrypoint(job), runtime_env=runtime_env, metadata={"job_name": job.name}
            )
        log.info("submitted job %s", number)
        try:
            return _follow(client, number)
        except KeyboardInterrupt:
            log.info("job %s goes on; `ray job stop %s` ends it", number, number)
            return 130

    def _client(self) -> Any:
        if importlib.util.find_spec("ray") is None:
            raise ValueError("the backend ray needs `pip install 'jaxtrain[ray]'`")
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(self.address)
        except (ConnectionError, RuntimeError, RayError) as error:
            raise OSError(f"cannot connect to the Ray cluster at {self.address or 'this machine'}: {error}") from None

    def _sent_config(self, job: LaunchJob) -> str:
        """The path of the config in the job's working directory."""
        if self.working_dir is None:
            return job.config.name
        folder, config = self.working_dir.resolve(), job.config.resolve()
        if not config.is_relative_to(folder):
            raise ValueError(f"{job.config} is not in working_dir={self.working_dir}, which is what the cluster gets")
        return str(config.relative_to(folder))

    def _entrypoint(self, job: LaunchJob) -> str:
        task = {
            "config": self._sent_config(job),
            "overrides": list(job.overrides),
            "nodes": job.nodes or 1,
            "retries": job.retries,
            "name": job.name,
            "resources_per_worker": self.resources_per_worker,
            "accelerator_type": self.accelerator_type,
            "topology": self.topology,
        }
        return shell_words(["python", "-m", "jaxtrain.launch.ray_driver", json.dumps(task)])

    def _runtime_env(self, job: LaunchJob) -> dict[str, Any]:
        folder = self.working_dir if self.working_dir is not None else f"a folder with {job.config.name}"
        return {"working_dir": str(folder), "env_vars": self.env}


@contextmanager
def _sent_folder(working_dir: Path | None, config: Path) -> Iterator[Path]:
    """The folder that Ray uploads."""
    if working_dir is not None:
        yield working_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, config.name).write_text(merged_text(config))
        yield Path(folder)


def _follow(client: Any, number: str) -> int:
    """Print what the driver and the workers write until the job has ended. Returns its exit code."""
    asyncio.run(_print_logs(client, number))
    while not (info := client.get_job_info(number)).status.is_terminal():
        time.sleep(_POLL_SECONDS)  # the connection for the logs was lost
    log.info("job %s: %s", number, info.status.value)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None and info.message:
        log.error("%s", info.message)
    return info.driver_exit_code or 1


async def _print_logs(client: Any, number: str) -> None:
    try:
        async for text in client.tail_job_logs(number):
            print(text, end="", flush=True)
    except RuntimeError as error:
        log.warning("%s: waiting for the end of the job without its output", error)
