"""Prompts in the order of their mixture: what reinforcement learning asks the model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.fingerprints import check_unchanged, fingerprints
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.sources import DataError, Row, Source, StreamEndError

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
        self._counts, self._number = self._mixture.start, 0
        self._used: set[int] = set()  # numbers of prompts that were drawn and used before those of the state
        for source in self._sources if not self._reader.skip_bad else []:
            self._reader.read(source, 0, 0)

    @property
    def finite(self) -> bool:
        """Whether the prompts end."""
        return self._mixture.finite

    @property
    def has_streams(self) -> bool:
        """Whether a source is a stream, whose rows cannot be counted in advance."""
        return self._mixture.has_streams

    def check_length(self, steps: int | None) -> None:
        """Raises ValueError where a source is a stream and `train.steps` does not say how long the run is."""
        self._mixture.check_length(steps)

    @property
    def epoch_rows(self) -> float:
        """Rows of an epoch of the mixture (see `Mixture`)."""
        return self._mixture.epoch_rows

    def end_after(self, epochs: float) -> None:
        """End after so many epochs of the mixture, instead of where the sources' own `epochs` end."""
        self._mixture.end_after(epochs)

    def count(self) -> int:
        """The prompts of a finite stream from its beginning. Every row is made, once, if bad ones are skipped."""
        if not self._reader.skip_bad:
            return self._mixture.rows
        good = [[self._reader.is_good(source, row) for row in range(len(source))] for source in self._sources]
        prompts, counts = 0, self._mixture.start
        while (draw := self._mixture.draw(counts)) is not None:
            prompts, counts = prompts + good[draw.source][draw.row], draw.counts
        return prompts

    def epoch(self, state: Mapping[str, Any]) -> float:
        """Epochs of the mixture that were drawn up to a state."""
        return sum(state["prompts"]["counts"]) / self._mixture.epoch_rows

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
                if not self._number:
                    raise self._reader.nothing_found()
                break
            try:
                prompt = self._reader.read(self._sources[draw.source], draw.row, self._number)
            except StreamEndError:
                continue
            self._counts = draw.counts
            if prompt is None:
                bad_in_a_row += 1
                if bad_in_a_row > self._mixture.total_rows:
                    raise self._reader.nothing_found()
                continue
            if self._number in self._used:
                self._used.discard(self._number)
            else:
                prompts.append(prompt)
            bad_in_a_row, self._number = 0, self._number + 1
        return prompts

    def get_state(self) -> dict[str, Any]:
        """JSON-able: what `set_state` needs to continue after the last prompt drawn.

        `used`: numbers of later prompts that are not drawn again. Whoever uses prompts in another order adds to it.
        """
        counts = {"counts": list(self._counts), "number": self._number, "bad_rows": self._reader.bad_rows}
        counts["used"] = sorted(self._used)
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
        self._reader.bad_rows, self._used = saved["bad_rows"], set(saved.get("used", ()))
        for source, count in zip(self._sources, self._counts, strict=True):
            if source.stream is not None:
                source.stream.expect({0: count}, 1, ())


def question_within(encode: RowEncoder, limit: int, row: Row) -> tuple[np.ndarray, Row]:
    """`encode.question` of a row. Raises ValueError for one of more than `limit` tokens too."""
    ids, columns = encode.question(row)
    if not 0 < len(ids) <= limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; data.max_length - rl.max_completion_length leaves room for {limit}"
        )
    return ids, columns


def held_out_prompts(
    sources: Sequence[SourceSection],
    data: DataSection,
    make: Callable[[int, Row], T],
    *,
    count: int,
    keep_columns: bool = True,
) -> list[T]:
    """The first `count` prompts of `sources`, in order; `data.on_bad_row` applies, and `keep_columns` is `Source`'s.

    Raises DataError for a bad row, and where no row gives a prompt.
    """
    reader, prompts = _RowReader(make, skip_bad=data.on_bad_row == "skip"), []
    for source in [Source(section, keep_columns=keep_columns) for section in sources]:
        for row in source.indices():
            if len(prompts) == count:
                return prompts
            try:
                prompt = reader.read(source, row, len(prompts))
            except StreamEndError:
                break
            if prompt is not None:
                prompts.append(prompt)
    if not prompts:
        raise reader.nothing_found()
    return prompts


class _RowReader(Generic[T]):
    """Makes prompts of rows; a bad row is a DataError that names its place, or skipped and counted."""

    def __init__(self, make: Callable[[int, Row], T], *, skip_bad: bool):
        self._make, self.skip_bad = make, skip_bad
        self.bad_rows = 0
        self.example = "the sources are empty"  # what is wrong with the first bad row

    def is_good(self, source: Source, row: int) -> bool:
        """Whether a prompt can be made of a row; counted nowhere."""
        try:
            source.make(row, partial(self._make, 0))
        except DataError:
            return False
        return True

    def read(self, source: Source, row: int, number: int) -> T | None:
        """None for a bad row that is skipped."""
        try:
            return source.make(row, partial(self._make, number))
        except DataError as error:
            if not self.skip_bad:
                raise
            if not self.bad_rows:
                self.example = str(error)
                warnings.warn(f"skipped a bad row; further ones are counted but not reported: {error}", stacklevel=4)
            self.bad_rows += 1
            return None

    def nothing_found(self) -> DataError:
        return DataError(f"no row gives a prompt ({self.bad_rows} bad rows): {self.example}")
