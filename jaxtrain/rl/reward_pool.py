"""Reward functions with a time limit each, which cost a sample and never the run.

A function that the config names runs in processes of the pool. One that a program gives as an object, which another
process may be unable to import, runs in threads of this process.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from jaxtrain.config.rollouts import RewardSection
from jaxtrain.rl.deadlines import call_all
from jaxtrain.rl.reward_worker import call_reward
from jaxtrain.train.preemption import Interrupted

Failure = Literal["timeout", "died", "error", "wrong_length", "not_finite"]

_START_SECONDS = 120.0  # to import a user's modules
_LOOK_SECONDS = 0.2  # how often a wait looks whether it is interrupted


class Scores(NamedTuple):
    parts: dict[str, np.ndarray]  # name -> [n] float64, unweighted; NaN where it does not apply or failed
    failures: Counter[tuple[str, Failure]]  # (reward's name, kind) -> samples lost to it
    reasons: dict[int, str]  # of every sample that a function failed on: "<function>: <what it raised or did>"


class RewardPool:
    """`workers` processes that all know all functions. Make it before JAX starts, or at any time: nothing is forked.

    A call that does not return is killed with its process, which is replaced. Samples of a call that failed as a whole
    are tried one by one, so that only those that fail alone are lost.
    """

    def __init__(self, rewards: Sequence[RewardSection], workers: int = 2):
        """Raises ValueError for a reward that cannot be imported."""
        self._rewards = {reward.name: reward for reward in rewards}
        paths = [reward.function for reward in rewards if isinstance(reward.function, str)]
        self._scoring = threading.Lock()
        self._interrupted = threading.Event()
        self._workers = [_Worker(paths, self._interrupted) for _ in range(workers if paths else 0)]
        try:
            for worker in self._workers:
                worker.wait_until_ready()
        except (ValueError, Interrupted):
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def interrupt(self) -> None:
        """Give up the scoring under way, and all to come: it raises Interrupted soon. From any thread."""
        self._interrupted.set()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, Sequence[Any]],
    ) -> Scores:
        """Every reward of every sample; all arguments are [n].

        Takes as long as the slowest function, at most about ten times its limit however many of its calls hang.
        Raises Interrupted soon after `interrupt`.
        """
        samples = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        count = len(completions)
        parts = {name: np.full(count, np.nan) for name in self._rewards}
        failures: Counter[tuple[str, Failure]] = Counter()
        reasons: dict[int, str] = {}
        named = [name for name, reward in self._rewards.items() if isinstance(reward.function, str)]
        tasks = [task for name in named for task in _cut(name, count, len(self._workers))]
        given = [_Task(name, range(count)) for name in self._rewards if name not in named and count]
        with self._scoring:  # an evaluation may come while a rollout ahead of time is scored
            answers = [*self._run(tasks, samples), *self._run_given(given, samples)]
        for task, values, failure, said in answers:
            for sample, value in zip(task.samples, values or [math.nan] * len(task.samples), strict=True):
                if value is None:
                    continue
                parts[task.name][sample] = value
                if not math.isfinite(value):
                    failures[task.name, failure or "not_finite"] += 1
                    reasons.setdefault(sample, f"{task.name}: {said or f'not finite: {value}'}")
                    parts[task.name][sample] = np.nan
        return Scores(parts, failures, reasons)

    def _run(self, tasks: list[_Task], samples: dict[str, Sequence[Any]]):
        """Answers to all tasks; those of more than one sample that fail are cut up and tried again."""
        waiting, idle = deque(tasks), deque(self._workers)
        busy: dict[Connection, tuple[_Worker, _Task, float]] = {}
        hung: Counter[str] = Counter()
        while waiting or busy:
            while waiting and idle:
                task, worker = waiting.popleft(), idle.popleft()
                # A function that hangs on everything must not hold the step for the number of samples times its limit.
                if hung[task.name] > 8 * len(self._workers):
                    idle.appendleft(worker)
                    yield from (
                        _Answer(one, None, "timeout", "timeout: not tried: too many others hung")
                        for one in task.singles()
                    )
                    continue
                worker.send(self._rewards[task.name], task, samples)
                busy[worker.connection] = worker, task, time.monotonic() + self._rewards[task.name].seconds
            if self._interrupted.is_set():
                raise Interrupted
            soonest = min((deadline for _, _, deadline in busy.values()), default=time.monotonic())
            ready = wait(list(busy), min(max(soonest - time.monotonic(), 0), _LOOK_SECONDS))
            now = time.monotonic()
            for connection, (worker, task, deadline) in list(busy.items()):
                if connection not in ready and now < deadline:
                    continue
                del busy[connection]
                answer = (
                    worker.answer(task)
                    if connection in ready
                    else _Answer(task, None, "timeout", "timeout: took too long")
                )
                if answer.failure in ("timeout", "died"):
                    hung[task.name] += answer.failure == "timeout"
                    worker.restart()
                idle.append(worker)
                if answer.failure is not None and len(task.samples) > 1:
                    waiting.extend(task.singles())
                else:
                    yield answer

    def _run_given(self, tasks: list[_Task], samples: dict[str, Sequence[Any]]) -> Iterator[_Answer]:
        """The same for functions of this process. One that exceeds its limit is no longer waited for."""
        for task in tasks:
            (answer,) = self._call_given([task], samples)
            if answer.failure is not None and len(task.samples) > 1:
                yield from self._call_given(task.singles(), samples)
            else:
                yield answer

    def _call_given(self, tasks: list[_Task], samples: dict[str, Sequence[Any]]) -> list[_Answer]:
        reward = self._rewards[tasks[0].name]
        assert callable(reward.function)
        calls = [partial(call_reward, reward.function, task.arguments(reward, samples)) for task in tasks]
        results = call_all(calls, reward.seconds, self._interrupted)
        return [
            _Answer(task, None, "timeout", f"timeout: {result}")
            if isinstance(result, BaseException)
            else task.answer(*result)
            for task, result in zip(tasks, results, strict=True)
        ]


class _Task(NamedTuple):
    name: str
    samples: Sequence[int]

    def singles(self) -> list[_Task]:
        return [_Task(self.name, [sample]) for sample in self.samples]

    def arguments(self, reward: RewardSection, samples: dict[str, Sequence[Any]]) -> dict[str, Any]:
        """Those of the task's call."""
        return {name: [values[i] for i in self.samples] for name, values in samples.items()} | reward.args

    def answer(self, values: list[float | None] | None, said: str) -> _Answer:
        """What the call returned, checked; `values` None: `said` is what it raised."""
        if values is None:
            return _Answer(self, None, "error", said)
        if len(values) != len(self.samples):
            said = f"wrong length: {len(values)} values for {len(self.samples)} samples"
            return _Answer(self, None, "wrong_length", said)
        return _Answer(self, values, None, "")


class _Answer(NamedTuple):
    task: _Task
    values: list[float | None] | None  # one per sample of the task, unless it failed
    failure: Failure | None
    said: str


def _cut(name: str, count: int, pieces: int) -> list[_Task]:
    """Neighbours stay together: they are samples of one prompt."""
    bounds = np.linspace(0, count, min(pieces, count) + 1).astype(int)
    return [_Task(name, range(a, b)) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


class _Worker:
    def __init__(self, paths: list[str], interrupted: threading.Event):
        self._paths, self._interrupted = paths, interrupted
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "jaxtrain.rl.reward_worker", str(theirs.fileno())]
        # A session of its own: Ctrl-C is for the trainer, which then ends its workers.
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, env=environ)
        theirs.close()
        self.connection.send(self._paths)

    def wait_until_ready(self) -> None:
        """Raises ValueError with what importing a function raised."""
        problem = "importing the functions took too long"
        deadline = time.monotonic() + _START_SECONDS
        while not (ready := self.connection.poll(_LOOK_SECONDS)) and time.monotonic() < deadline:
            if self._interrupted.is_set():
                raise Interrupted
        if ready:
            try:
                problem = self.connection.recv()
            except EOFError:
                problem = "importing the functions ended the process"
        if problem is not None:
            raise ValueError(f"the reward functions cannot be loaded: {problem}")

    def send(self, reward: RewardSection, task: _Task, samples: dict[str, Sequence[Any]]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died while idle: reading the answer will say so
            self.connection.send((reward.function, task.arguments(reward, samples)))

    def answer(self, task: _Task) -> _Answer:
        try:
            return task.answer(*self.connection.recv())
        except (EOFError, ConnectionResetError):
            return _Answer(task, None, "died", "died: it ended its process")

    def restart(self) -> None:
        self.kill()
        self._start()
        self.wait_until_ready()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that a function started
        self._process.wait()
        self.connection.close()
