"""Sources of the trainer's samples: collected on demand, or by threads beside the training."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Protocol

from jaxtrain.data.prompts import PromptStream
from jaxtrain.rl.async_source import AsyncSource
from jaxtrain.rl.collect import Collected, Collector
from jaxtrain.rl.rollouts import Sampler
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.session import Session
from jaxtrain.types import Params


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

    def __init__(self, collect: Callable[[], Collected | None], sampler: Sampler, state: Callable[[], Any]):
        self._collect, self._sampler, self._read_state = collect, sampler, state
        self._state = state()

    def __call__(self, params: Params, number: int) -> Collected | None:
        start = time.perf_counter()
        self._sampler.set_params(params, number)
        seconds = time.perf_counter() - start
        collected = self._collect()
        self._state = self._read_state()  # only after the rollout: an interrupted one is repeated
        return collected and collected._replace(metrics={**collected.metrics, "time/sync": seconds})

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
        return collected and collected._replace(metrics={**collected.metrics, "time/to_host": seconds})

    def state(self) -> Any:
        return self._source.state()

    def close(self) -> None:
        self._source.close()


def make_source(
    session: Session, collect: Collector, prompts: PromptStream[Any], roles: Sequence[TrainedRole]
) -> SampleSource:
    """The source for `rl.placement.staleness` and `memory`. It is closed with the run. `roles` are all that train.

    Raises ValueError if sampling cannot overlap with training.
    """
    section = session.config.rl
    assert section is not None
    if not section.placement.staleness:
        on_policy = OnPolicySource(collect, collect.sampler, prompts.get_state)
        if section.placement.memory == "kept":
            return on_policy
        assert isinstance(collect.sampler, EngineSampler)
        return PhasedSource(on_policy, collect.sampler, roles)
    if section.reward_models and session.mesh.size > 1:
        raise ValueError(
            f"rl.reward_models on the trainer's {session.mesh.size} devices cannot run during training: use "
            "rl.placement.staleness=0 or train on a single device"
        )
    source = AsyncSource(
        collect, prompts, staleness=section.placement.staleness, updates=section.updates, scorers=section.scorers
    )
    session.enter(closing(source))
    return source
