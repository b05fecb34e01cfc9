"""The batch file: what bash and a stub of srun make of it, and how a job is followed."""

import os
import re
import subprocess

import pytest
from launch_stubs import path_with, write_config, write_stub

from jaxtrain.launch import slurm
from jaxtrain.launch.job import make_job
from jaxtrain.launch.slurm import SlurmBackend

OPTIONS = ["partition=gpu", "account=me", "time=12:00:00", "gpus_per_node=h100:8", "env={NOTE: it's two}"]


@pytest.fixture
def job(tmp_path):
    return make_job(write_config(tmp_path), ["data.train.path=a b.jsonl"], nodes=4, retries=2, name=None)


def bash(script: str, *options: str, **environ: str) -> subprocess.CompletedProcess:
    environ = os.environ | environ
    return subprocess.run(["bash", *options], input=script, capture_output=True, text=True, env=environ, check=False)


@pytest.mark.parametrize("options", [[], OPTIONS, ["exclusive=true", "container_image=nvcr.io#x", "sig_time=60"]])
def test_bash_reads_the_file(job, options):
    script = SlurmBackend.from_options(None, options).render(job)
    done = bash(script, "-n")
    assert (done.returncode, done.stderr) == (0, "")
    directives, body = script.split("\n\n", 1)
    assert "#SBATCH" not in body  # sbatch reads none after the first command
    assert re.fullmatch(r"#!/bin/bash\n(#SBATCH --[a-z-]+(=\S+)?\n?)+", directives)


def test_options_become_directives(job):
    script = SlurmBackend.from_options(None, OPTIONS).render(job)
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))
    assert found == {
        "job-name": "tiny",
        "nodes": "4",
        "ntasks-per-node": "1",
        "output": f"{job.run_dir}-%j.log",
        "open-mode": "append",
        "signal": "USR1@300",
        "requeue": "",
        "partition": "gpu",
        "account": "me",
        "time": "12:00:00",
        "gpus-per-node": "h100:8",
    }


@pytest.mark.parametrize(
    ("codes", "code", "attempts"),
    [
        ([0], 0, 1),
        ([1, 137, 0], 0, 3),
        ([1, 1, 7, 0], 7, 3),  # two retries
        ([2], 2, 1),
        ([143], 143, 1),
    ],
)
def test_failures_are_restarted_and_errors_of_the_users_are_not(job, tmp_path, codes, code, attempts):
    done, calls = run_with_stubs(job, tmp_path, codes)
    assert done.returncode == code, done.stdout + done.stderr
    assert len(calls) == attempts and not (tmp_path / "requeued").exists()
    assert done.stdout.count("starting again from the last checkpoint") == attempts - 1


def test_a_job_near_its_time_limit_is_queued_again(job, tmp_path):
    done, calls = run_with_stubs(job, tmp_path, [138])
    assert done.returncode == 0 and len(calls) == 1
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_a_task_gets_the_command_all_gpus_and_the_variables(job, tmp_path):
    _, [call] = run_with_stubs(job, tmp_path, [0])
    *words, devices, note = call.split("|")
    assert words[-4:] == ["jaxtrain.cli", "train", str(job.config), "data.train.path=a b.jsonl"]
    # Otherwise jax gives a task of Slurm the one GPU of its number on the node.
    assert (devices, note) == ("0,1,2,3,4,5,6,7", "it's two")


def run_with_stubs(job, tmp_path, codes):
    """Run the batch file; srun ends with one of `codes` after the other. Returns what each srun got."""
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    srun = f"""
cd {tmp_path}
for word in "$@"; do printf '%s|' "$word" >> calls; done
echo "$JAX_LOCAL_DEVICE_IDS|$NOTE" >> calls
code=$(head -n 1 codes); sed -i 1d codes; exit $code
"""
    write_stub(tmp_path / "bin", "srun", srun)
    write_stub(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path}/requeued')
    script = SlurmBackend.from_options(None, OPTIONS).render(job)
    done = bash(script, PATH=path_with(tmp_path / "bin"), SLURM_JOB_ID="17")
    return done, (tmp_path / "calls").read_text().splitlines()


STATES = ["JobState=PENDING ExitCode=0:0", "JobState=RUNNING ExitCode=0:0"]


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("JobState=COMPLETED ExitCode=0:0", 0),
        ("JobState=FAILED ExitCode=2:0", 2),
        ("JobState=CANCELLED ExitCode=0:15", 143),
        ("JobState=TIMEOUT ExitCode=0:0", 1),
        (None, 7),  # the controller has forgotten the job, the accounting has not
    ],
)
def test_a_job_is_followed_to_its_end(job, tmp_path, monkeypatch, capfd, last, code):
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    (tmp_path / "states").write_text("".join(f"JobId=17 {state}\n" for state in [*STATES, last] if state))
    write_stub(tmp_path / "bin", "sbatch", f'bash -n "$2" && echo "step 1" > "{job.run_dir}-17.log" && echo "17;main"')
    scontrol = f"""
cd {tmp_path}; state=$(head -n 1 states); sed -i 1d states
[ -n "$state" ] || {{ echo "Invalid job id specified" >&2; exit 1; }}
echo "step 2" >> "{job.run_dir}-17.log"; echo "$state"
"""
    write_stub(tmp_path / "bin", "scontrol", scontrol)
    write_stub(tmp_path / "bin", "sacct", 'echo "FAILED|7:0"')
    assert SlurmBackend().submit(job) == code
    out = capfd.readouterr().out
    assert out.startswith("step 1\n") and out.count("step 2") == (2 if last is None else 3)


def test_without_slurm_the_error_says_so(job, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(OSError, match="sbatch is not installed here"):
        SlurmBackend().submit(job)


@pytest.mark.parametrize("options", [["account=my group"], ["gpus_per_node=all"]])
def test_a_value_that_would_break_the_file_is_refused(job, options):
    with pytest.raises(ValueError, match=options[0].partition("=")[0]):
        SlurmBackend.from_options(None, options).render(job)
