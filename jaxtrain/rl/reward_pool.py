"""Runs reward functions with time limits. A failing function loses the reward of a sample and never ends the run.

A function given by its import path runs in processes of the pool. A function given as an object, which another process
may be unable to import, runs in threads of this process.

Pebble's ProcessPool (5.2) would not do: its processes import the user's main script again, as all of `multiprocessing`,
and a timeout ends only the worker itself, not the processes that a function has started.
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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from jaxtrain.config.rl_parts import RewardSection
from jaxtrain.rl.deadlines import call_all
from jaxtrain.rl.reward_worker import RewardCall, call_reward
from jaxtrain.train.preemption import Interrupted

Failure = Literal["timeout", "died", "error", "wrong_length", "not_finite"]

_START_SECONDS = 120.0  # time limit for importing a user's modules
_POLL_SECONDS = 0.2  # interval at which a wait checks whether it is interrupted


class RewardResults(NamedTuple):
    parts: dict[str, np.ndarray]  # name -> [n] float64, unweighted; NaN if it does not apply or failed
    failures: Counter[tuple[str, Failure]]  # (reward's name, kind) -> number of samples
    reasons: dict[int, str]  # index of a sample that a function failed on -> "<function>: <error>"
    # what the functions gave to `log_metric`: name -> sum, each call's value times its samples, and number of samples
    metrics: Mapping[str, tuple[float, int]] = {}
    extra: Mapping[str, list[Any]] = {}  # "<function>/<column>" -> n values given to `log_extra`, or None


class RewardPool:
    """`workers` processes, each of which can call all functions. They are not forked, so JAX may be running.

    A process whose call exceeds its limit is killed and replaced. The samples of a failed call are retried one by one,
    so that only those that fail alone are lost. Several threads may score at the same time: they share the processes.
    """

    def __init__(self, rewards: Sequence[RewardSection], workers: int = 2):
        """Raises ValueError for a reward function that cannot be imported."""
        self._rewards = {reward.name: reward for reward in rewards}
        paths = [reward.function for reward in rewards if isinstance(reward.function, str)]
        self._in_process = threading.Lock()  # the user's functions here need not be thread-safe
        self._interrupted = threading.Event()
        self._workers = [_Worker(paths, self._interrupted) for _ in range(workers if paths else 0)]
        try:
            for worker in self._workers:
                worker.wait_until_ready()
        except (ValueError, Interrupted):
            self.close()
            raise
        self._idle = deque(self._workers)
        self._returned = threading.Condition()  # of a worker to `_idle`, which it protects

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def interrupt(self) -> None:
        """Abort scoring, also in the future: `score` raises Interrupted shortly. Thread-safe."""
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
        state: Mapping[str, Any] | None = None,
        workers: int | None = None,
    ) -> RewardResults:
        """Compute every reward of every sample; the first four arguments have length n.

        `state` has the attributes of `trainer_state`, which functions may take. The call uses at most `workers`
        processes at a time (default: all), so that those of other threads find one.

        Takes as long as the slowest function, at most about ten times its limit however many of its calls hang.
        Raises Interrupted shortly after `interrupt`.
        """
        samples = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        count = len(completions)
        parts = {name: np.full(count, np.nan) for name in self._rewards}
        failures: Counter[tuple[str, Failure]] = Counter()
        reasons: dict[int, str] = {}
        metrics: dict[str, tuple[float, int]] = {}
        extra: dict[str, list[Any]] = {}
        named = [name for name, reward in self._rewards.items() if isinstance(reward.function, str)]
        workers = len(self._workers) if workers is None else workers
        tasks = [task for name in named for task in _split(name, count, workers)]
        in_process = [_Task(name, range(count)) for name in self._rewards if name not in named and count]
        answers = [*self._run(tasks, samples, state, workers), *self._run_in_process(in_process, samples, state)]
        for task, values, failure, message, logged, columns_logged in answers:
            for name, value in logged:
                total, number = metrics.get(name, (0.0, 0))
                metrics[name] = total + value * len(task.samples), number + len(task.samples)
            for column, given in columns_logged.items():
                column = extra.setdefault(f"{task.name}/{column}", [None] * count)
                for sample, value in zip(task.samples, given, strict=True):
                    column[sample] = value
            for sample, value in zip(task.samples, values or [math.nan] * len(task.samples), strict=True):
                if value is None:
                    continue
                parts[task.name][sample] = value
                if not math.isfinite(value):
                    failures[task.name, failure or "not_finite"] += 1
                    reasons.setdefault(sample, f"{task.name}: {message or f'not finite: {value}'}")
                    parts[task.name][sample] = np.nan
        return RewardResults(parts, failures, reasons, metrics, extra)

    def _run(
        self,
        tasks: list[_Task],
        samples: dict[str, Sequence[Any]],
        state: Mapping[str, Any] | None,
        workers: int,
    ) -> Iterator[_Answer]:
        """Yield the answers to all tasks; failed tasks of several samples are split and retried."""
        waiting = deque(tasks)
        busy: dict[Connection, tuple[_Worker, _Task, float]] = {}
        hung: Counter[str] = Counter()
        while waiting or busy:
            while waiting and len(busy) < workers:
                # A function that always hangs must not delay the step by its limit for every sample.
                if hung[waiting[0].name] > 8 * len(self._workers):
                    yield from (
                        _Answer(one, None, "timeout", "timeout: not started: too many other calls hung")
                        for one in waiting.popleft().singles()
                    )
                    continue
                if (worker := self._pop_idle(wait=not busy)) is None:
                    break
                task = waiting.popleft()
                worker.send(self._rewards[task.name], task, samples, state)
                busy[worker.connection] = worker, task, time.monotonic() + self._rewards[task.name].seconds
            if self._interrupted.is_set():
                raise Interrupted
            next_deadline = min((deadline for _, _, deadline in busy.values()), default=time.monotonic())
            ready = wait(list(busy), min(max(next_deadline - time.monotonic(), 0), _POLL_SECONDS))
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
                with self._returned:
                    self._idle.append(worker)
                    self._returned.notify()
                if answer.failure is not None and len(task.samples) > 1:
                    waiting.extend(task.singles())
                else:
                    yield answer

    def _pop_idle(self, *, wait: bool) -> _Worker | None:
        """A worker that no thread uses; None if there is none, also after a short wait for one."""
        with self._returned:
            if wait and not self._idle:
                self._returned.wait(_POLL_SECONDS)
            return self._idle.popleft() if self._idle else None

    def _run_in_process(
        self, tasks: list[_Task], samples: dict[str, Sequence[Any]], state: Mapping[str, Any] | None
    ) -> Iterator[_Answer]:
        """`_run` for functions in this process. A call that exceeds its limit is abandoned."""
        for task in tasks:
            with self._in_process:
                answers = self._call_in_process([task], samples, state)
                if answers[0].failure is not None and len(task.samples) > 1:
                    answers = self._call_in_process(task.singles(), samples, state)
            yield from answers

    def _call_in_process(
        self, tasks: list[_Task], samples: dict[str, Sequence[Any]], state: Mapping[str, Any] | None
    ) -> list[_Answer]:
        reward = self._rewards[tasks[0].name]
        assert callable(reward.function)
        calls = [partial(call_reward, reward.function, task.arguments(reward, samples), state) for task in tasks]
        results = call_all(calls, reward.seconds, self._interrupted)
        return [
            _Answer(task, None, "timeout", f"timeout: {result}")
            if isinstance(result, BaseException)
            else task.answer(result)
            for task, result in zip(tasks, results, strict=True)
        ]


class _Task(NamedTuple):
    name: str
    samples: Sequence[int]

    def singles(self) -> list[_Task]:
        return [_Task(self.name, [sample]) for sample in self.samples]

    def arguments(self, reward: RewardSection, samples: dict[str, Sequence[Any]]) -> dict[str, Any]:
        """The keyword arguments of the task's call."""
        return {name: [values[i] for i in self.samples] for name, values in samples.items()} | reward.args

    def answer(self, call: RewardCall) -> _Answer:
        """Check the values that the call returned."""
        if call.values is None:
            return _Answer(self, None, "error", call.message)
        if len(call.values) != len(self.samples):
            message = f"wrong length: {len(call.values)} values for {len(self.samples)} samples"
            return _Answer(self, None, "wrong_length", message)
        return _Answer(self, call.values, None, "", call.metrics, call.extra)


class _Answer(NamedTuple):
    task: _Task
    values: list[float | None] | None  # one per sample of the task, unless it failed
    failure: Failure | None
    message: str
    metrics: Sequence[tuple[str, float]] = ()
    extra: Mapping[str, list[Any]] = {}


def _split(name: str, count: int, pieces: int) -> list[_Task]:
    """Split the samples into contiguous tasks, since neighbours are samples of the same prompt."""
    bounds = np.linspace(0, count, min(pieces, count) + 1).astype(int)
    return [_Task(name, range(a, b)) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


class _Worker:
    def __init__(self, paths: list[str], interrupted: threading.Event):
        self._paths, self._interrupted = paths, interrupted
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "jaxtrain.rl.reward_worker", str(theirs.fileno())]
        # A new session, so that Ctrl-C reaches only the trainer, which then stops its workers.
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, env=environ)
        theirs.close()
        self.connection.send(self._paths)

    def wait_until_ready(self) -> None:
        """Raises ValueError if a function cannot be imported."""
        problem = "importing the functions took too long"
        deadline = time.monotonic() + _START_SECONDS
        while not (ready := self.connection.poll(_POLL_SECONDS)) and time.monotonic() < deadline:
            if self._interrupted.is_set():
                raise Interrupted
        if ready:
            try:
                problem = self.connection.recv()
            except EOFError:
                problem = "the process exited while importing them"
        if problem is not None:
            raise ValueError(f"the reward functions cannot be loaded: {problem}")

    def send(self, reward: RewardSection, task: _Task, samples: dict[str, Sequence[Any]], state: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it exited while idle: reading the answer reports this
            self.connection.send((reward.function, task.arguments(reward, samples), state))

    def answer(self, task: _Task) -> _Answer:
        try:
            return task.answer(RewardCall(*self.connection.recv()))
        except (EOFError, ConnectionResetError):
            return _Answer(task, None, "died", "died: its process exited")

    def restart(self) -> None:
        self.kill()
        self._start()
        self.wait_until_ready()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # including the processes that a function started
        self._process.wait()
        self.connection.close()
