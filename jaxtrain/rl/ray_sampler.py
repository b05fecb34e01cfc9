"""`RaySampler`: the same trajectories from engines in other processes, each with its own JAX runtime.

What a sample says depends on the seed, the prompt and the weights, never on the worker, so the prompts of a worker that
is lost or too slow are simply given to another.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.nn.model import Model
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import Synced, from_host, to_host
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.train.preemption import Interrupted
from jaxtrain.types import Params

log = logging.getLogger(__name__)

_MOST_TRIES = 3  # of a share of the prompts, each by another worker
_LOOK_SECONDS = 0.2  # how often a wait looks whether it is interrupted
_START_SECONDS = 300.0  # of a process: imports, JAX, the first weights


class RayWorker:
    """What runs in a worker's process. Two calls at a time: new weights arrive while samples are under way."""

    def __init__(self, spec: WorkerSpec):
        self._spec = spec
        self._sampler: EngineSampler | None = None
        self._receiving = threading.Lock()
        self._version = -1

    def set_params(self, weights: Params, version: int) -> None:
        """`weights` as `to_host` sends them. Calls may come in any order: older weights than it has are ignored."""
        with self._receiving:
            if version <= self._version:
                return
            if self._sampler is None:
                self._sampler = self._spec.build(from_host(self._spec.model, weights), version, self._receive)
            else:
                self._sampler.set_params(weights, version)
            self._version = version

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[Trajectory]]:
        assert self._sampler is not None
        return self._sampler.sample(prompts, samples)

    def process_id(self) -> int:
        return os.getpid()

    def _receive(self, weights: Params) -> Synced:
        return Synced(from_host(self._spec.model, weights), 0, 0.0)


class RaySampler:
    """A `Sampler` over `workers` actors. Starts Ray in this machine, or joins the cluster at RAY_ADDRESS."""

    def __init__(
        self,
        spec: WorkerSpec,
        trainer: Model,
        *,
        workers: int,
        seconds: float,
        resources: dict[str, float] | None = None,
    ):
        """`seconds`: a worker that takes longer for its share of the prompts is replaced.

        Raises ValueError where Ray is not installed, or the cluster lacks the `resources` of a worker.
        """
        if importlib.util.find_spec("ray") is None:
            raise ValueError("placement kind=ray needs Ray: pip install 'jaxtrain[ray]'")
        self._ray: Any = importlib.import_module("ray")
        if not self._ray.is_initialized():
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._lost = (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError)
        self._spec, self._trainer, self._seconds = spec, trainer, seconds
        resources = dict(resources or {})
        options = {"num_cpus": resources.pop("CPU", 1), "num_gpus": resources.pop("GPU", 0), "resources": resources}
        self._actor = self._ray.remote(**options, max_concurrency=2)(RayWorker)
        self._handles = [self._actor.remote(spec) for _ in range(workers)]
        self._weights: tuple[Any, int] | None = None  # a reference to the newest, and their version
        self._events: Counter[str] = Counter()
        self._sync: dict[str, float] = {}
        self._interrupted = threading.Event()

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[Trajectory]]:
        """Raises what a worker raises; RuntimeError where a share of the prompts was lost with several workers."""
        bounds = np.linspace(0, len(prompts), min(len(self._handles), len(prompts)) + 1).astype(int).tolist()
        waiting = deque(_Share(a, b, 0) for a, b in itertools.pairwise(bounds))
        idle = deque(range(len(self._handles)))
        busy: dict[Any, tuple[_Share | None, int, float]] = {}  # call -> its share (None: it starts), worker, deadline
        answers: list[list[Trajectory]] = [[] for _ in prompts]
        while waiting or any(share for share, _, _ in busy.values()):
            while waiting and idle:
                share, worker = waiting.popleft(), idle.popleft()
                call = self._handles[worker].sample.remote(prompts[share.start : share.stop], samples)
                busy[call] = share, worker, time.monotonic() + self._seconds
            if self._interrupted.is_set():
                raise Interrupted
            soonest = min(deadline for _, _, deadline in busy.values())
            ready, _ = self._ray.wait(list(busy), timeout=min(max(soonest - time.monotonic(), 0.0), _LOOK_SECONDS))
            overdue = [call for call, (_, _, end) in busy.items() if call not in ready and time.monotonic() >= end]
            for call in [*ready, *overdue]:
                share, worker, _ = busy.pop(call)
                try:
                    answer = self._ray.get(call, timeout=0 if call in overdue else None)
                    idle.append(worker)
                    if share:
                        answers[share.start : share.stop] = answer
                except self._lost as error:
                    busy[self._replace(worker, slow=call in overdue)] = None, worker, time.monotonic() + _START_SECONDS
                    if share:
                        if share.tries + 1 == _MOST_TRIES:
                            raise RuntimeError(f"{_MOST_TRIES} workers were lost over the same prompts") from error
                        waiting.append(share._replace(tries=share.tries + 1))
        return answers

    def set_params(self, params: Params, version: int) -> None:
        """Returns once every worker has them, so that the next samples are drawn from them."""
        start = time.perf_counter()
        synced = to_host(self._trainer, params)
        self._weights = self._ray.put(synced.params), version
        calls = [handle.set_params.remote(*self._weights) for handle in self._handles]
        for worker, call in enumerate(calls):
            try:
                self._ray.get(call, timeout=_START_SECONDS)
            except self._lost:
                self._ray.get(self._replace(worker, slow=False), timeout=_START_SECONDS)
        bytes_sent = float(synced.bytes * len(self._handles))
        self._sync = {"sync/bytes": bytes_sent, "sync/seconds": time.perf_counter() - start}

    def metrics(self) -> dict[str, float]:
        """Of the newest `set_params`, and the workers replaced since the last call."""
        events, self._events = self._events, Counter()
        counted = {f"rollout/{name}_workers": float(events[name]) for name in ("lost", "slow")}
        return self._sync | counted

    def process_ids(self) -> list[int]:
        return self._ray.get([handle.process_id.remote() for handle in self._handles])

    def interrupt(self) -> None:
        """Give up the samples under way, and all to come: `sample` raises Interrupted soon. From any thread."""
        self._interrupted.set()

    def close(self) -> None:
        """End the workers. Ray itself goes on, since it may be the user's."""
        for handle in self._handles:
            self._ray.kill(handle)

    def _replace(self, worker: int, *, slow: bool) -> Any:
        """Start a new process in place of a worker; the call that is done when it has its weights."""
        self._events["slow" if slow else "lost"] += 1
        log.warning("rollout worker %d is %s: a new one is started", worker, "too slow" if slow else "lost")
        self._ray.kill(self._handles[worker])
        self._handles[worker] = self._actor.remote(self._spec)
        assert self._weights is not None
        return self._handles[worker].set_params.remote(*self._weights)


class _Share(NamedTuple):
    """prompts[start:stop], which so many workers were lost over."""

    start: int
    stop: int
    tries: int
