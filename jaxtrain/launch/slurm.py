"""A Slurm batch job."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from pydantic import PositiveInt

from jaxtrain.launch.backend import Backend
from jaxtrain.launch.exits import NEAR_TIME_LIMIT, STOPPED, USER_ERROR, shell_code
from jaxtrain.launch.job import LaunchJob, shell_words

log = logging.getLogger(__name__)

_POLL_SECONDS = 5.0
_WAIT_SECONDS = 60  # srun: from the end of the first task until the others are killed
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
}

# The processes end themselves and with the code of the one that failed, so the highest code, which srun returns, is
# that one. With --kill-on-bad-exit it would be the code of the killed ones.
_SCRIPT = """\
#!/bin/bash
{directives}

{exports}
for ((attempt = 0; attempt <= {retries}; attempt++)); do
  if ((attempt > 0)); then
    echo "starting again from the last checkpoint: restart $attempt of {retries}"
  fi
  srun --kill-on-bad-exit=0 --wait={wait}{srun} \\
    {command}
  code=$?
  case $code in
    0 | {user_error}) exit $code ;;
    {near_limit}) # saved before the time limit: queue the job again
      scontrol requeue "$SLURM_JOB_ID" && exit 0
      exit $code ;;
    {stopped}) exit $code ;;
  esac
  echo "attempt $attempt ended with exit code $code"
done
exit $code
"""


class SlurmBackend(Backend):
    """A batch job with one task, of all its GPUs, on each node. Needs a file system that the nodes share.

    The options are those of `sbatch`. `sig_time`: seconds before the time limit at which the run saves and the job is
    queued again. `container_image` and `container_mounts` are of Pyxis; the image has `jaxtrain`.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    gpus_per_node: str | None = None  # a number, or type:number
    cpus_per_task: PositiveInt | None = None
    mem: str | None = None
    exclusive: bool = False
    sig_time: PositiveInt = 300
    container_image: str | None = None
    container_mounts: str | None = None

    def render(self, job: LaunchJob) -> str:
        for name, value in (*self, ("name", job.name), ("run.dir", job.run_dir)):
            if isinstance(value, str | Path) and re.search(r"[\s\"']", str(value)):
                raise ValueError(f"{name}={str(value)!r}: an #SBATCH line cannot hold white space or quotes")
        chosen = ("partition", "account", "qos", "time", "constraint", "gpus_per_node", "cpus_per_task", "mem")
        directives = {
            "job-name": job.name,
            "nodes": job.nodes or 1,
            "ntasks-per-node": 1,
            "output": job.beside("-%j.log"),
            "open-mode": "append",  # a job that is queued again writes to the same file
            "signal": f"USR1@{self.sig_time}",  # to the tasks
            **{name.replace("_", "-"): getattr(self, name) for name in chosen},
        }
        flags = ["requeue", *(["exclusive"] if self.exclusive else [])]
        environ = self.env | self._device_ids()
        container = [
            f" --{name}={value}"
            for name, value in (
                ("container-image", self.container_image),
                ("container-mounts", self.container_mounts),
            )
            if value is not None
        ]
        program = ["jaxtrain"] if self.container_image else [sys.executable, "-m", "jaxtrain.cli"]
        lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
        return _SCRIPT.format(
            directives="\n".join([*lines, *(f"#SBATCH --{flag}" for flag in flags)]),
            exports="".join(f"export {shell_words([f'{name}={value}'])}\n" for name, value in environ.items()),
            retries=job.retries,
            wait=_WAIT_SECONDS,
            srun="".join(container),
            command=shell_words(job.command(program)),
            user_error=USER_ERROR,
            near_limit=NEAR_TIME_LIMIT,
            stopped=" | ".join(str(code) for code in sorted(STOPPED - {NEAR_TIME_LIMIT})),
        )

    def submit(self, job: LaunchJob) -> int:
        """Write the batch file next to the run's folder, submit it, and show the job's output until it ends.

        Ctrl-C leaves the job running.
        """
        script = job.beside(".sbatch")
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(self.render(job))
        number = _query("sbatch", "--parsable", str(script)).partition(";")[0].strip()
        output = job.beside(f"-{number}.log")
        log.info("submitted job %s of %s; its output is in %s", number, script, output)
        try:
            return _follow(number, output)
        except KeyboardInterrupt:
            log.info("job %s goes on; `scancel %s` ends it", number, number)
            return 130

    def _device_ids(self) -> dict[str, str]:
        """JAX would give a Slurm task one GPU, the one of its number on the node."""
        if self.gpus_per_node is None:
            return {}
        count = self.gpus_per_node.rpartition(":")[2]
        if not count.isdigit():
            raise ValueError(f"gpus_per_node={self.gpus_per_node}: expected a number, or type:number")
        return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(int(count))))}


def _query(*command: str) -> str:
    """The output of a command of Slurm. Raises OSError with its message if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed here: run this on a login node of the cluster") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]} failed: {error.stderr.strip()}") from None


def _follow(number: str, output: Path) -> int:
    """Print what the job writes, and its state whenever that changes, until it has ended. Returns its exit code."""
    shown, last = None, ""
    while True:
        state, code = _state(number)
        if state != last:
            log.info("job %s: %s", number, state)
            last = state
        if shown is None and output.exists():
            shown = output.open(errors="replace")
        _show(shown)
        if state in _ENDED:
            if shown is not None:
                shown.close()
            return code
        time.sleep(_POLL_SECONDS)


def _show(output: TextIO | None) -> None:
    if output is not None and (text := output.read()):
        print(text, end="", flush=True)


def _state(number: str) -> tuple[str, int]:
    """The job's state and exit code: of the controller, which forgets ended jobs, or of the accounting."""
    try:
        fields = dict(re.findall(r"(\w+)=(\S*)", _query("scontrol", "show", "job", "--oneliner", number)))
        state, ended = fields["JobState"], fields["ExitCode"]
    except OSError:
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        record = _query("sacct", "--jobs", number, *options)
        state, _, ended = record.strip().partition("|")
    state = state.partition(" ")[0]  # "CANCELLED by 1000"
    code, _, killed = ended.partition(":")
    if killed.strip("0"):
        return state, shell_code(-int(killed))
    return state, int(code or 0) or int(state in _ENDED and state != "COMPLETED")
