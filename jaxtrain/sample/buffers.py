"""`Buffers`: the slots' keys, values and token marks on the device, in a small set of shapes."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtrain.nn.cache import columns_of
from jaxtrain.nn.model import Model
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.sample import decode as programs
from jaxtrain.sample.capacity import MARK, commit_like, empty_buffers
from jaxtrain.types import Params

_MIN_COLUMNS, MIN_PROMPT = 64, 32
_PREFILL_TOKENS = 2048  # rows x length of the largest prefill: short prompts share a call
_SMALL_DIVISOR, _MIN_SPLIT_SLOTS = 4, 8  # from 8 slots on, a second size has a quarter of the rows

PromptIds = tuple[int, ...]


class Buffers:
    """Cache and marks of the slots, resized between buckets: a decode step's cost grows with their rows and columns."""

    def __init__(self, model: Model, params: Params, slots: int, max_length: int):
        self._model, self.slots = model, slots
        shares = row_shares(model.run.mesh)
        self.small_rows = -(-slots // (_SMALL_DIVISOR * shares)) * shares if slots >= _MIN_SPLIT_SLOTS else slots
        """Rows of the smaller of the two sizes, used when few slots are live and no sample is waiting."""
        self.lengths = bucket_lengths(max_length, _MIN_COLUMNS)
        """The bucket sizes of the columns."""
        self.prompt_lengths = bucket_lengths(max_length, MIN_PROMPT)
        """The bucket sizes that a prefill's prompts are padded to."""
        self.rows, self.columns = slots, self.lengths[0]
        self.cache, self.marks = commit_like(model, params, empty_buffers(model, slots, self.columns))
        self.cached_prompts: list[PromptIds | None] = [None] * slots
        """The prompt whose keys and values are in each slot."""

    def free(self) -> None:
        """Free the memory; the buffers are not usable any more."""
        self.cache, self.marks = (), np.zeros((0, 0), MARK)

    def fit(self, tokens: int, rows: int | None = None) -> None:
        """Resize the buffers, layer by layer, to the bucket for `tokens` columns, and to `rows` if given."""
        columns, rows = bucket_for(self.lengths, tokens), self.rows if rows is None else rows
        if rows != self.rows:
            self._resize(rows, self.columns)
            self.marks = programs.resize_marks(self._model, self.marks, rows)
        # One bucket at a time, so that only neighbouring sizes need a compiled program.
        at, wanted = self.lengths.index(self.columns), self.lengths.index(columns)
        while at != wanted:
            at += 1 if wanted > at else -1
            self._resize(rows, self.lengths[at])
        # Prompts that were cut off are no longer cached.
        self.cached_prompts = [
            prompt if row < rows and prompt is not None and len(prompt) <= columns else None
            for row, prompt in enumerate(self.cached_prompts)
        ]

    def _resize(self, rows: int, columns: int) -> None:
        layers, self.cache = list(self.cache), ()
        for index, kind in enumerate(self._model.config.pattern):
            wanted = columns_of(kind, columns)
            if (rows, wanted) != (self.rows, layers[index].columns):
                layers[index] = programs.resize(self._model, layers[index], rows, wanted)
        self.cache, self.rows, self.columns = tuple(layers), rows, columns

    def insert(self, fresh: programs.Layers, rows: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy `rows` of a prefill, `lengths` tokens long, into `slots`."""
        places = (self._padded(each) for each in (rows, slots, lengths))
        self.cache = programs.insert(self._model, self.cache, fresh, *places, np.int32(len(slots)))

    def assign(self, prompts: dict[int, PromptIds]) -> tuple[list[tuple[int, int]], dict[PromptIds, list[int]]]:
        """Give slots to prompts without their last tokens. Returns the pairs of a slot that holds the same prompt and
        the slot to copy it to, and the slots of each prompt that must be computed."""
        holders = {p: slot for slot, p in enumerate(self.cached_prompts) if p is not None and slot not in prompts}
        forks: list[tuple[int, int]] = []
        fresh: dict[PromptIds, list[int]] = {}
        for slot, prompt in prompts.items():
            if prompt in holders:
                forks.append((holders[prompt], slot))
            elif prompt:
                fresh.setdefault(prompt, []).append(slot)
            self.cached_prompts[slot] = prompt or None
        return forks, fresh

    def fork(self, sources: Sequence[int], slots: Sequence[int]) -> None:
        """Copy keys and values from the slots `sources` to `slots`."""
        places = self._padded(sources), self._padded(slots)
        self.cache = programs.fork(self._model, self.cache, *places, np.int32(len(slots)))

    def move(self, sources: Sequence[int], slots: Sequence[int]) -> None:
        """Copy keys, values, marks and the cached prompt from the slots `sources` to `slots`."""
        self.fork(sources, slots)
        places = self._padded(sources), self._padded(slots)
        self.marks = programs.move_marks(self.marks, *places, np.int32(len(slots)))
        for source, slot in zip(sources, slots, strict=True):
            self.cached_prompts[slot] = self.cached_prompts[source]

    def mark(self, row: np.ndarray, slot: int) -> None:
        """Set the marks [V] of a slot."""
        self.marks = programs.mark(self.marks, row, np.int32(slot))

    def _padded(self, values: Sequence[int]) -> np.ndarray:
        return np.pad(np.asarray(values, np.int32), (0, self.slots - len(values)))


def bucket_for(lengths: tuple[int, ...], tokens: int) -> int:
    """The smallest bucket of at least `tokens`, or the largest bucket."""
    return next((length for length in lengths if length >= tokens), lengths[-1])


def bucket_lengths(max_length: int, minimum: int) -> tuple[int, ...]:
    """Powers of two from `minimum` on and the midpoints between them, up to `max_length`."""
    sizes = {max_length}
    for power in range(int(math.log2(minimum)), max_length.bit_length()):
        sizes |= {2**power, 3 * 2 ** (power - 1)}
    return tuple(sorted(size for size in sizes if size <= max_length))


def prefill_rows(slots: int, shares: int, length: int) -> tuple[int, ...]:
    """The row counts of a prefill of prompts of this length: powers of four, and the maximum. `shares`: the number of
    parts that rows are split into."""
    maximum = max(min(slots, _PREFILL_TOKENS // length) // shares, 1)
    smaller = [4**power for power in range(maximum.bit_length()) if 4**power < maximum]
    return tuple(size * shares for size in (*smaller, maximum))


def prefill_groups(
    fresh: dict[PromptIds, list[int]], lengths: tuple[int, ...], slots: int, shares: int
) -> Iterator[tuple[list[tuple[PromptIds, list[int]]], int, int]]:
    """Yield the prompts, with the slots of each, that are prefilled together, their padded length, and the number of
    rows."""
    by_length: dict[int, list[tuple[PromptIds, list[int]]]] = {}
    for prompt, own in fresh.items():
        by_length.setdefault(bucket_for(lengths, len(prompt)), []).append((prompt, own))
    for length, group in by_length.items():
        sizes = prefill_rows(slots, shares, length)
        while group:
            # The largest size that is more than half full.
            rows = max(size for size in sizes if size == sizes[0] or 2 * len(group) > size)
            yield group[:rows], length, rows
            group = group[rows:]


def padded_prompts(
    prompts: Sequence[tuple[PromptIds, list[int]]], length: int, rows: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """Tokens [rows, length] and lengths [rows] of a prefill, and the row, slot and length of each copy of a prompt."""
    tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    places: list[tuple[int, int, int]] = []
    for row, (prompt, slots) in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
        places += [(row, slot, len(prompt)) for slot in slots]
    return tokens, lengths, places
