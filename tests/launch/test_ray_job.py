"""The Ray job: what the client gets, and how it is followed."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from launch_stubs import write_config
from ray.job_submission import JobStatus

from jaxtrain.launch import ray_job
from jaxtrain.launch.job import make_job
from jaxtrain.launch.ray_driver import RayTask
from jaxtrain.launch.ray_job import RayBackend


@pytest.fixture
def job(tmp_path):
    return make_job(write_config(tmp_path), ["data.train.path=a 'b'"], nodes=2, retries=4, name=None)


class Client:
    """Of a cluster that runs the job at once."""

    def __init__(self, status: JobStatus, code: int | None) -> None:
        self.infos = [
            SimpleNamespace(status=JobStatus.RUNNING, driver_exit_code=None, message=""),
            SimpleNamespace(status=status, driver_exit_code=code, message="the end"),
        ]

    def submit_job(self, *, entrypoint, runtime_env, metadata):
        self.entrypoint, self.runtime_env, self.metadata = entrypoint, runtime_env, metadata
        folder = Path(runtime_env["working_dir"])
        self.sent = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        return "raysubmit_1"

    async def tail_job_logs(self, number):
        yield "step 1\n"
        raise RuntimeError("connection closed")

    def get_job_info(self, number):
        return self.infos.pop(0)


def test_the_driver_gets_the_job_and_the_options(job):
    options = ["resources_per_worker={GPU: 8}", "env={NCCL_DEBUG: INFO}"]
    rendered = yaml.safe_load(RayBackend.from_options(None, options).render(job))
    *program, task = shlex.split(rendered["entrypoint"])
    assert program == ["python", "-m", "jaxtrain.launch.ray_driver"]
    assert RayTask(**json.loads(task)) == RayTask(
        config="sft.yaml",  # in the folder that is sent
        overrides=["data.train.path=a 'b'"],
        nodes=2,
        retries=4,
        name="tiny",
        resources_per_worker={"GPU": 8.0},
    )
    assert rendered["runtime_env"]["env_vars"] == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, None, 1), (JobStatus.STOPPED, None, 1)],
)
def test_a_job_is_submitted_and_followed_to_its_end(job, monkeypatch, capsys, status, code, expected):
    monkeypatch.setattr(ray_job, "_POLL_SECONDS", 0.01)
    client = Client(status, code)
    monkeypatch.setattr(RayBackend, "_client", lambda self: client)
    assert RayBackend().submit(job) == expected
    assert client.sent == {"sft.yaml": job.config.read_text()}
    assert capsys.readouterr().out == "step 1\n"


def test_a_working_dir_is_sent_whole(job, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_job, "_POLL_SECONDS", 0.01)
    client = Client(JobStatus.SUCCEEDED, 0)
    monkeypatch.setattr(RayBackend, "_client", lambda self: client)
    (tmp_path / "rewards.py").write_text("# mine\n")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    above = make_job(Path("../sft.yaml"), [], nodes=1, retries=0, name=None)
    assert RayBackend(working_dir=Path("..")).submit(above) == 0
    assert set(client.sent) == {"sft.yaml", "rewards.py"}
    assert json.loads(shlex.split(client.entrypoint)[-1])["config"] == "sft.yaml"
    with pytest.raises(ValueError, match="is not in working_dir="):
        RayBackend(working_dir=Path()).submit(above)
