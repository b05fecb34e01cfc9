"""Processes of `jaxtrain` that are forked after its modules were imported, and kills in a chosen phase of their work.

A process that is started anew imports for seconds, in which a kill can break nothing. A forked one comes to its first
step in a fraction of that time. The parent must have started no threads and no JAX backend.

Each process writes when it begins and ends a phase (`PHASES`), so that it is known what a kill has hit.
"""

import atexit
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PHASES = {  # functions, and what a process does while they run
    "jaxtrain.session.session:Session.restore": "restore",
    "jaxtrain.session.session:Session.begin": "begin",
    "jaxtrain.session.session:Session._evaluate": "evaluation",
    "jaxtrain.session.session:Session._finish": "end",
    "jaxtrain.session.folder:RunFolder.finish": "end",
    "jaxtrain.observe.metrics:MetricLog.log": "log",
    "jaxtrain.train.checkpoint:Checkpoints.save": "save",
    "jaxtrain.roles.role:TrainedRole.update": "update",
    "jaxtrain.rl.sampler:EngineSampler.set_params": "weight transfer",
    "jaxtrain.rl.ray_sampler:RaySampler.set_params": "weight transfer",
    "jaxtrain.rl.sampler:EngineSampler.sample": "sampling",
    "jaxtrain.rl.ray_sampler:RaySampler.sample": "sampling",
    "jaxtrain.rl.reward_pool:RewardPool.score": "reward",
    "jaxtrain.recipes.stages:_export": "export",
    "jaxtrain.rl.rollout_loop:write_step": "writing samples",
    "jaxtrain.rl.rollout_loop:save_pending": "writing samples",
}
RECIPES = ("sft", "preference", "reward", "distill", "rl", "stages")
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # as conftest.py
START_UP, STEPS = "start-up", "between"
HUNG = 900.0  # seconds after which a run of a few seconds will not end by itself, on a very busy machine
SETTLE = 60.0  # after the end of one process, until the others must have ended


class Kill(NamedTuple):
    """SIGKILL `seconds` after a process has entered `phase` for the `entry`th time, or after its start."""

    phase: str
    entry: int
    seconds: float


class Event(NamedTuple):
    """The beginning or end of a phase in a process."""

    time: float
    thread: str
    begins: bool
    phase: str


class ForkedJob:
    """The processes of one command of `jaxtrain`. The process `rank` kills itself by `kill`, if it comes to that."""

    def __init__(
        self,
        folder: Path,
        processes: int,
        command: Sequence[str],
        *,
        devices: int,
        rank: int = 0,
        kill: Kill | None = None,
    ):
        """`folder`: of what the processes print, and of their events. `devices`: of all processes together."""
        self._folder, self.started, self._began = folder, time.monotonic(), time.time()
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.codes: dict[int, int] = {}  # by process, of those that have ended
        self.seconds: dict[int, float] = {}  # since the start, until they ended
        self._ids = {}
        for each in range(processes):
            environ = {}
            if processes > 1:
                environ["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
                environ |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(each)}
            own = kill if each == rank else None
            self._ids[fork(lambda: _run(command, devices // processes), self._log(each), environ, own)] = each

    @property
    def ids(self) -> list[int]:
        """Of the processes."""
        return list(self._ids)

    def running(self) -> bool:
        for process in self._ids:
            self._poll(process)
        return len(self.codes) < len(self._ids)

    def wait(self, *, kill_all: bool = False) -> None:
        """Until all have ended. `kill_all`: as soon as one has. What does not end by itself is killed."""
        deadline = self.started + HUNG
        while self.running():
            if (self.codes and kill_all) or time.monotonic() > deadline:
                self.kill()
            if self.codes:
                deadline = min(deadline, self.started + min(self.seconds.values()) + SETTLE)
            time.sleep(0.002)

    def kill(self) -> None:
        """Kill all that still run."""
        for process, rank in self._ids.items():
            if rank not in self.codes:
                os.kill(process, signal.SIGKILL)

    def events(self, rank: int) -> list[Event]:
        """Without the last one, if it is incomplete."""
        lines = self._log(rank).with_suffix(".events").read_text().splitlines(keepends=True)
        parts = [line.rstrip("\n").split("\t") for line in lines if line.endswith("\n")]
        return [Event(float(at), thread, sign == "+", phase) for at, thread, sign, phase in parts]

    def phase(self, rank: int) -> str:
        """What the process did last: what it began last and did not end."""
        events = self.events(rank)
        if not any(event.phase == "begin" and not event.begins for event in events):
            return open_phase(events) or START_UP
        return open_phase(events) or STEPS

    def wrote(self, folder: Path, pattern: str) -> bool:
        """Whether the processes have made a file of that name which still exists."""
        return any(path.stat().st_mtime >= self._began for path in folder.glob(pattern))

    def printed(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")

    def _log(self, rank: int) -> Path:
        return self._folder / f"{rank}.log"

    def _poll(self, process: int) -> None:
        rank = self._ids[process]
        if rank in self.codes:
            return
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            self.codes[rank] = os.waitstatus_to_exitcode(status)
            self.seconds[rank] = time.monotonic() - self.started


def open_phase(events: Sequence[Event]) -> str:
    """The phase that began last of those that have not ended; empty if there is none."""
    stacks: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.begins:
            stacks[event.thread].append(event)
        else:
            stacks[event.thread].pop()
    newest = [stack[-1] for stack in stacks.values() if stack]
    return max(newest, key=lambda event: event.time).phase if newest else ""


def phase_durations(events: Sequence[Event]) -> dict[str, list[float]]:
    """The seconds that each phase took, by its name."""
    began: dict[tuple[str, str], list[float]] = defaultdict(list)
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        key = event.thread, event.phase
        if event.begins:
            began[key].append(event.time)
        else:
            found[event.phase].append(event.time - began[key].pop())
    return found


def fork(work: Callable[[], int], log: Path, environ: Mapping[str, str] = {}, kill: Kill | None = None) -> int:
    """The id of a process that calls `work` and ends with the code that it returns. It prints into `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environ)
        _write_events(log.with_suffix(".events"), kill)
        code = work()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_recipes() -> None:
    """Import what the forked processes use."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # tensorboardX would import it: seconds, and threads
    for module in ("jaxtrain.cli", *(f"jaxtrain.recipes.{each}" for each in RECIPES), "tensorboardX"):
        importlib.import_module(module)
    del sys.modules["torch"]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = os.environ.get("JAXTRAIN_TEST_XLA_FLAGS", COMPILE_FAST)


def _run(command: Sequence[str], devices: int) -> int:
    import jax

    from jaxtrain.cli import main

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.argv = ["jaxtrain", *command]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return 0


def _write_events(file: Path, kill: Kill | None) -> None:
    """Let the functions of `PHASES` write events, and kill this process by `kill`."""
    events = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    entries: Counter[str] = Counter()
    if kill is not None and kill.phase == START_UP:
        _kill_after(kill.seconds)

    def write(sign: str, phase: str) -> None:
        os.write(events, f"{time.monotonic()}\t{threading.current_thread().name}\t{sign}\t{phase}\n".encode())

    def observed(function: Callable, phase: str) -> Callable:
        def call(*arguments: Any, **keywords: Any) -> Any:
            write("+", phase)
            entries[phase] += 1
            if kill is not None and (kill.phase, kill.entry) == (phase, entries[phase]):
                _kill_after(kill.seconds)
            try:
                return function(*arguments, **keywords)
            finally:
                write("-", phase)

        return call

    for path, phase in PHASES.items():
        module, _, name = path.partition(":")
        *owner, attribute = name.split(".")
        place: Any = importlib.import_module(module)
        for each in owner:
            place = getattr(place, each)
        setattr(place, attribute, observed(getattr(place, attribute), phase))


def _kill_after(seconds: float) -> None:
    def end() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    if seconds > 0:
        threading.Thread(target=end, daemon=True).start()
    else:
        end()
