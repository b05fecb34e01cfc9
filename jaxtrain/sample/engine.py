"""The engine: fixed slots, continuous batching, a few compiled programs. See `Engine`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxtrain.nn.model import Model
from jaxtrain.sample import decode as programs
from jaxtrain.sample.buffers import Buffers
from jaxtrain.sample.constraints import Trie, join_tries
from jaxtrain.sample.decode import BROKEN, ENDED, FULL, STOPPED, Generated, Slots
from jaxtrain.sample.filters import Knobs
from jaxtrain.sample.placement import MARK, place_params, row_shares, slots_within
from jaxtrain.sample.requests import Chunk, Completion, FinishReason, Request, check_request
from jaxtrain.sample.samples import Sample, SlotValues, no_knobs
from jaxtrain.types import Params

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 2048  # of the widest prefill, so that short prompts share a call

_REASONS: dict[int, FinishReason] = {STOPPED: "stop", ENDED: "stop", FULL: "length", BROKEN: "failed"}


class Engine:
    """Generates for many requests at once, with the trainer's own forward pass.

        engine = Engine(model, params, slots=32, max_length=1024, tokenizer=tokenizer)
        [[completion, ...], ...] = engine.generate([Request(ids, SamplingParams(max_tokens=64, n=8)), ...])

    `slots` samples are generated together; a finished one's slot goes to the next that waits. Nothing a request asks
    for compiles anything: a program is compiled once per bucket of prompt and cache lengths (`warm_up` compiles them
    all beforehand). What a seed yields does not depend on what else is going on, nor on the slot.

    `set_params(params, version)` swaps the weights between calls, also while samples are under way.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        max_length: int,
        slots: int | None = None,
        cache_bytes: int | None = None,
        tokenizer: Any = None,
        support: int = 0,
        alternatives: int = 0,
        steps: int = 32,
        version: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            model: its compute dtype is the cache's; on its mesh slots lie over data x fsdp and heads over tensor.
            params: the trainer's tree (stacked layers). The engine keeps its own copy, in the compute dtype.
            max_length: prompt and new tokens of a sample.
            slots: samples in flight; a multiple of the parts that the mesh deals rows to.
            cache_bytes: instead of `slots`, what the cache may take on each device: as many slots as fit (`.slots`).
            tokenizer: for `Completion.text`; without one it is None.
            support: where filters (top-k, top-p, min-p) are on, return the ids they keep as `Completion.supports`, and
                keep at most so many, the most probable; a larger `top_k` is refused. 0: no bound and no supports.
            alternatives: the most that a request may ask for as `SamplingParams.alternatives`.
            steps: tokens a slot gets per device call at most; what streams, and what `set_params` waits for.
            version: of `params`; every token is tagged with it.
            seed: of the seeds given to requests that bring none.
        """
        shares = row_shares(model)
        if (slots is None) == (cache_bytes is None):
            raise ValueError("give either slots or cache_bytes, not both and not neither")
        if slots is None:
            slots = slots_within(model, max_length, cache_bytes or 0)
        if slots < 1 or slots % shares:
            raise ValueError(f"slots={slots} must be a multiple of mesh.data x mesh.fsdp = {shares}")
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: a sample is a prompt and a new token, so at least 2")
        self.model = replace(model, run=replace(model.run, context=max_length))
        self.slots, self.max_length = slots, max_length
        self.tokenizer, self.support, self.steps = tokenizer, min(support, model.config.vocab_size), steps
        self.alternatives = min(alternatives, model.config.vocab_size)
        self._shares = shares
        self._windowed = any(kind.window is not None for kind in model.config.pattern)
        self._seeds = np.random.default_rng(seed)
        self._knobs = no_knobs(slots)
        self._device_knobs: Knobs | None = None
        self._state = Slots(*(np.zeros(slots, kind) for kind in (np.int32, np.int32, np.int32, np.bool_, np.int32)))
        self._roots: dict[Trie, int] = {}
        self.add_tries(())
        self._running: list[Sample | None] = [None] * slots
        self._waiting: deque[Sample] = deque()
        self._submitted = 0
        self._params, self.version = place_params(self.model, params), version
        self._buffers = Buffers(self.model, self._params, slots, max_length)

    def set_params(self, params: Params, version: int) -> None:
        """Sample with other weights from the next call on. Samples under way go on with the keys they have."""
        self._params, self.version = place_params(self.model, params), version
        self._buffers.held = [None] * self.slots

    def add_tries(self, tries: Sequence[Trie]) -> None:
        """Make tries known, as a request's is when it comes. Compiles again where they outgrow a power of two."""
        known = [*self._roots, *(trie for trie in tries if trie not in self._roots)]
        joined, roots = join_tries(known)
        self._roots = dict(zip(known, roots, strict=True))
        self._tries = jax.device_put(joined)

    def generate(
        self, requests: Sequence[Request], between: Callable[[], None] | None = None
    ) -> list[list[Completion]]:
        """The samples of every request, in the order of the requests; `between` as in `stream`. Raises ValueError for
        a request that cannot be served."""
        done: list[list[Completion | None]] = [[None] * request.params.n for request in requests]
        for chunk in self.stream(requests, between):
            if chunk.completion is not None:
                done[chunk.request][chunk.sample] = chunk.completion
        return [[each for each in samples if each is not None] for samples in done]

    def stream(self, requests: Sequence[Request], between: Callable[[], None] | None = None) -> Iterator[Chunk]:
        """What `generate` returns, piece by piece, as it comes. All requests are checked before the first piece.

        `between` is called before every device call, and may set other parameters. To leave early, as with `break`,
        cancels what is not done.
        """
        self.check(requests)
        numbers: dict[int, int] = {}

        def source(idle: bool) -> bool:
            if not numbers:
                numbers.update((self.submit(request), index) for index, request in enumerate(requests))
            if between is not None and self.busy:
                between()
            return False

        with closing(self.run(source)) as chunks:
            for chunk in chunks:
                yield chunk._replace(request=numbers[chunk.request])

    def run(self, source: Callable[[bool], bool]) -> Generator[Chunk]:
        """The loop that drives the engine, whoever uses it: ask `source`, run a device call, yield its chunks.

        `source(idle)` is called before every device call. It may `submit` and `cancel` requests and `set_params`, and
        returns whether more may come; without that, the loop ends once the engine is `idle`. An idle engine may be
        kept waiting. Nobody else may use the engine meanwhile. To leave early cancels all that is under way.
        """
        try:
            while source(not self.busy) or self.busy:
                yield from self.step()
        finally:
            self._waiting.clear()
            self.cancel({sample.number for sample in self._running if sample is not None})

    def check(self, requests: Sequence[Request]) -> None:
        """Raise ValueError for one that can never be served."""
        for index, request in enumerate(requests):
            check_request(
                request,
                vocab_size=self.model.config.vocab_size,
                max_length=self.max_length,
                support=self.support,
                alternatives=self.alternatives,
                has_tokenizer=self.tokenizer is not None,
                name=f"request {index}",
            )

    def submit(self, request: Request) -> int:
        """Queue a request; its chunks come out of `step` under the number returned."""
        self.check([request])
        number, self._submitted = self._submitted, self._submitted + 1
        params = request.params
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        prompt = tuple(int(token) for token in request.prompt_ids)
        now = time.perf_counter()
        if params.trie is not None and params.trie not in self._roots:
            self.add_tries([params.trie])
        self._waiting.extend(
            Sample(number, index, request, seed, now, self.tokenizer, prompt) for index in range(params.n)
        )
        return number

    def cancel(self, numbers: Collection[int]) -> None:
        """Forget requests, by the numbers of `submit`: their slots are free, and nothing more comes of them."""
        self._waiting = deque(sample for sample in self._waiting if sample.number not in numbers)
        for slot, sample in enumerate(self._running):
            if sample is not None and sample.number in numbers:
                self._running[slot] = None
                self._state.live[slot] = False

    @property
    def rows(self) -> int:
        """Slots that a device call decodes: all, or a part where few samples are left and none waits."""
        return self._buffers.rows

    @property
    def busy(self) -> bool:
        """Whether anything is under way or waits."""
        return bool(self._waiting) or any(self._running)

    def step(self) -> list[Chunk]:
        """Fill free slots, run one device call, and return what it made.

        An exception in the host's work for one sample (its knobs, its text) makes that sample a failed completion.
        What the device raises, and memory that runs out, concern everybody and are raised.
        """
        admitted, failed = self._admit()
        live = self._state.live
        if not live.any():
            return failed
        steps = min(self.steps, int(self._state.left[live].max()))
        # Those that are left when nothing waits are most often the long ones. After an admission there may be another.
        if not admitted and not self._waiting and live.sum() <= self._buffers.few < self._buffers.rows:
            self._gather()
        self._buffers.fit(int(self._state.position[live].max()) + steps)
        # With samples waiting, a call ends once a share of the slots is free; else it goes on to its end.
        quorum = max(1, int(live.sum()) - self.slots // 8) if self._waiting else 1
        return failed + self._collect(jax.device_get(self._decode(steps, quorum)))

    def warm_up(self) -> None:
        """Compile every program for every bucket now. Requires that nothing is under way."""
        assert not self.busy
        buffers = self._buffers
        buffers.fit(0, self.slots)
        for columns in buffers.lengths:
            buffers.fit(columns)
            buffers.move([], [])
            for length in buffers.prompt_lengths:
                for rows in self._prefill_rows(length):
                    self._prefill([], length, rows)
            self._decode(0, 1)
            if buffers.few < self.slots:
                buffers.fit(columns, buffers.few)
                self._decode(0, 1)
                buffers.fit(columns, self.slots)
        for rows in (buffers.few, self.slots):
            for length in (self.max_length, 0, self.max_length):
                buffers.fit(length, rows)
        buffers.fit(0)
        buffers.mark(np.zeros(self.model.config.vocab_size, MARK), 0)

    def _decode(self, steps: int, quorum: int) -> Generated:
        buffers = self._buffers
        if self._device_knobs is None or len(self._device_knobs.seed) != buffers.rows:
            self._device_knobs = jax.device_put(jax.tree.map(lambda knob: knob[: buffers.rows], self._knobs))
        buffers.cache, buffers.marks, made = programs.decode(
            self.model,
            self.steps,
            self.support,
            self.alternatives,
            self._params,
            buffers.cache,
            buffers.marks,
            self._device_knobs,
            self._tries,
            jax.tree.map(lambda each: each[: buffers.rows], self._state),
            np.int32(steps),
            np.int32(quorum),
        )
        return made

    def _admit(self) -> tuple[bool, list[Chunk]]:
        """Give free slots to waiting samples, each with the keys and values of its prompt but for the last token.

        Returns whether there were any, and the chunks of those that cannot be admitted.
        """
        free = [slot for slot, sample in enumerate(self._running) if sample is None]
        # Slots that hold a prompt which is asked for again are used up last.
        admitted: list[tuple[int, Sample, SlotValues]] = []
        failed: list[Chunk] = []
        while self._waiting and len(admitted) < len(free):
            sample = self._waiting.popleft()
            try:
                values = sample.slot_values(self.model.config.vocab_size)
            except MemoryError:
                raise
            except Exception as error:  # whatever it is, it came of this sample alone
                failed.append(self._failed(sample, error))
            else:
                admitted.append((free[len(admitted)], sample, values))
        if not admitted:
            return False, failed
        buffers = self._buffers
        longest = max(len(sample.prompt) for _, sample, _ in admitted)
        live = self._state.live
        buffers.fit(max(longest, int(self._state.position[live].max(initial=0)) + 1), self.slots)

        taken = {slot for slot, _, _ in admitted}
        holders = {held: slot for slot, held in enumerate(buffers.held) if held is not None and slot not in taken}
        forks: list[tuple[int, int]] = []
        fresh: dict[tuple[int, ...], list[int]] = {}
        for slot, sample, values in admitted:
            cached = sample.prompt[:-1]
            if cached in holders:
                forks.append((holders[cached], slot))
            elif cached:
                fresh.setdefault(cached, []).append(slot)
            self._occupy(slot, sample, values)
            buffers.held[slot] = cached or None
        if forks:
            buffers.fork(*zip(*forks, strict=True))
        self._prefill_all(fresh)
        return True, failed

    def _gather(self) -> None:
        """Bring the few samples under way together in the first rows, and let go of the others."""
        few = self._buffers.few
        free = [slot for slot in range(few) if self._running[slot] is None]
        moves = [(slot, free.pop(0)) for slot in range(few, self.slots) if self._running[slot] is not None]
        if moves:
            self._buffers.move(*zip(*moves, strict=True))
        for source, slot in moves:
            self._running[slot], self._running[source] = self._running[source], None
            for column in (*self._state, *self._knobs):
                column[slot] = column[source]
            self._state.live[source] = False
        self._device_knobs = None
        self._buffers.fit(self._buffers.columns, few)

    def _prefill_all(self, fresh: dict[tuple[int, ...], list[int]]) -> None:
        by_length: dict[int, list[tuple[tuple[int, ...], list[int]]]] = {}
        for prompt, slots in fresh.items():
            by_length.setdefault(self._buffers.prompt_length_for(len(prompt)), []).append((prompt, slots))
        for length, group in by_length.items():
            sizes = self._prefill_rows(length)
            while group:
                # The largest of which more than half is made use of.
                rows = max(size for size in sizes if size == sizes[0] or 2 * len(group) > size)
                self._prefill(group[:rows], length, rows)
                group = group[rows:]

    def _prefill_rows(self, length: int) -> tuple[int, ...]:
        """The sizes of a prefill of prompts of this length: each four times the one before."""
        most = max(min(self.slots, _PREFILL_TOKENS // length) // self._shares, 1)
        few = [4**power for power in range(most.bit_length()) if 4**power < most]
        return tuple(size * self._shares for size in (*few, most))

    def _prefill(self, prompts: list[tuple[tuple[int, ...], list[int]]], length: int, rows: int) -> None:
        """Compute prompts once and put each into its slots."""
        tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
        places: list[tuple[int, int, int]] = []
        for row, (prompt, slots) in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            places += [(row, slot, len(prompt)) for slot in slots]
        fresh = programs.prefill(self.model, self._params, tokens, lengths)
        self._buffers.insert(fresh, *(zip(*places, strict=True) if places else ((), (), ())))

    def _occupy(self, slot: int, sample: Sample, values: SlotValues) -> None:
        params, self._running[slot] = sample.request.params, sample
        self._state.token[slot] = sample.prompt[-1]
        self._state.position[slot] = len(sample.prompt) - 1
        room = self.max_length - len(sample.prompt)
        self._state.left[slot] = room if params.max_tokens is None else params.max_tokens
        self._state.live[slot] = True
        self._state.node[slot] = 0 if params.trie is None else self._roots[params.trie]
        for knob, value in zip(self._knobs, values.knobs, strict=True):
            knob[slot] = value[0]
        if values.marks is not None:
            self._buffers.mark(values.marks, slot)
        self._device_knobs = None
        sample.admitted = time.perf_counter()

    def _collect(self, made: Generated) -> list[Chunk]:
        """Hand the tokens of a call to their samples; take finished ones from their slots."""
        chunks = []
        now = time.perf_counter()
        for slot, sample in enumerate(self._running):
            if sample is None:
                continue
            count, state = int(made.count[slot]), int(made.state[slot])
            if count:
                self._state.token[slot] = made.tokens[slot, count - 1]
            self._state.position[slot] += count
            self._state.left[slot] -= count
            self._state.node[slot] = made.node[slot]
            if self._windowed:
                self._buffers.held[slot] = None  # a ring forgets the beginning of what it holds
            values = tuple(column[slot, :count].copy() for column in made[:6])
            try:
                chunk = sample.advance(values, _REASONS.get(state), state == STOPPED, self.version, now)
            except MemoryError:
                raise
            except Exception as error:  # of the tokenizer, most likely: it costs the sample whose text it is
                chunk = self._failed(sample, error)
            chunks.append(chunk)
            self._state.live[slot] = chunk.completion is None
            if chunk.completion is not None:
                self._running[slot] = None
        return chunks

    def _failed(self, sample: Sample, error: Exception) -> Chunk:
        log.error("sample %d of request %d failed", sample.index, sample.number, exc_info=error)
        return sample.fail(f"{type(error).__name__}: {error}", time.perf_counter())
