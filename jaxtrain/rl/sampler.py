"""`EngineSampler`: prompts in, unscored trajectories out, from an engine in this process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jaxtrain.rl.conversations import Conversations
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.rl.sync import Synced
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.train.preemption import Interrupted
from jaxtrain.types import Params


class EngineSampler:
    """A `Sampler`. What is drawn depends on `seed`, the prompt's number, the sample's index and the weights alone.

    `set_params` may be called from another thread while samples are under way: they go on with the new weights from the
    engine's next call on, and every token is tagged with the version that drew it.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        seed: int,
        sync: Callable[[Params], Synced],
        conversations: Conversations | None = None,
    ):
        """`sync` makes the engine's parameters from those given to `set_params`. `conversations`: with environments."""
        self._engine, self._params, self._seed, self._sync = engine, params, seed, sync
        self._conversations = conversations
        self._sampling = threading.Lock()
        self._pending: deque[tuple[Params, int]] = deque(maxlen=1)
        self._metrics: dict[str, float] = {}
        self._interrupted = threading.Event() if conversations is None else conversations.interrupted

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[Trajectory]]:
        if self._conversations is not None:
            return self._conversations.run(self._generate, prompts, samples, self._draw_seed)
        requests = [self._request(prompt, samples) for prompt in prompts]
        answers = self._generate(requests)
        return [
            [trajectory_of(prompt, sample, completion) for sample, completion in enumerate(group)]
            for prompt, group in zip(prompts, answers, strict=True)
        ]

    def set_params(self, params: Params, version: int) -> None:
        synced = self._sync(params)
        self._metrics = {"sync/bytes": float(synced.bytes), "sync/seconds": synced.seconds}
        self._pending.append((synced.params, version))
        if self._sampling.acquire(blocking=False):  # else the thread that samples takes them before its next call
            try:
                self._take_weights()
            finally:
                self._sampling.release()

    def metrics(self) -> dict[str, float]:
        """Of the newest `set_params`: bytes of the parameters, and the seconds they took to get where they sample."""
        return self._metrics

    def interrupt(self) -> None:
        """Give up the samples under way, and all to come: `sample` raises Interrupted soon. From any thread."""
        self._interrupted.set()

    def close(self) -> None:
        """Nothing to give back: the engine goes with this object."""

    def _request(self, prompt: Prompt, samples: int) -> Request:
        room = self._engine.max_length - len(prompt.ids)
        most = min(self._params.max_tokens or room, room)
        seed = self._draw_seed(prompt.number)
        return Request(prompt.ids.tolist(), replace(self._params, n=samples, max_tokens=most, seed=seed))

    def _draw_seed(self, *parts: int) -> int:
        return int(np.random.SeedSequence([self._seed, *parts]).generate_state(1)[0])

    def _generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`Engine.generate`, with new weights taken over between its device calls."""
        with self._sampling:
            return self._engine.generate(requests, self._between_calls)

    def _between_calls(self) -> None:
        if self._interrupted.is_set():
            raise Interrupted
        self._take_weights()

    def _take_weights(self) -> None:
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
