"""`EngineSampler`: a sampler with an engine in this process."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from jaxtrain.rl.conversations import Conversations
from jaxtrain.rl.rollouts import Prompt, Sampler, Trajectory
from jaxtrain.rl.sync import Synced
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.train.preemption import Interrupted
from jaxtrain.types import Params


class EngineSampler(Sampler):
    """A `Sampler`. A sample depends only on `seed`, the prompt, its number, the sample's index and the weights.

    `set_params` may be called from another thread during sampling: the engine uses the new weights from its next device
    call on. Every token is tagged with the version that sampled it.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        seed: int,
        sync: Callable[[Any], Synced],
        conversations: Conversations | None = None,
    ):
        """`sync` converts the parameters of `set_params` to the engine's. `conversations`: for environments."""
        self._engine, self._params, self._seed, self._sync = engine, params, seed, sync
        self._conversations = conversations
        self._sampling, self._next = threading.Lock(), threading.Lock()  # of the call that samples, and that is next
        self._pending: deque[tuple[Params, int]] = deque(maxlen=1)
        self._metrics: dict[str, float] = {}
        self._interrupted = threading.Event() if conversations is None else conversations.interrupted
        self._check: Callable[[], None] | None = None

    def stream(self, feed: Iterator[Sequence[Prompt]], samples: int) -> Iterator[Trajectory]:
        with self._next:
            self._sampling.acquire()
        try:
            if self._conversations is not None:
                engine, between = self._engine, self._between_calls
                yield from self._conversations.run(engine, feed, samples, self._draw_seed, between)
                return
            running: dict[int, Prompt] = {}  # by request

            def source(idle: bool) -> bool:
                prompts = next(feed, None)
                for prompt in prompts or ():
                    room = self._engine.max_length - len(prompt.ids)
                    seed, limit = self._draw_seed(prompt.number), min(self._params.max_tokens or room, room)
                    params = replace(self._params, n=samples, max_tokens=limit, seed=seed)
                    running[self._engine.submit(Request(prompt.ids.tolist(), params))] = prompt
                if self._engine.busy:
                    self._between_calls()  # after the feed, whose prompts must not begin under older weights than its
                return prompts is not None

            finished = Counter[int]()  # samples of a request
            with closing(self._engine.run(source)) as chunks:
                for chunk in chunks:
                    if chunk.completion is not None:
                        yield trajectory_of(running[chunk.request], chunk.sample, chunk.completion)
                        finished[chunk.request] += 1
                        if finished[chunk.request] == samples:
                            del running[chunk.request], finished[chunk.request]
        finally:
            self._sampling.release()

    def wanted(self) -> bool:
        return self._next.locked()

    def set_params(self, params: Any, version: int) -> None:
        """`params`: what `sync` takes."""
        synced = self._sync(params)
        self._metrics = {"sync/bytes": float(synced.bytes), "sync/seconds": synced.seconds}
        self._pending.append((synced.params, version))
        if self._sampling.acquire(blocking=False):  # else the sampling thread takes them before its next device call
            try:
                self._apply_weights()
            finally:
                self._sampling.release()

    def release(self) -> None:
        """Free the engine's weights and cache until the next `set_params`. Nothing may be sampling."""
        with self._sampling:
            self._metrics |= self._engine.usage()
            self._pending.clear()
            self._engine.release()

    def metrics(self) -> dict[str, float]:
        """Of the newest `set_params` the bytes and seconds of the transfer; the engine's slots and memory in use since
        the last call."""
        return self._metrics | self._engine.usage()

    def agree_on_interrupts(self, check: Callable[[], None]) -> None:
        """Call `check` before each device call instead of looking for interrupts of this process alone.

        For an engine of several processes, whose device calls need all of them.
        """
        self._check = check

    def interrupt(self) -> None:
        """Abort sampling, also in the future: `sample` raises Interrupted shortly. Thread-safe."""
        self._interrupted.set()

    def close(self) -> None:
        """Does nothing: the engine is freed with this object."""

    def _draw_seed(self, *parts: int) -> int:
        return int(np.random.SeedSequence([self._seed, *parts]).generate_state(1)[0])

    def _between_calls(self) -> None:
        if self._check is not None:
            self._check()
        elif self._interrupted.is_set():
            raise Interrupted
        self._apply_weights()

    def _apply_weights(self) -> None:
        if self._pending:
            self._engine.set_params(*self._pending.popleft())


def trajectory_of(prompt: Prompt, sample: int, completion: Completion) -> Trajectory:
    return Trajectory(
        prompt=prompt,
        sample=sample,
        completion_ids=completion.ids,
        loss_mask=np.ones(len(completion.ids), bool),
        sampler_logps=completion.logps,
        raw_logps=completion.raw_logps,
        versions=completion.versions,
        text=completion.text or "",
        finish_reason=completion.finish_reason,
        supports=completion.supports,
        timings={"rollout": completion.timings.finished},
        info={} if completion.error is None else {"error": completion.error},
    )
