"""Sources of the trainer's samples: collected on demand, or by threads beside the training."""

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Protocol

from jaxtrain.data.prompts import PromptStream
from jaxtrain.rl.ahead import AheadSource
from jaxtrain.rl.collect import Collected, Collector
from jaxtrain.rl.rollouts import Sampler
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
        self._collect, self._sampler, self._take_state = collect, sampler, state
        self._state = state()

    def __call__(self, params: Params, number: int) -> Collected | None:
        start = time.perf_counter()
        self._sampler.set_params(params, number)
        seconds = time.perf_counter() - start
        collected = self._collect()
        self._state = self._take_state()  # only after the rollout: an interrupted one is repeated
        return collected and collected._replace(metrics={**collected.metrics, "time/sync": seconds})

    def state(self) -> Any:
        return self._state

    def close(self) -> None:
        """Does nothing: rollouts run inside of `__call__`."""


def make_source(session: Session, collect: Collector, prompts: PromptStream[Any]) -> OnPolicySource | AheadSource:
    """The source for `rl.placement.staleness`. It is closed with the run.

    Raises ValueError if sampling cannot overlap with training.
    """
    section = session.config.rl
    assert section is not None
    if not section.placement.staleness:
        return OnPolicySource(collect, collect.sampler, prompts.get_state)
    if section.reward_models and session.mesh.size > 1:
        raise ValueError(
            f"rl.reward_models on the trainer's {session.mesh.size} devices cannot run during training: use "
            "rl.placement.staleness=0 or train on a single device"
        )
    source = AheadSource(collect, prompts, staleness=section.placement.staleness, updates=section.updates)
    session.enter(closing(source))
    return source
