"""Sources of the trainer's samples: collected on demand, or prefetched by a thread during training."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from jaxtrain.data.prompts import PromptStream
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.ray_sampler import RaySampler
from jaxtrain.rl.rollouts import Sampler
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.session import Session
from jaxtrain.train.agree import beside_training
from jaxtrain.types import Params

CollectSamples = Callable[[], Collected | None]


class SampleSource(Protocol):
    def __call__(self, params: Params, number: int) -> Collected | None:
        """The next samples, for a policy after `number` optimizer steps; None if there are no more."""
        ...

    def state(self) -> Any:
        """The state of the prompts after the last returned samples, from which a resumed run continues."""
        ...

    def close(self) -> None: ...


class OnPolicySource:
    """Samples of the current policy: its weights are sent to the sampler before every rollout.

    So a resumed run samples the same as an uninterrupted one.
    """

    def __init__(self, collect: CollectSamples, sampler: Sampler, state: Callable[[], Any]):
        self._collect, self._sampler, self._take_state = collect, sampler, state
        self._state = state()

    def __call__(self, params: Params, number: int) -> Collected | None:
        seconds = _set_params(self._sampler, params, number)
        collected = self._collect()
        self._state = self._take_state()  # only after the rollout: an interrupted one is repeated
        return _with_times(collected, {"time/sync": seconds})

    def state(self) -> Any:
        return self._state

    def close(self) -> None:
        """Does nothing: rollouts run inside of `__call__`."""


class PhasedSource:
    """On-policy samples, during which the optimizers' states wait on the host, and after which the engine is released
    (`rl.placement.memory: phased`)."""

    def __init__(self, source: OnPolicySource, sampler: EngineSampler, roles: Sequence[TrainedRole]):
        self._source, self._sampler, self._roles = source, sampler, roles

    def __call__(self, params: Params, number: int) -> Collected | None:
        start = time.perf_counter()
        for role in self._roles:
            role.wait_on_host()
        seconds = time.perf_counter() - start
        try:
            collected = self._source(params, number)
        finally:  # also after an interrupt, since a save needs the optimizer's state on the device
            self._sampler.release()
        return _with_times(collected, {"time/to_host": seconds})

    def state(self) -> Any:
        return self._source.state()

    def close(self) -> None:
        self._source.close()


class PrefetchingSource:
    """Samples collected by a thread while the trainer trains on earlier ones.

    A rollout starts when its first update will be at most `staleness` optimizer steps after the newest weights. Weights
    that arrive during a rollout are used from the engine's next device call on, so tokens may be newer than that. Each
    token is tagged with the version that sampled it. The threads of several processes exchange their values beside
    those of the trainer.
    """

    def __init__(
        self, collect: CollectSamples, sampler: Sampler, state: Callable[[], Any], *, staleness: int, updates: int
    ):
        """Every rollout is used for `updates` optimizer steps.

        Raises ValueError if `staleness` is too small for any rollout to be prefetched.
        """
        if staleness < updates:
            raise ValueError(
                f"rl.placement.staleness={staleness}: samples are used for {updates} optimizer steps, so prefetching "
                f"needs a staleness of at least {updates} (0: on policy)"
            )
        self._collect, self._sampler, self._read_state = collect, sampler, state
        self._staleness, self._updates = staleness, updates
        self._newest_version = 0
        self._changed = threading.Condition()
        self._closed = False
        self._rollouts: SimpleQueue[_Rollout] = SimpleQueue()
        self._state = state()
        self._thread: threading.Thread | None = None

    def __call__(self, params: Params, number: int) -> Collected | None:
        seconds = _set_params(self._sampler, params, number)
        with self._changed:
            self._newest_version = number
            self._changed.notify_all()
        if self._thread is None:  # not before the sampler has its first weights
            self._thread = threading.Thread(target=self._work, args=(number,), name="rollouts", daemon=True)
            self._thread.start()
        start = time.perf_counter()
        rollout = self._rollouts.get()
        if rollout.error is not None:
            raise rollout.error
        self._state = rollout.state
        return _with_times(rollout.collected, {"time/sync": seconds, "time/wait": time.perf_counter() - start})

    def state(self) -> Any:
        return self._state

    def close(self) -> None:
        """Wait for the sampling that is running, and start no other."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self, first: int) -> None:
        with beside_training(lambda: self._closed):
            due = first - self._staleness
            while self._wait_until(due):
                try:
                    rollout = _Rollout(self._collect(), self._read_state(), None)
                except BaseException as error:  # raised in the trainer's thread, by `__call__`
                    rollout = _Rollout(None, None, error)
                self._rollouts.put(rollout)
                if rollout.collected is None:
                    return
                due += self._updates

    def _wait_until(self, version: int) -> bool:
        """Wait for weights of at least this version. False if the source is closed instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._newest_version >= version)
            return not self._closed


def make_source(
    session: Session,
    collect: CollectSamples,
    sampler: EngineSampler | RaySampler,
    prompts: PromptStream[Any],
    roles: Sequence[TrainedRole],
) -> SampleSource:
    """The source for `rl.placement.staleness` and `memory`. It is closed with the run. `roles` are all that train.

    Raises ValueError if sampling cannot overlap with training.
    """
    section = session.config.rl
    assert section is not None
    if not section.placement.staleness:
        on_policy = OnPolicySource(collect, sampler, prompts.get_state)
        if section.placement.memory == "kept":
            return on_policy
        assert isinstance(sampler, EngineSampler)
        return PhasedSource(on_policy, sampler, roles)
    if section.reward_models and session.mesh.size > 1:
        raise ValueError(
            f"rl.reward_models on the trainer's {session.mesh.size} devices cannot run during training: use "
            "rl.placement.staleness=0 or train on a single device"
        )
    source = PrefetchingSource(
        collect, sampler, prompts.get_state, staleness=section.placement.staleness, updates=section.updates
    )
    session.enter(closing(source))
    return source


class _Rollout(NamedTuple):
    collected: Collected | None
    state: Any
    error: BaseException | None


def _set_params(sampler: Sampler, params: Params, number: int) -> float:
    start = time.perf_counter()
    sampler.set_params(params, number)
    return time.perf_counter() - start


def _with_times(collected: Collected | None, times: dict[str, float]) -> Collected | None:
    return collected and collected._replace(metrics={**collected.metrics, **times})
