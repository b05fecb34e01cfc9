"""The engine: fixed slots, continuous batching, a few compiled programs. See `Engine`."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import numpy as np

from jaxtrain.nn.model import Model
from jaxtrain.parallel.sharding import context_shards, row_shares
from jaxtrain.sample import decode as programs
from jaxtrain.sample.buffers import Buffers, bucket_for, padded_prompts, prefill_groups, prefill_rows
from jaxtrain.sample.capacity import MARK, place_params
from jaxtrain.sample.constraints import Trie, join_tries
from jaxtrain.sample.decode import ENDED, FULL, NON_FINITE, STOPPED, Generated, SlotState
from jaxtrain.sample.filters import SlotSettings
from jaxtrain.sample.prompt_scores import PromptScores, score_prompt
from jaxtrain.sample.requests import Chunk, Completion, EngineLimits, FinishReason, Request, check_request
from jaxtrain.sample.samples import Sample, default_settings
from jaxtrain.sample.usage import EngineUsage
from jaxtrain.sample.waiting import Waiting
from jaxtrain.types import Params

log = logging.getLogger(__name__)

_REASONS: dict[int, FinishReason] = {STOPPED: "stop", ENDED: "stop", FULL: "length", NON_FINITE: "failed"}


class Engine:
    """Generates for many requests at once, with the trainer's forward pass.

        engine = Engine(model, params, slots=32, max_length=1024, tokenizer=tokenizer)
        [[completion, ...], ...] = engine.generate([Request(ids, SamplingParams(max_tokens=64, n=8)), ...])

    `slots` samples are generated together; the slot of a finished sample is given to the next waiting one. Sampling
    parameters never cause a compilation: a program is compiled once per bucket of prompt and cache lengths (`warm_up`
    compiles all of them in advance). The result of a seed depends neither on other requests nor on the slot.
    `set_params(params, version)` replaces the weights between calls, also while requests are in flight.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        max_length: int,
        slots: int,
        tokenizer: Any = None,
        limits: EngineLimits = EngineLimits(),  # noqa: B008 - immutable
        version: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            model: Its compute dtype is the cache's. On its mesh, slots are split over data x fsdp, heads over tensor.
            params: The trainer's tree (stacked layers). The engine keeps a copy in the compute dtype.
            max_length: Maximum number of prompt and new tokens of a sample.
            slots: Number of samples generated together; a multiple of mesh.data x mesh.fsdp.
            tokenizer: Decodes `Completion.text`, which is None without a tokenizer.
            limits: With `limits.support` and filters (top-k, top-p, min-p), the ids that they keep are returned as
                `Completion.supports`, at most this many, the most probable ones; a larger `top_k` is refused.
            version: Version of `params`; every token is tagged with the version that sampled it.
            seed: Seeds the requests that have no seed.
        """
        if context_shards(model.run.mesh) > 1:
            raise ValueError(
                f"mesh.context={context_shards(model.run.mesh)} splits the tokens of rows, and an engine keeps whole "
                "samples: sample on a mesh with mesh.context=1"
            )
        shares = row_shares(model.run.mesh)
        if slots < 1 or slots % shares:
            raise ValueError(f"slots={slots} must be a multiple of mesh.data x mesh.fsdp = {shares}")
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2: one prompt token and one new token")
        self.model = replace(model, run=replace(model.run, rope_length=max_length))
        self._programs = programs.with_options(model.run.compiler_options)  # prefill and decode
        self.slots, self.max_length = slots, max_length
        self.tokenizer, vocab_size = tokenizer, model.config.vocab_size
        support, alternatives = min(limits.support, vocab_size), min(limits.alternatives, vocab_size)
        self.limits = EngineLimits(limits.steps, support, alternatives)
        self._shares = shares
        # Rings of windows and recurrent states overwrite what was kept of the prompt.
        self._overwrites = any(kind.window is not None or kind.mixer == "delta" for kind in model.config.pattern)
        self._seeds = np.random.default_rng(seed)
        self._settings = default_settings(slots)
        self._device_settings: SlotSettings | None = None
        self._state = SlotState(*np.zeros((5, slots), np.int32))._replace(live=np.zeros(slots, np.bool_))
        self._roots: dict[Trie, int] = {}
        self.add_tries(())
        self._running: list[Sample | None] = [None] * slots
        self._waiting, self._submitted, self._runs = Waiting(), 0, False
        self._params: Params | None = place_params(self.model, params)
        self.version = version
        self._buffers = Buffers(self.model, self._params, slots, max_length)
        self._usage = EngineUsage(self.model, slots)

    def set_params(self, params: Params, version: int) -> None:
        """Use these weights from the next device call on. Requests in flight keep their cached keys and values."""
        released = self._params is None
        self._params, self.version = place_params(self.model, params), version
        if released:
            self._buffers = Buffers(self.model, self._params, self.slots, self.max_length)
        self._buffers.cached_prompts = [None] * self.slots

    def release(self) -> None:
        """Free the weights and the cache. `set_params` makes the engine usable again. It must be idle."""
        assert not self.busy
        self._params = None
        self._buffers.free()

    def add_tries(self, tries: Sequence[Trie]) -> None:
        """Register tries before the requests that use them. Recompiles when their size exceeds a power of two."""
        known = [*self._roots, *(trie for trie in tries if trie not in self._roots)]
        joined, roots = join_tries(known)
        self._roots = dict(zip(known, roots, strict=True))
        self._tries = jax.device_put(joined)

    def generate(
        self, requests: Sequence[Request], between: Callable[[], None] | None = None
    ) -> list[list[Completion]]:
        """The samples of each request; `between` is that of `stream`. Raises ValueError for an invalid request."""
        done: list[list[Completion | None]] = [[None] * request.params.n for request in requests]
        for chunk in self.stream(requests, between):
            if chunk.completion is not None:
                done[chunk.request][chunk.sample] = chunk.completion
        return [[each for each in samples if each is not None] for samples in done]

    def stream(self, requests: Sequence[Request], between: Callable[[], None] | None = None) -> Iterator[Chunk]:
        """Yield the chunks of all requests as they are generated. All requests are checked first.

        `between` is called before every device call and may call `set_params`. Leaving the loop early cancels the
        unfinished requests.
        """
        self.check(requests)
        numbers: dict[int, int] = {}

        def source(idle: bool) -> bool:
            if not numbers:
                numbers.update((self._queue(request), index) for index, request in enumerate(requests))
            if between is not None and self.busy:
                between()
            return False

        with closing(self.run(source)) as chunks:
            for chunk in chunks:
                yield chunk._replace(request=numbers[chunk.request])

    def run(self, source: Callable[[bool], bool]) -> Generator[Chunk]:
        """The loop that all uses of the engine run: call `source`, run a device call, yield its chunks.

        `source(idle)` is called before every device call. It may call `submit`, `cancel` and `set_params`, and may
        block if the engine is idle. It returns whether more requests may come; if not, the loop ends once the engine
        is idle. Leaving the loop early cancels all requests. Raises RuntimeError if another loop has not ended.
        """
        if self._runs:
            raise RuntimeError("the engine runs other requests: give these to its AsyncEngine, or end that loop first")
        self._runs = True
        try:
            while source(not self.busy) or self.busy:
                yield from self.step()
        finally:
            self._runs = False
            self._waiting.clear()
            self.cancel({sample.number for sample in self._running if sample is not None})

    def check(self, requests: Sequence[Request]) -> None:
        """Raise ValueError for a request that this engine cannot serve."""
        for index, request in enumerate(requests):
            check_request(
                request,
                vocab_size=self.model.config.vocab_size,
                max_length=self.max_length,
                limits=self.limits,
                has_tokenizer=self.tokenizer is not None,
                name=f"request {index}",
            )

    def submit(self, request: Request) -> int:
        """Queue a request and return its number, which is that of its chunks. Raises ValueError for an invalid one."""
        self.check([request])
        return self._queue(request)

    def _queue(self, request: Request) -> int:  # one that was checked
        number, self._submitted = self._submitted, self._submitted + 1
        params = request.params
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        prompt = tuple(int(token) for token in request.prompt_ids)
        now = time.perf_counter()
        if params.trie is not None and params.trie not in self._roots:
            self.add_tries([params.trie])
        self._waiting.add(
            Sample(number, index, request, seed, now, self.tokenizer, prompt) for index in range(params.n)
        )
        return number

    def cancel(self, numbers: Collection[int]) -> None:
        """Cancel requests, given by the numbers of `submit`: their slots become free and they yield no more chunks."""
        self._waiting.cancel(numbers)
        for slot, sample in enumerate(self._running):
            if sample is not None and sample.number in numbers:
                self._running[slot] = None
                self._state.live[slot] = False

    def score_prompt(self, prompt_ids: Sequence[int] | np.ndarray, alternatives: int = 0) -> PromptScores:
        """The log-probabilities of a prompt's tokens. Uses no slot; raises ValueError for an invalid prompt."""
        self.check([Request(prompt_ids)])
        prompt = np.asarray(prompt_ids, np.int32)
        size = self._shares, bucket_for(self._buffers.prompt_lengths, len(prompt))
        assert self._params is not None, "the engine was released"
        return score_prompt(self.model, self._params, prompt, size, min(alternatives, self.model.config.vocab_size))

    def share_slots(self) -> None:
        """From now on, give a free slot to the request with the fewest running samples instead of the first one."""
        self._waiting.fair = True

    @property
    def rows(self) -> int:
        """Number of slots that a device call decodes: fewer than all when few are live and no sample is waiting."""
        return self._buffers.rows

    def usage(self) -> dict[str, float]:
        """Slots and memory in use since the last call; see `EngineUsage.read`."""
        return self._usage.read(self._params)

    @property
    def busy(self) -> bool:
        """Whether any sample is running or waiting."""
        return bool(self._waiting) or any(self._running)

    def step(self) -> list[Chunk]:
        """Fill free slots, run one device call, and return its chunks.

        An exception in the host's work for one sample (its settings, its text) makes that sample a failed completion.
        Exceptions of the device and MemoryError affect all samples and are raised.
        """
        admitted, failed = self._admit()
        live = self._state.live
        if not live.any():
            return failed
        steps = min(self.limits.steps, int(self._state.remaining[live].max()))
        if any(sample is not None and sample.matcher is not None for sample in self._running):
            steps = 1  # the next tokens depend on this one
        # The last running samples are usually long ones. After an admission there may be another.
        if not admitted and not self._waiting and live.sum() <= self._buffers.small_rows < self._buffers.rows:
            self._compact()
        self._buffers.fit(int(self._state.position[live].max()) + steps)
        self._usage.count(int(live.sum()), self._buffers.rows, self._buffers.columns)
        # With samples waiting, a call ends early once an eighth of the slots has become free.
        quorum = max(1, int(live.sum()) - self.slots // 8) if self._waiting else 1
        return failed + self._collect(jax.device_get(self._decode(steps, quorum)))

    def warm_up(self) -> None:
        """Compile every program for every bucket now. The engine must be idle."""
        assert not self.busy
        buffers = self._buffers
        buffers.fit(0, self.slots)
        for columns in buffers.lengths:
            buffers.fit(columns)
            buffers.move([], [])
            for length in buffers.prompt_lengths:
                for rows in prefill_rows(self.slots, self._shares, length):
                    self._prefill([], length, rows)
            self._decode(0, 1)
            if buffers.small_rows < self.slots:
                buffers.fit(columns, buffers.small_rows)
                self._decode(0, 1)
                buffers.fit(columns, self.slots)
        for rows in (buffers.small_rows, self.slots):
            for length in (self.max_length, 0, self.max_length):
                buffers.fit(length, rows)
        buffers.fit(0)
        buffers.mark(np.zeros(self.model.config.vocab_size, MARK), 0)

    def _decode(self, steps: int, quorum: int) -> Generated:
        buffers, first_rows = self._buffers, itemgetter(slice(self._buffers.rows))
        if self._device_settings is None or len(self._device_settings.seed) != buffers.rows:
            self._device_settings = jax.device_put(jax.tree.map(first_rows, self._settings))
        (buffers.cache, buffers.marks), generated = self._programs[1](
            self.model,
            self.limits,
            self._params,
            (buffers.cache, buffers.marks),
            self._device_settings,
            self._tries,
            jax.tree.map(first_rows, self._state),
            (np.int32(steps), np.int32(quorum)),
        )
        return generated

    def _admit(self) -> tuple[bool, list[Chunk]]:
        """Give free slots to waiting samples, with the keys and values of their prompts except the last token.

        Returns whether any sample was admitted, and the chunks of those that failed.
        """
        free = [slot for slot, sample in enumerate(self._running) if sample is None]
        admitted: list[tuple[int, Sample, np.ndarray | None]] = []
        failed: list[Chunk] = []
        running = Counter(sample.number for sample in self._running if sample is not None)
        while self._waiting and len(admitted) < len(free):
            sample, slot = self._waiting.pop(running), free[len(admitted)]
            try:
                sample.write_settings(self._settings, slot)
                marks = sample.marks(self.model.config.vocab_size) if sample.marked else None
            except MemoryError:
                raise
            except Exception as error:  # caused by this sample's parameters, so it fails alone
                failed.append(self._failed(sample, error))
            else:
                admitted.append((slot, sample, marks))
                running[sample.number] += 1
        if not admitted:
            return False, failed
        buffers = self._buffers
        longest = max(len(sample.prompt) for _, sample, _ in admitted)
        live = self._state.live
        buffers.fit(max(longest, int(self._state.position[live].max(initial=0)) + 1), self.slots)

        forks, fresh = buffers.assign({slot: sample.prompt[:-1] for slot, sample, _ in admitted})
        for slot, sample, marks in admitted:
            self._occupy(slot, sample, marks)
        if forks:
            buffers.fork(*zip(*forks, strict=True))
        for group, length, rows in prefill_groups(fresh, buffers.prompt_lengths, self.slots, self._shares):
            self._prefill(group, length, rows)
        return True, failed

    def _compact(self) -> None:
        """Move the few running samples to the first rows, and shrink the buffers to these."""
        few = self._buffers.small_rows
        free = [slot for slot in range(few) if self._running[slot] is None]
        moves = [(slot, free.pop(0)) for slot in range(few, self.slots) if self._running[slot] is not None]
        if moves:
            self._buffers.move(*zip(*moves, strict=True))
        for source, slot in moves:
            self._running[slot], self._running[source] = self._running[source], None
            for column in (*self._state, *self._settings):
                column[slot] = column[source]
            self._state.live[source] = False
        self._device_settings = None
        self._buffers.fit(self._buffers.columns, few)

    def _prefill(self, prompts: list[tuple[tuple[int, ...], list[int]]], length: int, rows: int) -> None:
        """Compute the keys and values of each prompt once and copy them to its slots."""
        tokens, lengths, places = padded_prompts(prompts, length, rows)
        fresh = self._programs[0](self.model, self._params, tokens, lengths)
        self._buffers.insert(fresh, *(zip(*places, strict=True) if places else ((), (), ())))

    def _occupy(self, slot: int, sample: Sample, marks: np.ndarray | None) -> None:
        params, self._running[slot] = sample.request.params, sample
        self._state.token[slot] = sample.prompt[-1]
        self._state.position[slot] = len(sample.prompt) - 1
        self._state.remaining[slot] = params.max_tokens or self.max_length - len(sample.prompt)
        self._state.live[slot] = True
        self._state.node[slot] = 0 if params.trie is None else self._roots[params.trie]
        if marks is not None:
            self._buffers.mark(marks, slot)
        self._device_settings = None
        sample.admitted = time.perf_counter()

    def _collect(self, generated: Generated) -> list[Chunk]:
        """Append the tokens of a call to their samples, and free the slots of finished ones."""
        chunks = []
        now = time.perf_counter()
        for slot, sample in enumerate(self._running):
            if sample is None:
                continue
            values, status = generated.values_of(slot), int(generated.status[slot])
            if count := len(values.tokens):
                self._state.token[slot] = values.tokens[-1]
            self._state.position[slot] += count
            self._state.remaining[slot] -= count
            self._state.node[slot] = generated.node[slot]
            if self._overwrites:
                self._buffers.cached_prompts[slot] = None
            marks = None
            try:
                chunk = sample.advance(values, _REASONS.get(status), status == STOPPED, self.version, now)
                if chunk.completion is None and sample.matcher is not None:
                    marks = sample.marks(self.model.config.vocab_size)
            except MemoryError:
                raise
            except Exception as error:  # most likely of the tokenizer: only this sample fails
                chunk = self._failed(sample, error)
            chunks.append(chunk)
            self._state.live[slot] = chunk.completion is None
            if chunk.completion is not None:
                self._running[slot] = None
            elif marks is not None:
                self._buffers.mark(marks, slot)
        return chunks

    def _failed(self, sample: Sample, error: Exception) -> Chunk:
        log.error("sample %d of request %d failed", sample.index, sample.number, exc_info=error)
        return sample.fail(f"{type(error).__name__}: {error}", time.perf_counter())
