"""`AsyncSource`: samples that threads collect during training, group by group."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from jaxtrain.data.prompts import PromptStream
from jaxtrain.rl.collect import Collected, Collector, ScoredGroup
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.train.agree import gather_values, on_all
from jaxtrain.train.preemption import Interrupted
from jaxtrain.types import Params

_POLL_SECONDS = 0.2  # interval at which an idle sampler checks whether others want it


class AsyncSource:
    """Samples of prompts that are started while the trainer trains on earlier ones.

    One thread samples continuously: it starts new prompts while others are running, as many as `GroupQueue` permits.
    Other threads score the finished groups. The trainer gets a batch as soon as enough groups are finished, in any
    order. Every token is tagged with the version that sampled it, since new weights are
    used from the engine's next device call on.

    Each process samples its own prompts and has its own threads, which do not wait for those of other processes; all
    call the source together.
    """

    def __init__(
        self, collect: Collector, prompts: PromptStream[Any], *, staleness: int, updates: int, scorers: int = 1
    ):
        """Every batch is used for `updates` optimizer steps. `collect` draws from `prompts`, and its scorer is called
        by `scorers` threads of each process for itself: several score one group each, so that a slow one delays no
        other; a single one scores together what was finished meanwhile.

        Raises ValueError if `staleness` is too small to start a batch before the previous one has been trained on.
        """
        if staleness < updates:
            raise ValueError(
                f"rl.placement.staleness={staleness}: samples are used for {updates} optimizer steps, so sampling "
                f"during training needs a staleness of at least {updates} (0: on policy)"
            )
        self._collect, self._sampler, self._scorers = collect, collect.sampler, scorers
        self._queue = GroupQueue(
            lambda: next(iter(collect.next_prompts(1)), None),
            prompts.get_state,
            collect.deal.owns,
            prompts=collect.prompts,
            max_lag=staleness // updates,
            refills=collect.algorithm.max_refills,
        )
        self._state = prompts.get_state()
        self._changed = threading.Condition()  # protects the queue and what follows
        self._closed = False
        self._error: BaseException | None = None
        self._sampled: SimpleQueue[list[Trajectory] | None] = SimpleQueue()  # groups without rewards; None: no more
        self._threads: list[threading.Thread] = []

    def __call__(self, params: Params, number: int) -> Collected | None:
        start = time.perf_counter()
        self._sampler.set_params(params, number)
        synced = time.perf_counter()
        with self._changed:  # only now, so that no prompt that is started for it gets older weights
            self._queue.next_batch()
            self._changed.notify_all()
        if not self._threads:  # not before the sampler has its first weights
            self._threads = [
                threading.Thread(target=self._until_error, args=(work,), name=name, daemon=True)
                for name, work in (("rollouts", self._sample), *[("rewards", self._score)] * self._scorers)
            ]
            for thread in self._threads:
                thread.start()
        own = on_all(self._wait_for_part)
        times = {"time/sync": synced - start, "time/wait": time.perf_counter() - synced}
        return self._collected(own, times)

    def state(self) -> Any:
        return self._state

    def close(self) -> None:
        """Abort the sampling that is running."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._sampled.put(None)
        for thread in self._threads:
            thread.join()

    def _wait_for_part(self) -> BatchPart:
        """This process's part of the batch, once it is finished."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if (own := self._queue.next_part()) is not None:
                    self._changed.notify_all()
                    return own
                self._changed.wait()

    def _collected(self, own: BatchPart, times: dict[str, float]) -> Collected | None:
        """The batch of all processes. They call it together."""
        collect, numbers = self._collect, {group.prompt.number: group.useful for group in own.members}
        groups = sorted([*own.members, *own.replaced], key=lambda group: group.prompt.number)
        seen = collect.deal.share([t for group in groups for t in group.samples])
        parts = gather_values((numbers, own.state, own.used))
        low = min((state for _, state, _ in parts), key=_number)
        used = sorted({number for *_, part in parts for number in part if number >= _number(low)})
        self._queue.forget(_number(low))
        self._state = {**low, "prompts": {**low["prompts"], "used": sorted({*low["prompts"]["used"], *used})}}
        if not seen:
            return None
        useful = {number: each for part, *_ in parts for number, each in part.items()}
        of_all = [seen[at : at + collect.samples] for at in range(0, len(seen), collect.samples)]
        members = [group for group in of_all if group[0].prompt.number in useful]
        kept = [group for group in members if useful[group[0].prompt.number]]
        return collect.collected(seen, kept, members or of_all, times)

    def _until_error(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised in the trainer's thread, by `_wait_for_part`
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _sample(self) -> None:
        samples: dict[int, list[Trajectory]] = {}  # by prompt
        while not self._queue.exhausted:
            for trajectory in self._sampler.stream(self._feed(samples), self._collect.samples):
                group = samples[trajectory.prompt.number]
                group.append(trajectory)
                if len(group) == self._collect.samples:
                    del samples[trajectory.prompt.number]
                    self._sampled.put(sorted(group, key=lambda t: t.sample))

    def _feed(self, samples: dict[int, list[Trajectory]]) -> Iterator[Sequence[Prompt]]:
        """The prompts to start, which get an entry in `samples`, until there are no more or another call waits."""
        while True:
            with self._changed:
                prompts = self._queue.start()
                if not prompts and not samples and not self._closed and not self._queue.exhausted:
                    self._changed.wait(_POLL_SECONDS)
                    prompts = self._queue.start()
                if self._closed:
                    raise Interrupted
                self._changed.notify_all()  # the last prompts may have been drawn
            samples.update((prompt.number, []) for prompt in prompts)
            yield prompts
            if self._queue.exhausted or self._sampler.wanted():
                return

    def _score(self) -> None:
        while True:
            groups = [self._sampled.get()]
            with suppress(Empty):
                while self._scorers == 1:
                    groups.append(self._sampled.get_nowait())
            if None in groups:
                self._sampled.put(None)  # for the other threads
                return
            scored = self._collect.score([t for group in groups for t in group or ()])
            with self._changed:
                for group in self._collect.groups(scored):
                    self._queue.finish(group)
                self._changed.notify_all()


@dataclass(eq=False)
class _Group:
    prompt: Prompt
    before: dict[str, Any]  # the state of the prompts before this one was drawn
    due: int = 0  # the number of the last batch that it may be in
    scored: ScoredGroup | None = None  # None: it is under way

    @property
    def samples(self) -> list[Trajectory]:
        assert self.scored is not None
        return self.scored.samples

    @property
    def useful(self) -> bool:
        return self.scored is not None and self.scored.useful


class BatchPart(NamedTuple):
    """A process's part of a batch."""

    members: list[_Group]
    replaced: list[_Group]  # useless groups that were replaced by other prompts since the previous batch
    state: dict[str, Any]  # of the prompts, before the first one that is in no batch yet
    used: list[int]  # numbers of prompts of this process in batches, without early ones


class GroupQueue:
    """The prompts of a process from their draw to their batch.

    Batch number b, counted from 0, has as many of the process's groups as it owns among the prompts b * `prompts` to
    (b + 1) * `prompts` of the stream, so that all processes have equal shares, but whichever are finished first.

    When batch b is requested, the weights are those before its first update, and prompts are started until there are
    enough for the batches up to b + `prefetch`. Prompts started before the next request may be in batch b + `max_lag`
    at the latest: for its first update their weights are not too old. A batch consists of the oldest finished groups
    and waits for others only if one of them would be too old for the next batch. `prefetch` is half of `max_lag`,
    rounded up: a group may take about twice the average time without delaying a batch, but not with `max_lag=1`.

    Not thread-safe.
    """

    def __init__(
        self,
        draw: Callable[[], Prompt | None],
        state: Callable[[], dict[str, Any]],
        owns: Callable[[int], bool],
        *,
        prompts: int,
        max_lag: int,
        refills: int,
    ):
        """`draw` returns the next prompt of all processes, None if there is none; `state()` is the state from which
        it can be drawn again.

        At most `refills` * (groups per batch) useless groups are replaced before the next batch.
        """
        self._draw, self._read_state, self._owns = draw, state, owns
        self._prompts, self._refills = prompts, refills
        self._max_lag, self._prefetch = max_lag, -(-max_lag // 2)
        self._batch = -1  # the newest that was requested
        self._positions = self._owned = 0  # prompts drawn, of all processes and of this one
        self._ends: list[int] = []  # of the prompts of this process in each batch
        self._waiting: deque[_Group] = deque()  # drawn
        self._started: list[_Group] = []
        self._replaced: list[_Group] = []
        self._admitted = 0  # groups that were started, without replaced ones
        self._used: set[int] = set()
        self._drawn_all = False

    @property
    def exhausted(self) -> bool:
        """Whether no prompt is left to start."""
        return self._drawn_all and not self._waiting

    def next_batch(self) -> None:
        """Ask for the next batch."""
        self._batch += 1

    def start(self) -> list[Prompt]:
        """The prompts to start now."""
        last = self._batch + self._prefetch
        while len(self._ends) <= last and not self._drawn_all:
            self._draw_next()
        started = []
        while self._admitted < self._end(last):
            while not self._waiting and not self._drawn_all:
                self._draw_next()
            if not self._waiting:
                break
            group = self._waiting.popleft()
            group.due = self._batch + self._max_lag
            self._started.append(group)
            self._admitted += 1
            started.append(group.prompt)
        return started

    def finish(self, scored: ScoredGroup) -> None:
        """Record the samples of a prompt that was started. A useless group is replaced, unless too many were."""
        number = scored.samples[0].prompt.number
        group = next(group for group in self._started if group.prompt.number == number)
        group.scored = scored
        if not scored.useful and len(self._replaced) < self._refills * self._share(self._batch):
            self._started.remove(group)
            self._replaced.append(group)
            self._admitted -= 1

    def next_part(self) -> BatchPart | None:
        """The groups of the requested batch; None if they are not finished."""
        batch = self._batch
        if len(self._ends) <= batch and not self._drawn_all:
            return None
        share = self._share(batch)
        expected = min(share, len(self._started)) if self.exhausted else share
        members = [group for group in self._started if group.scored is not None][:share]
        left = [group for group in self._started if group not in members]
        for last in range(batch, batch + self._prefetch):  # in later ones there is room for all
            if sum(group.due <= last for group in left) > self._end(last) - self._end(batch):
                return None
        if len(members) < expected:
            return None
        replaced, self._replaced, self._started = self._replaced, [], left
        self._used.update(group.prompt.number for group in [*members, *replaced])
        first = next(iter([*left, *self._waiting]), None)
        state = self._read_state() if first is None else first.before
        return BatchPart(members, replaced, state, sorted(self._used))

    def forget(self, number: int) -> None:
        """Forget that prompts before this one are used: no process has one before it left."""
        self._used = {each for each in self._used if each >= number}

    def _draw_next(self) -> None:
        before = self._read_state()
        prompt = self._draw()
        if prompt is None:
            self._drawn_all = True
            return
        self._positions += 1
        if self._owns(prompt.number):
            self._owned += 1
            self._waiting.append(_Group(prompt, before))
        if self._positions % self._prompts == 0:
            self._ends.append(self._owned)

    def _end(self, batch: int) -> int:
        """How many of this process's prompts are in the batches up to this one."""
        if batch < 0:
            return 0
        return self._ends[batch] if batch < len(self._ends) else self._owned

    def _share(self, batch: int) -> int:
        return self._end(batch) - self._end(batch - 1)


def _number(state: dict[str, Any]) -> int:
    """Of the next prompt that is drawn after a state."""
    return state["prompts"]["number"]
