"""Prompts in the order of their mixture: what reinforcement learning asks the model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.fingerprints import check_unchanged, fingerprints
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.sources import DataError, Row, Source

T = TypeVar("T")


class PromptStream(Generic[T]):
    """Passes a number and a row to `make`, which returns the prompt. All hosts draw the same prompts.

    The number counts the prompts drawn since the run began, over all epochs.
    """

    def __init__(
        self, sources: Sequence[SourceSection], data: DataSection, make: Callable[[int, Row], T], *, seed: int
    ):
        """Makes the first prompt of every source, so that unusable data are an error at the start. Raises DataError."""
        self._sources = [Source(section, keep_columns=True) for section in sources]
        self._fingerprints = fingerprints(self._sources)
        self._mixture = Mixture(self._sources, seed=seed, shuffle=data.shuffle, shard=0, num_shards=1)
        self._reader = _RowReader(make, skip_bad=data.on_bad_row == "skip")
        self._counts, self._number, self._exhausted = self._mixture.start, 0, False
        for source in self._sources if not self._reader.skip_bad else []:
            self._reader.read(source, 0, 0)

    @property
    def exhausted(self) -> bool:
        """A call of `draw` found every source at the end of its `epochs`."""
        return self._exhausted

    @property
    def drawn(self) -> int:
        """Prompts drawn since the run began."""
        return self._number

    def draw(self, count: int) -> list[T]:
        """The next `count` prompts; fewer where the sources are exhausted. Raises DataError for a bad row."""
        prompts: list[T] = []
        bad_in_a_row = 0
        while len(prompts) < count:
            draw = self._mixture.draw(self._counts)
            if draw is None:
                self._exhausted = True
                break
            self._counts = draw.counts
            prompt = self._reader.read(self._sources[draw.source], draw.row, self._number)
            if prompt is None:
                bad_in_a_row += 1
                if bad_in_a_row > self._mixture.total_rows:
                    raise DataError(f"no row gives a prompt ({self._reader.bad_rows} bad rows): {self._reader.example}")
                continue
            bad_in_a_row, self._number = 0, self._number + 1
            prompts.append(prompt)
        if self._exhausted and self._number == 0:
            raise DataError(f"no row gives a prompt ({self._reader.bad_rows} bad rows): {self._reader.example}")
        return prompts

    def get_state(self) -> dict[str, Any]:
        """JSON-able: what `set_state` needs to continue after the last prompt drawn."""
        counts = {"counts": list(self._counts), "number": self._number, "bad_rows": self._reader.bad_rows}
        return {"prompts": {**counts, "sources": self._fingerprints}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another number of sources, DataError where a file is not what it was."""
        saved = state["prompts"]
        if len(saved["counts"]) != len(self._sources):
            raise ValueError(
                f"the saved data state has {len(saved['counts'])} sources and data.train has {len(self._sources)}: "
                "resume with the sources it was saved with"
            )
        if "sources" in saved:
            check_unchanged(saved["sources"], self._fingerprints)
        self._counts, self._number = tuple(saved["counts"]), saved["number"]
        self._reader.bad_rows = saved["bad_rows"]


def held_out_prompts(
    sources: Sequence[SourceSection], data: DataSection, make: Callable[[int, Row], T], *, count: int
) -> list[T]:
    """The first `count` prompts of `sources`, in order; `data.on_bad_row` applies. Raises DataError as `draw` does."""
    reader = _RowReader(make, skip_bad=data.on_bad_row == "skip")
    return list(itertools.islice(_in_order(sources, reader), count))


def _in_order(sources: Sequence[SourceSection], reader: _RowReader[T]) -> Iterator[T]:
    number = 0
    for source in [Source(section, keep_columns=True) for section in sources]:
        for row in range(len(source)):
            prompt = reader.read(source, row, number)
            if prompt is not None:
                number += 1
                yield prompt


class _RowReader(Generic[T]):
    """Makes prompts of rows; a bad row is a DataError that names its place, or skipped and counted."""

    def __init__(self, make: Callable[[int, Row], T], *, skip_bad: bool):
        self._make, self.skip_bad = make, skip_bad
        self.bad_rows = 0
        self.example = "the sources are empty"  # what is wrong with the first bad row

    def read(self, source: Source, row: int, number: int) -> T | None:
        """None for a bad row that is skipped."""
        try:
            return source.make(row, partial(self._make, number))
        except DataError as error:
            if not self.skip_bad:
                raise
            if not self.bad_rows:
                self.example = str(error)
                warnings.warn(f"skipped a bad row, more are only counted: {error}", stacklevel=4)
            self.bad_rows += 1
            return None
