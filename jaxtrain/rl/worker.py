"""`WorkerSpec`: a picklable description from which a sampler is built, also in another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxtrain.config import MeshSection
from jaxtrain.config.rl_parts import EnvironmentSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.named import load_named
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import engine_mesh
from jaxtrain.rl.conversations import Conversations
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import Synced, rollout_model
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, SamplingParams
from jaxtrain.types import Params


@dataclass(frozen=True)
class WorkerSpec:
    """A sampler without weights. It can be pickled if `model` has no mesh."""

    model: Model  # see `sync.rollout_model`
    params: SamplingParams
    seed: int
    slots: int
    max_length: int  # maximum tokens of prompt and completion, in all turns
    tokenizer: Any = None  # for texts; environments need one with a chat template
    support: int = 0  # maximum number of tokens that filters keep, among which the trainer scores a sample
    environment: EnvironmentSection | None = None
    in_turns: bool = True  # of conversations; see `Conversations`
    deal: Deal = Deal()  # noqa: RUF009 - immutable
    template_kwargs: dict[str, Any] | None = None  # of every conversation with an environment
    date: str | None = None  # today for chat templates that write it
    mesh: MeshSection = MeshSection()  # noqa: RUF009 - immutable. Of the trainer; see `on_devices`

    def on_devices(self, devices: Sequence[Any]) -> WorkerSpec:
        """With the model on these devices, over which it is split by `mesh` where the sizes permit."""
        mesh = None if len(devices) == 1 else engine_mesh(self.mesh, devices)
        return replace(self, model=rollout_model(self.model, mesh))

    def build(self, weights: Params, version: int, sync: Callable[[Any], Synced]) -> EngineSampler:
        """Build the sampler. `weights` are the engine's initial ones; `sync` converts later ones to the same form.

        Raises ValueError for an environment that cannot be imported.
        """
        engine = Engine(
            self.model,
            weights,
            slots=self.slots,
            max_length=self.max_length,
            tokenizer=self.tokenizer,
            limits=EngineLimits(support=self.support),
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
            chat=ChatTokenizer(self.tokenizer, template_kwargs=self.template_kwargs, date=self.date),
            params=self.params,
            max_turns=section.max_turns,
            max_length=section.max_length(self.max_length),
            seconds=section.seconds,
            in_turns=self.in_turns,
            deal=self.deal,
        )
