"""Deals the prompts of a run to its processes, and shares an outline of the samples of each with all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax

from jaxtrain.rl.rollouts import Prompt, Sampler, Trajectory, outline
from jaxtrain.train.agree import gather_values, on_all

T = TypeVar("T")


@dataclass(frozen=True)
class Deal:
    """A prompt and its samples belong to the process whose index is the prompt's number modulo the processes.

    So every minibatch, which is a range of prompts, has as many prompts on each process, within one. All processes draw
    all prompts. Each knows the samples of the others in `outline`.
    """

    process: int = 0
    processes: int = 1
    engine_processes: int = 1  # adjacent processes that run an engine together

    @classmethod
    def of_run(cls, engine_processes: int = 1) -> Deal:
        return cls(jax.process_index(), jax.process_count(), engine_processes)

    @property
    def engine_group(self) -> range | None:
        """The processes that run an engine together with this one; None if it has one of its own."""
        if self.engine_processes == 1:
            return None
        first = self.process // self.engine_processes * self.engine_processes
        return range(first, first + self.engine_processes)

    def owner(self, number: int) -> int:
        """The process to which the prompt of this number belongs."""
        return number % self.processes

    def owns(self, number: int) -> bool:
        """Whether the prompt of this number belongs to this process."""
        return self.owner(number) == self.process

    def samples(self, number: int) -> bool:
        """Whether the engine of this process samples the prompt of this number."""
        return self.owner(number) // self.engine_processes == self.process // self.engine_processes

    def sample(self, sampler: Sampler, prompts: Sequence[Prompt], samples: int) -> list[Trajectory]:
        """The samples of this process's prompts. All processes call it together, with the same prompts."""
        mine = [prompt for prompt in prompts if self.samples(prompt.number)]
        groups = on_all(lambda: sampler.sample(mine, samples) if mine else [])
        return self.own([t for group in groups for t in group])

    def own(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Those of this process."""
        return [t for t in trajectories if self.owns(t.prompt.number)]

    def share(self, own: Sequence[Trajectory]) -> list[Trajectory]:
        """The samples of all processes by prompt and sample, those of others in outline. A collective."""
        if self.processes == 1:
            return list(own)
        full = {(t.prompt.number, t.sample): t for t in own}
        known = [t for part in gather_values([outline(t) for t in own]) for t in part]
        known.sort(key=lambda t: (t.prompt.number, t.sample))
        return [full.get((t.prompt.number, t.sample), t) for t in known]

    def merge(self, trajectories: Sequence[Trajectory], own: Sequence[T]) -> list[T]:
        """A value of each of `trajectories`, of which `own` has those of this process, in order. A collective."""
        values: list[Iterator[T]] = [iter(part) for part in gather_values(list(own))]
        return [next(values[self.owner(t.prompt.number)]) for t in trajectories]
