"""`RaySampler`: a sampler with engines in other processes, each with its own JAX runtime.

A sample depends only on the seed, the prompt and the weights, not on the worker, so the prompts of a worker that is
lost or too slow are sent to another one.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import jax

from jaxtrain.nn.model import Model
from jaxtrain.rl.rollouts import Prompt, Sampler, Trajectory
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import Synced
from jaxtrain.rl.weight_chunks import ChunkedWeights, chunk_weights, place_chunks
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.train.agree import from_process_0, gather_values, on_all
from jaxtrain.train.preemption import Interrupted
from jaxtrain.types import Params

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3  # for prompts without a new sample, and for the start of a worker
_POLL_SECONDS = 0.2  # interval at which a wait checks whether it is interrupted
_START_SECONDS = 300.0  # limit for the start of a process (imports, JAX, the first weights), and again for compiling


class RayWorker:
    """The actor in a worker's process. It runs several calls at a time: weights and prompts arrive during sampling."""

    def __init__(self, spec: WorkerSpec):
        self._spec = spec
        self._sampler: EngineSampler | None = None
        self._receiving = threading.Lock()
        self._version = -1
        self._added: defaultdict[int, SimpleQueue[Sequence[Prompt] | None]] = defaultdict(SimpleQueue)  # of each stream

    def set_params(self, weights: ChunkedWeights, version: int) -> None:
        """Set weights, whose chunks are Ray's. Calls may arrive out of order: older weights are ignored."""
        with self._receiving:
            if version <= self._version:
                return
            if self._sampler is None:
                self._spec = self._spec.on_devices(jax.devices())
                self._sampler = self._spec.build(self._receive(weights).params, version, self._receive)
            else:
                self._sampler.set_params(weights, version)
            self._version = version

    def stream(self, number: int, samples: int) -> Iterator[Trajectory]:
        """Yield the samples as they are finished: each is the trainer's before the next one, whatever happens here.

        Of the prompts that `add` gives to the stream of this number, until that gives None.
        """
        assert self._sampler is not None
        added, unfinished = self._added[number], 0

        def feed() -> Iterator[Sequence[Prompt]]:
            nonlocal unfinished
            while True:
                prompts: Sequence[Prompt] | None = ()
                with suppress(Empty):
                    prompts = added.get(block=not unfinished, timeout=_POLL_SECONDS)
                if prompts is None:
                    return
                unfinished += len(prompts) * samples
                yield prompts

        for trajectory in self._sampler.stream(feed(), samples):
            unfinished -= 1
            yield trajectory
        del self._added[number]

    def add(self, number: int, prompts: Sequence[Prompt] | None) -> None:
        """Let a stream, which may not have begun yet, sample these prompts too. None: no more will come."""
        self._added[number].put(prompts)

    def process_id(self) -> int:
        return os.getpid()

    def _receive(self, weights: ChunkedWeights) -> Synced:
        """Fetch the weights one chunk at a time."""
        begin, ray = time.perf_counter(), importlib.import_module("ray")
        params = place_chunks(self._spec.model, weights._replace(chunks=map(ray.get, weights.chunks)))
        return Synced(params, weights.bytes, time.perf_counter() - begin)


class RaySampler(Sampler):
    """A `Sampler` with `workers` actors. Starts Ray on this machine, or joins the cluster at RAY_ADDRESS.

    A worker that ends, or does not respond in time while it samples or receives weights, is replaced. The new process
    starts in the background; until it has the weights, the others sample all prompts.

    With several processes of the trainer each has workers of its own, in one cluster. All processes call the
    constructor, `set_params` and `metrics` together.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        trainer: Model,
        *,
        workers: int,
        seconds: float,
        resources: dict[str, float] | None = None,
    ):
        """`workers`: of this process. `seconds`: a worker that takes longer to receive weights, or until it finishes
        another sample, is replaced. Until its first sample it may compile for 300 seconds, as long as its process
        answers other calls.

        Raises ValueError if Ray is not installed or does not run on this host.
        """
        self._ray = connect_ray()
        self._lost = (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError)
        self._spec, self._trainer, self._seconds = spec, trainer, seconds
        resources = dict(resources or {})
        options = {"num_cpus": resources.pop("CPU", 1), "num_gpus": resources.pop("GPU", 0), "resources": resources}
        self._actor = self._ray.remote(**options, max_concurrency=5)(RayWorker)
        first = jax.process_index() * workers
        self._workers = [_Worker(first + number, self._actor.remote(spec)) for number in range(workers)]
        self._weights: tuple[ChunkedWeights, int] | None = None  # the newest, in Ray's memory, and their version
        self._changing = threading.RLock()  # weights may be set by another thread during sampling
        self._events: Counter[str] = Counter()
        self._sync: dict[str, float] = {}
        self._interrupted = threading.Event()
        self._sampling, self._next = threading.Lock(), threading.Lock()  # of the call that samples, and that is next
        self._streams = itertools.count()

    def stream(self, feed: Iterator[Sequence[Prompt]], samples: int) -> Iterator[Trajectory]:
        """Raises exceptions of workers, and RuntimeError if several workers were lost with the same prompts."""
        with self._next:
            self._sampling.acquire()
        busy: dict[_Worker, _Share] = {}
        try:
            yield from self._samples(feed, samples, busy)
        finally:
            self._end(busy)  # some are, after an exception
            self._sampling.release()

    def wanted(self) -> bool:
        return self._next.locked()

    def _samples(
        self, feed: Iterator[Sequence[Prompt]], samples: int, busy: dict[_Worker, _Share]
    ) -> Iterator[Trajectory]:
        """`stream`, which adds the workers that sample to `busy`, and removes them when they are done."""
        waiting: list[Prompt] = []
        finished: dict[int, set[int]] = {}  # samples, of each prompt that is not complete
        losses: Counter[int] = Counter()  # of a prompt: workers in a row that were lost with it, without a new sample
        more = True
        while more or finished or busy:
            prompts = next(feed, None)
            more = prompts is not None
            waiting += prompts or ()
            finished |= {prompt.number: set() for prompt in prompts or ()}
            self._check_starts()
            self._give(waiting, busy, samples)
            self._extend(busy)
            if not more and not finished:
                self._end(busy)
            deadlines = [share.deadline for share in busy.values() if share.prompts or share.ended]
            ready = self._wait([share.stream for share in busy.values()], min(deadlines, default=math.inf))
            for worker, share in list(busy.items()):
                arrived, end = self._receive(share) if share.stream in ready else ([], None)
                new = [t for t in arrived if t.sample not in finished.get(t.prompt.number, (t.sample,))]
                for number, sample in [(t.prompt.number, t.sample) for t in new]:
                    finished[number].add(sample)
                    if len(finished[number]) == samples:
                        del finished[number], share.prompts[number]
                if new:
                    share.progressed, share.deadline = True, time.monotonic() + self._seconds
                    worker.compiles_until = 0.0
                yield from new
                waits = share.prompts or share.ended
                if end is None and not (waits and time.monotonic() >= share.deadline):
                    continue
                del busy[worker]
                if isinstance(end, StopIteration):
                    continue
                self._replace(worker, slow=end is None)
                for number in share.prompts:
                    losses[number] = 1 if share.progressed else losses[number] + 1
                    if losses[number] == _MAX_ATTEMPTS:
                        raise RuntimeError(f"{_MAX_ATTEMPTS} workers were lost with the same prompts") from end
                waiting += share.prompts.values()

    def _give(self, waiting: list[Prompt], busy: dict[_Worker, _Share], samples: int) -> None:
        """Give each waiting prompt to the worker in use that has the fewest."""
        usable = [worker for worker in self._workers if worker.start is None]
        if not usable:
            return
        given: defaultdict[_Worker, list[Prompt]] = defaultdict(list)
        for prompt in waiting:
            worker = min(usable, key=lambda each: len(busy[each].prompts) if each in busy else 0)
            if worker not in busy:
                number = next(self._streams)
                busy[worker] = _Share(
                    number, worker.handle.stream.options(num_returns="streaming").remote(number, samples)
                )
            share = busy[worker]
            if not share.prompts:
                share.deadline = time.monotonic() + self._seconds
            if worker.compiles_until is None:
                worker.compiles_until = time.monotonic() + _START_SECONDS
            share.prompts[prompt.number] = prompt
            given[worker].append(prompt)
        for worker, prompts in given.items():
            worker.handle.add.remote(busy[worker].number, prompts)
        waiting.clear()

    def _extend(self, busy: dict[_Worker, _Share]) -> None:
        """Extend the deadline of workers that compile for their first sample, as long as they answer another call."""
        for worker, share in busy.items():
            if worker.compiles_until is None or time.monotonic() >= worker.compiles_until:
                continue
            if worker.answer is None:
                worker.answer = worker.handle.process_id.remote()
            elif self._ray.wait([worker.answer], timeout=0)[0]:
                worker.answer = None
                share.deadline = max(share.deadline, min(time.monotonic() + self._seconds, worker.compiles_until))

    def _end(self, busy: dict[_Worker, _Share]) -> None:
        """Tell the workers that no more prompts will come."""
        for worker, share in busy.items():
            if not share.ended:
                worker.handle.add.remote(share.number, None)
                share.ended, share.deadline = True, time.monotonic() + self._seconds

    def set_params(self, params: Params, version: int) -> None:
        """Returns when every worker in use has the weights; with the first weights, when all workers have them.

        Raises exceptions of workers, and RuntimeError if a worker cannot be started.
        """
        begin = time.perf_counter()
        chunked = chunk_weights(self._trainer, params)
        weights = chunked._replace(chunks=list(map(self._ray.put, chunked.chunks))), version
        receiving: dict[Any, _Worker] = {}
        with self._changing:
            first, self._weights = self._weights is None, weights
            for worker in self._workers:
                call = worker.handle.set_params.remote(*weights)
                if first:
                    worker.deadline = time.monotonic() + _START_SECONDS
                if first or worker.start is not None:
                    worker.start = call
                else:
                    receiving[call] = worker
        deadline = time.monotonic() + self._seconds
        while receiving:
            ended = self._wait(list(receiving), deadline)
            for call in ended if time.monotonic() < deadline else list(receiving):
                self._has_received(receiving.pop(call), call)
        while first and any(worker.start is not None for worker in self._workers):
            self._wait([], math.inf)
            self._check_starts()
        bytes_sent = float(chunked.bytes * len(self._workers))
        self._sync = {"sync/bytes": bytes_sent, "sync/seconds": time.perf_counter() - begin}

    def metrics(self) -> dict[str, float]:
        """Metrics of the newest `set_params`, and the number of workers replaced since the last call."""
        with self._changing:
            events, self._events = self._events, Counter()
        total = sum(gather_values(events), Counter())
        counted = {f"rollout/{name}_workers": float(total[name]) for name in ("lost", "slow")}
        return self._sync | counted

    def process_ids(self) -> list[int]:
        return self._ray.get([worker.handle.process_id.remote() for worker in self._workers])

    def interrupt(self) -> None:
        """Abort sampling, also in the future: `sample` raises Interrupted shortly. Thread-safe."""
        self._interrupted.set()

    def close(self) -> None:
        """Stop the workers. Ray itself keeps running, since the user may have started it."""
        for worker in self._workers:
            self._ray.kill(worker.handle)

    def _wait(self, calls: list[Any], deadline: float) -> list[Any]:
        """Wait shortly for one of `calls` or a start to end, or a sample. Returns those of `calls` that have one."""
        if self._interrupted.is_set():
            raise Interrupted
        starts = [worker.start for worker in self._workers if worker.start is not None]
        timeout = min(max(deadline - time.monotonic(), 0.0), _POLL_SECONDS)
        if calls or starts:
            self._ray.wait([*calls, *starts], timeout=timeout)
        return self._ray.wait(calls, num_returns=len(calls), timeout=0)[0] if calls else []

    def _receive(self, share: _Share) -> tuple[list[Trajectory], Exception | None]:
        """The samples that have arrived, and why no more will; None: more may."""
        arrived: list[Trajectory] = []
        while self._ray.wait([share.stream], timeout=0)[0]:
            try:
                arrived.append(self._ray.get(next(share.stream)))
            except (StopIteration, *self._lost) as end:
                return arrived, end
        return arrived, None

    def _check_starts(self) -> None:
        """Take new workers that have their weights into use, and replace those that could not be started."""
        with self._changing:
            for worker in [worker for worker in self._workers if worker.start is not None]:
                ended = bool(self._ray.wait([worker.start], timeout=0)[0])
                if (ended or time.monotonic() >= worker.deadline) and self._has_received(worker, worker.start):
                    worker.start = None

    def _has_received(self, worker: _Worker, call: Any) -> bool:
        """Whether a worker has the weights that `call` gives it, which has ended or is overdue. Else it is replaced."""
        try:
            self._ray.get(call, timeout=0)
        except self._lost as error:
            if worker.start is not None and worker.attempts == _MAX_ATTEMPTS:
                raise RuntimeError(
                    f"rollout worker {worker.number} could not be started in {_MAX_ATTEMPTS} attempts"
                ) from error
            self._replace(worker, slow=isinstance(error, self._ray.exceptions.GetTimeoutError))
            return False
        return True

    def _replace(self, worker: _Worker, *, slow: bool) -> None:
        """Replace a worker by a new process, which gets the newest weights."""
        with self._changing:
            if worker not in self._workers:
                return  # the other thread has replaced it
            self._events["slow" if slow else "lost"] += 1
            log.warning("rollout worker %d is %s: starting a new one", worker.number, "too slow" if slow else "lost")
            self._ray.kill(worker.handle)
            attempts = 1 if worker.start is None else worker.attempts + 1
            new = _Worker(worker.number, self._actor.remote(self._spec), attempts)
            assert self._weights is not None
            new.start, new.deadline = new.handle.set_params.remote(*self._weights), time.monotonic() + _START_SECONDS
            self._workers[self._workers.index(worker)] = new


@dataclass(eq=False)
class _Worker:
    number: int  # among those of all processes
    handle: Any
    attempts: int = 1  # number of processes, this one included, since the last one that was in use
    start: Any = None  # the call that gives it its first weights; None: it is in use
    deadline: float = 0.0  # of `start`
    compiles_until: float | None = None  # the latest end of compiling; None: it has no prompts yet; 0: it has sampled
    answer: Any = None  # of a call that shows that a worker which compiles is not stopped


@dataclass(eq=False)
class _Share:
    """What a worker samples in a stream."""

    number: int  # of the stream
    stream: Any  # of samples
    prompts: dict[int, Prompt] = field(default_factory=dict)  # without those that are complete
    deadline: float = 0.0  # until the next sample, or the end
    progressed: bool = False  # whether there was a new sample
    ended: bool = False  # whether it gets no more prompts


def connect_ray() -> Any:
    """The module `ray`, connected to the cluster at RAY_ADDRESS, or to one that process 0 starts on its machine.

    All processes call it together. Raises ValueError if Ray is not installed, or does not run on this host.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("placement kind=ray needs Ray: pip install 'jaxtrain[ray]'")
    ray: Any = importlib.import_module("ray")

    def connect(**where: str) -> str:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING, **where)
        return ray.get_runtime_context().gcs_address

    def join() -> None:
        try:
            connect(address=address)
        except ConnectionError as error:
            raise ValueError(
                f"rl.placement.kind=ray: the cluster of process 0 at {address} has no node on this host: start Ray on "
                "every host (`ray start`) and set RAY_ADDRESS"
            ) from error

    address = from_process_0(connect)
    on_all(join)
    return ray
