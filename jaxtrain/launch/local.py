"""Several processes on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import FrameType

from jaxtrain.launch.backend import Backend
from jaxtrain.launch.exits import STOPPED, USER_ERROR, describe_exit, may_restart, shell_code
from jaxtrain.launch.job import LaunchJob, shell_words
from jaxtrain.train.preemption import SIGNALS, exit_code

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 5.0  # after a failure, until the processes that still run get SIGTERM
_GRACE_SECONDS = 10.0  # from then until they get SIGKILL
_SHOWN_LINES = 30  # of a process that failed, without process 0, whose output is shown as it comes


class LocalBackend(Backend):
    """Processes on this machine, connected through a free port of it.

    With GPUs each process gets an equal share of them. TPU chips cannot be shared: one process uses all.
    """

    def render(self, job: LaunchJob) -> str:
        lines = []
        for environ in self._environs(job, "PORT"):
            assignments = [f"{key}={value}" for key, value in environ.items()]
            lines.append(shell_words([*assignments, *_command(job)]))
        return " &\n".join(lines) + "\n"

    def submit(self, job: LaunchJob) -> int:
        """A failed attempt is followed by another one, from the last checkpoint and on another port.

        Signals that ask a run to stop are passed on to the processes, which save and end. If one process fails, the
        others are ended.
        """
        code = 0
        with _forwarded_signals() as attempts:
            for restart in range(job.retries + 1):
                if restart:
                    log.warning("starting again from the last checkpoint: restart %d of %d", restart, job.retries)
                code = attempts.run(_command(job), self._environs(job, str(_free_port())))
                if attempts.signal or not may_restart(code):
                    break
        return code

    def _environs(self, job: LaunchJob, port: str) -> list[dict[str, str]]:
        """The variables of each process that the environment of this one lacks."""
        count = job.nodes or 1
        if count == 1:
            return [dict(self.env)]
        cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
        shares = _gpu_shares(count, os.environ | self.env)
        return [self.env | cluster | {"JAX_PROCESS_ID": str(rank)} | shares[rank] for rank in range(count)]


def _command(job: LaunchJob) -> list[str]:
    return job.command([sys.executable, "-m", "jaxtrain.cli"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _gpu_shares(count: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Which of the visible GPUs each of `count` processes uses; nothing without GPUs.

    Raises ValueError if they cannot be divided equally.
    """
    gpus = 0 if environ.get("JAX_PLATFORMS") in ("cpu", "tpu") else _visible_gpus(environ)
    if gpus == 0:
        return [{}] * count
    if gpus % count:
        raise ValueError(
            f"--nodes={count} processes cannot share {gpus} GPUs equally: set CUDA_VISIBLE_DEVICES or another --nodes"
        )
    each = gpus // count
    return [
        {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(rank * each, (rank + 1) * each)))} for rank in range(count)
    ]


def _visible_gpus(environ: Mapping[str, str]) -> int:
    if "CUDA_VISIBLE_DEVICES" in environ:
        return len([each for each in environ["CUDA_VISIBLE_DEVICES"].split(",") if each.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[_Attempts]:
    attempts = _Attempts()
    before = {number: signal.signal(number, attempts.forward) for number in SIGNALS}
    try:
        yield attempts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Attempts:
    """The processes of the current attempt."""

    def __init__(self) -> None:
        self.signal = 0  # the first one that this process received
        self._processes: list[_Process] = []

    def forward(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        for process in self._processes:
            process.send(number)

    def run(self, command: list[str], environs: list[dict[str, str]]) -> int:
        """Run one process per entry of `environs` to the end. Returns the exit code of the one that failed first."""
        if self.signal:
            return exit_code(self.signal)
        for rank, environ in enumerate(environs):
            self._processes.append(_Process(command, environ, rank))
            if self.signal:  # it arrived while the process was started
                self._processes[-1].send(self.signal)
        try:
            return self._wait()
        finally:
            for process in self._processes:
                process.end_group()
            self._processes = []

    def _wait(self) -> int:
        failed: list[int] = []  # exit codes of the processes that failed by themselves, the first one first
        stopped, since = 0, 0.0
        deadlines = deque([(_SETTLE_SECONDS, signal.SIGTERM), (_SETTLE_SECONDS + _GRACE_SECONDS, signal.SIGKILL)])
        running = list(self._processes)
        while running:
            for process in list(running):
                if (code := process.code()) is None:
                    continue
                running.remove(process)
                if process.failed and len(deadlines) == 2:  # none was ended by us
                    since = since or time.monotonic()
                    if code not in failed[:1]:  # after the first failure, the others end with its code
                        log.error("process %d of %d: %s", process.rank, len(self._processes), describe_exit(code))
                        process.show_output()
                    failed.append(code)
                stopped = stopped or code
            if failed and deadlines and time.monotonic() - since > deadlines[0][0]:
                _, number = deadlines.popleft()
                for process in running:
                    process.send(number)
            time.sleep(_POLL_SECONDS)
        # An error of the user's is the cause of the others' failures.
        return USER_ERROR if USER_ERROR in failed else next(iter(failed), stopped)


class _Process:
    """`jaxtrain train` in a session of its own, so that Ctrl-C reaches only this process, which passes it on.

    Process 0 writes where this process does. The last lines of the others are kept.
    """

    def __init__(self, command: list[str], environ: Mapping[str, str], rank: int) -> None:
        self.rank = rank
        self._lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=os.environ | environ,
            start_new_session=True,
            stdout=None if rank == 0 else subprocess.PIPE,
            stderr=None if rank == 0 else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def failed(self) -> bool:
        """Whether it failed: it exited with an error, and not because of a stop signal."""
        code = self._process.returncode
        return code is not None and code != 0 and code not in STOPPED

    def code(self) -> int | None:
        """The exit code as a shell reports it; None while it runs."""
        code = self._process.poll()
        return None if code is None else shell_code(code)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end_group(self) -> None:
        """Kill what the process started and did not end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def show_output(self) -> None:
        self._reader.join(timeout=1)  # what it started may hold the pipe open
        for line in list(self._lines):
            print(f"[{self.rank}] {line}", file=sys.stderr, end="", flush=True)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.append(line)
