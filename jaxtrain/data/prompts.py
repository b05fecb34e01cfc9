"""Prompts in the order of their mixture, one at a time: what reinforcement learning asks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.fingerprints import check_unchanged, fingerprints
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.sources import DataError, Row, Source

T = TypeVar("T")


class PromptStream(Generic[T]):
    """Numbers and rows go to `make`, which answers with the prompt. All hosts that ask get the same ones.

    The number counts the prompts handed out from the run's beginning, all epochs included.
    """

    def __init__(
        self, sources: Sequence[SourceSection], data: DataSection, make: Callable[[int, Row], T], *, seed: int
    ):
        """Makes the first prompt of every source, so that wrong data are an error now. Raises DataError."""
        self._sources = [Source(section, keep_columns=True) for section in sources]
        self._fingerprints = fingerprints(self._sources)
        self._mixture = Mixture(self._sources, seed=seed, shuffle=data.shuffle, shard=0, num_shards=1)
        self._make, self._skip_bad = make, data.on_bad_row == "skip"
        self._counts, self._number, self._bad = self._mixture.start, 0, 0
        for source in self._sources if not self._skip_bad else []:
            self._read(source, 0, 0)

    def take(self, count: int) -> list[T]:
        """The next `count` prompts; fewer where the sources have run dry. Raises DataError for a bad row."""
        taken: list[T] = []
        fruitless = 0
        while len(taken) < count and (draw := self._mixture.draw(self._counts)) is not None:
            self._counts = draw.counts
            prompt = self._read(self._sources[draw.source], draw.row, self._number)
            if prompt is None:
                self._bad += 1
                fruitless += 1
                if fruitless > self._mixture.total_rows:
                    raise DataError(
                        f"no row gives a prompt ({self._bad} bad rows): look at data.on_bad_row and data.max_length"
                    )
                continue
            fruitless, self._number = 0, self._number + 1
            taken.append(prompt)
        return taken

    def _read(self, source: Source, row: int, number: int) -> T | None:
        try:
            try:
                return self._make(number, source[row])
            except DataError:
                raise
            except ValueError as error:
                raise DataError(f"{source.place(row)}: {error}") from error
        except DataError as error:
            if not self._skip_bad:
                raise
            if not self._bad:
                warnings.warn(f"skipped a bad row, more are only counted: {error}", stacklevel=2)
            return None

    def get_state(self) -> dict[str, Any]:
        """JSON-able: what `set_state` needs to go on after the last prompt handed out."""
        counts = {"counts": list(self._counts), "number": self._number, "bad_rows": self._bad}
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
        self._counts, self._number, self._bad = tuple(saved["counts"]), saved["number"], saved["bad_rows"]
