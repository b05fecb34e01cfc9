"""`RaySampler`: a sampler with engines in other processes, each with its own JAX runtime.

A sample depends only on the seed, the prompt and the weights, not on the worker, so the prompts of a worker that is
lost or too slow are sent to another one.
"""

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

_MAX_ATTEMPTS = 3  # for a share of the prompts, each by another worker
_POLL_SECONDS = 0.2  # interval at which a wait checks whether it is interrupted
_START_SECONDS = 300.0  # time limit for the start of a process: imports, JAX, the first weights


class RayWorker:
    """The actor in a worker's process. It runs two calls at a time, so that weights can arrive during sampling."""

    def __init__(self, spec: WorkerSpec):
        self._spec = spec
        self._sampler: EngineSampler | None = None
        self._receiving = threading.Lock()
        self._version = -1

    def set_params(self, weights: Params, version: int) -> None:
        """Set `weights`, in the form of `to_host`. Calls may arrive out of order: older weights are ignored."""
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
    """A `Sampler` with `workers` actors. Starts Ray on this machine, or joins the cluster at RAY_ADDRESS."""

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

        Raises ValueError if Ray is not installed.
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
        self._weights: tuple[Any, int] | None = None  # a Ray reference to the newest weights, and their version
        self._events: Counter[str] = Counter()
        self._sync: dict[str, float] = {}
        self._interrupted = threading.Event()

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[Trajectory]]:
        """Raises exceptions of workers, and RuntimeError if a share of the prompts failed with several workers."""
        bounds = np.linspace(0, len(prompts), min(len(self._handles), len(prompts)) + 1).astype(int).tolist()
        waiting = deque(_Share(a, b, 0) for a, b in itertools.pairwise(bounds))
        idle = deque(range(len(self._handles)))
        busy: dict[Any, tuple[_Share | None, int, float]] = {}  # call -> share (None: starting), worker, deadline
        answers: list[list[Trajectory]] = [[] for _ in prompts]
        while waiting or any(share for share, _, _ in busy.values()):
            while waiting and idle:
                share, worker = waiting.popleft(), idle.popleft()
                call = self._handles[worker].sample.remote(prompts[share.start : share.stop], samples)
                busy[call] = share, worker, time.monotonic() + self._seconds
            if self._interrupted.is_set():
                raise Interrupted
            next_deadline = min(deadline for _, _, deadline in busy.values())
            timeout = min(max(next_deadline - time.monotonic(), 0.0), _POLL_SECONDS)
            ready, _ = self._ray.wait(list(busy), timeout=timeout)
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
                        if share.attempts + 1 == _MAX_ATTEMPTS:
                            raise RuntimeError(f"{_MAX_ATTEMPTS} workers were lost with the same prompts") from error
                        waiting.append(share._replace(attempts=share.attempts + 1))
        return answers

    def set_params(self, params: Params, version: int) -> None:
        """Returns when every worker has the weights."""
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
        """Metrics of the newest `set_params`, and the number of workers replaced since the last call."""
        events, self._events = self._events, Counter()
        counted = {f"rollout/{name}_workers": float(events[name]) for name in ("lost", "slow")}
        return self._sync | counted

    def process_ids(self) -> list[int]:
        return self._ray.get([handle.process_id.remote() for handle in self._handles])

    def interrupt(self) -> None:
        """Abort sampling, also in the future: `sample` raises Interrupted shortly. Thread-safe."""
        self._interrupted.set()

    def close(self) -> None:
        """Stop the workers. Ray itself keeps running, since the user may have started it."""
        for handle in self._handles:
            self._ray.kill(handle)

    def _replace(self, worker: int, *, slow: bool) -> Any:
        """Replace a worker by a new process. Returns the call that completes when it has its weights."""
        self._events["slow" if slow else "lost"] += 1
        log.warning("rollout worker %d is %s: starting a new one", worker, "too slow" if slow else "lost")
        self._ray.kill(self._handles[worker])
        self._handles[worker] = self._actor.remote(self._spec)
        assert self._weights is not None
        return self._handles[worker].set_params.remote(*self._weights)


class _Share(NamedTuple):
    """The prompts [start:stop], and the number of failed attempts."""

    start: int
    stop: int
    attempts: int
