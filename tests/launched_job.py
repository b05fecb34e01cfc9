"""Runs of `jaxtrain launch --backend local`, whose processes are killed while it follows them."""

import os
import signal
import time
from pathlib import Path
from random import Random

from forked_job import ForkedJob

from jaxtrain.session.folder import checkpoint_steps


def kill_launched(job: ForkedJob, run: Path, *, nodes: int, kills: int, chosen: Random) -> int:
    """Kill a random process of a job that is one launcher, `kills` times, each after steps that were saved since the
    kill before. Returns how often, once the job has ended."""
    (launcher,), done, at = job.ids, 0, 0
    while job.running():
        saved = checkpoint_steps(run) if run.exists() else []
        if done < kills and saved and saved[-1] > at:
            at = saved[-1] + 1  # one that is being saved may still be completed
            time.sleep(chosen.random())
            process = worker_of(launcher, rank=chosen.randrange(nodes))
            if process is not None:
                os.kill(process, signal.SIGKILL)
                done += 1
        time.sleep(0.05)
    return done


def worker_of(launcher: int, rank: int) -> int | None:
    """The process id of the launcher's process of that number; None: it has ended, or is not started yet."""
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            try:
                environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if f"JAX_PROCESS_ID={rank}".encode() in environ:
                return child
    return None
