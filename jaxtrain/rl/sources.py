"""Where the trainer's samples come from: drawn when they are asked for, or ahead of time while it trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from jaxtrain.rl.collect import Collected
from jaxtrain.rl.rollouts import Sampler
from jaxtrain.types import Params

Collect = Callable[[], Collected | None]


class Source(Protocol):
    def __call__(self, params: Params, number: int) -> Collected | None:
        """The samples to learn from next, for a policy of `number` optimizer steps. None: there are no more."""
        ...

    def state(self) -> Any:
        """Of the prompts, after those of the samples handed out last: where a resumed run goes on."""
        ...

    def close(self) -> None: ...


class OnPolicy:
    """Samples of the present policy: the sampler gets its weights, then draws.

    It does before every rollout, so that whoever resumes from a checkpoint draws what an uninterrupted run would have.
    """

    def __init__(self, collect: Collect, sampler: Sampler, state: Callable[[], Any]):
        self._collect, self._sampler, self._take_state = collect, sampler, state
        self._state = state()

    def __call__(self, params: Params, number: int) -> Collected | None:
        seconds = _hand_over(self._sampler, params, number)
        collected = self._collect()
        self._state = self._take_state()  # not while it collects: a rollout that is given up has drawn prompts
        return _timed(collected, {"time/sync": seconds})

    def state(self) -> Any:
        return self._state

    def close(self) -> None:
        """Nothing is under way."""


class Ahead:
    """Samples drawn by a thread while the trainer works on earlier ones.

    A rollout begins once its first update lies at most `staleness` optimizer steps ahead of the newest weights. Weights
    that come while it is under way are used from the engine's next call on, so its tokens may be fresher than that, and
    each is tagged with the version that drew it.
    """

    def __init__(self, collect: Collect, sampler: Sampler, state: Callable[[], Any], *, staleness: int, updates: int):
        """Every rollout serves `updates` optimizer steps.

        Raises ValueError where `staleness` is too small for any rollout to begin early.
        """
        if staleness < updates:
            raise ValueError(
                f"rl.placement.staleness={staleness}: samples serve {updates} optimizer steps, so the next rollout can "
                f"only begin early with a staleness of {updates} or more (0: on policy)"
            )
        self._collect, self._sampler, self._take_state = collect, sampler, state
        self._staleness, self._updates = staleness, updates
        self._newest = 0
        self._news = threading.Condition()
        self._closed = False
        self._made: SimpleQueue[_Made] = SimpleQueue()
        self._state = state()
        self._thread: threading.Thread | None = None

    def __call__(self, params: Params, number: int) -> Collected | None:
        seconds = _hand_over(self._sampler, params, number)
        with self._news:
            self._newest = number
            self._news.notify_all()
        if self._thread is None:  # not before the sampler has its first weights
            self._thread = threading.Thread(target=self._work, args=(number,), name="rollouts", daemon=True)
            self._thread.start()
        start = time.perf_counter()
        made = self._made.get()
        if made.error is not None:
            raise made.error
        self._state = made.state
        return _timed(made.collected, {"time/sync": seconds, "time/wait": time.perf_counter() - start})

    def state(self) -> Any:
        return self._state

    def close(self) -> None:
        """Wait for the rollout that is under way, and begin no other."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self, first: int) -> None:
        due = first - self._staleness
        while True:
            with self._news:
                self._news.wait_for(lambda at=due: self._closed or self._newest >= at)
                if self._closed:
                    return
            try:
                made = _Made(self._collect(), self._take_state(), None)
            except BaseException as error:  # it is the trainer's thread that has to end the run
                made = _Made(None, None, error)
            self._made.put(made)
            if made.collected is None:
                return
            due += self._updates


class _Made(NamedTuple):
    collected: Collected | None
    state: Any
    error: BaseException | None


def _hand_over(sampler: Sampler, params: Params, number: int) -> float:
    start = time.perf_counter()
    sampler.set_params(params, number)
    return time.perf_counter() - start


def _timed(collected: Collected | None, times: dict[str, float]) -> Collected | None:
    return collected and collected._replace(metrics={**collected.metrics, **times})
