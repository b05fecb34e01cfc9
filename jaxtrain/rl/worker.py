"""How a sampler is made from things that can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtrain.config.rollouts import EnvironmentSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.named import load_named
from jaxtrain.nn.model import Model
from jaxtrain.rl.conversations import Conversations
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import Synced
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import SamplingParams
from jaxtrain.types import Params


@dataclass(frozen=True)
class WorkerSpec:
    """A sampler before it has weights. Can be pickled where `model` is on no mesh."""

    model: Model  # that samples: see `sync.rollout_model`
    params: SamplingParams
    seed: int
    slots: int
    max_length: int  # tokens of prompt and completion, all turns
    tokenizer: Any = None  # for texts; environments need one with a chat template
    support: int = 0  # with filters: tokens kept at most, which the trainer scores a sample under
    environment: EnvironmentSection | None = None

    def build(self, weights: Params, version: int, sync: Callable[[Params], Synced]) -> EngineSampler:
        """`weights` are the engine's first; `sync` makes those given to `set_params` like them.

        Raises ValueError for an environment that cannot be found.
        """
        engine = Engine(
            self.model,
            weights,
            slots=self.slots,
            max_length=self.max_length,
            tokenizer=self.tokenizer,
            support=self.support,
            version=version,
        )
        return EngineSampler(engine, self.params, self.seed, sync, self._conversations())

    def _conversations(self) -> Conversations | None:
        section = self.environment
        if section is None:
            return None
        factory = load_named(section.factory, "rl.environment.factory", "jaxtrain.rl.environments")
        return Conversations(
            factory=partial(factory, **section.args),
            chat=ChatTokenizer(self.tokenizer),
            params=self.params,
            max_turns=section.max_turns,
            max_length=section.max_length(self.max_length),
            seconds=section.seconds,
        )
