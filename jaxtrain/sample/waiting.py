"""The samples that wait for a slot of the engine."""

from collections import Counter, deque
from collections.abc import Collection, Iterable

from jaxtrain.sample.samples import Sample


class Waiting:
    """Waiting samples, by request in order of arrival.

    If `fair`, a free slot is given to the request with the fewest running samples; of several to the first. Otherwise
    all samples of the first request come first, so that they share the computation of their prompt.
    """

    def __init__(self) -> None:
        self.fair = False
        self._samples: dict[int, deque[Sample]] = {}  # by the number of the request

    def __bool__(self) -> bool:
        return bool(self._samples)

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._samples.setdefault(sample.number, deque()).append(sample)

    def pop(self, running: Counter[int]) -> Sample:
        """Remove and return the next sample; `running` samples of each request have a slot."""
        number = min(self._samples, key=running.__getitem__) if self.fair else next(iter(self._samples))
        samples = self._samples[number]
        sample = samples.popleft()
        if not samples:
            del self._samples[number]
        return sample

    def cancel(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self._samples.pop(number, None)

    def clear(self) -> None:
        self._samples.clear()
