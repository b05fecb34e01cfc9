"""Files of samples with pending updates, from which another number of processes can go on too.

Every process writes its rows; `number` is the prompt of each of their tokens, so that they can be dealt again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtrain.data.packing import SignalTypes, make_row, stack_rows
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.rollouts import best_fit_rows, common_rows
from jaxtrain.types import Batch, Example

_NUMBERS = "number"  # [B, T] int32: 1 + the number of the token's prompt; 0 in padding


class PendingRows(NamedTuple):
    """A process's rows of a minibatch."""

    batch: Batch  # [B, T], with the signals of the updates
    numbers: np.ndarray  # [B, T] int32: 1 + the number of the token's prompt; 0 in padding


def save_pending(folder: Path, step: int, minibatches: Sequence[PendingRows], deal: Deal) -> None:
    """Write this process's rows atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for number, rows in enumerate(minibatches):
        arrays |= {f"{number}.{name}": array for name, array in rows.batch.arrays().items()}
        arrays[f"{number}.{_NUMBERS}"] = rows.numbers
    path = _path(folder, step, deal.process, deal.processes)
    partial = path.with_suffix(f".tmp{deal.process}")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def load_pending(folder: Path, step: int, processes: int, deal: Deal, multiple: int) -> list[PendingRows]:
    """This process's rows of what `processes` processes wrote after `step`: its own, if there are as many now.

    Otherwise their samples are dealt and packed again, into a multiple of `multiple` rows. Raises ValueError if a file
    is missing.
    """
    paths = [_path(folder, step, process, processes) for process in range(processes)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing: it holds samples whose updates are pending in the newest checkpoint")
    if processes == deal.processes:
        return _read(paths[deal.process])
    saved = [_read(path) for path in paths]
    return _dealt([[part[number] for part in saved] for number in range(len(saved[0]))], deal, multiple)


def remove_pending(folder: Path, keep: set[int]) -> None:
    """Remove the files of all steps but `keep`."""
    for path in folder.glob("*.npz"):
        if int(path.name.partition(".")[0]) not in keep:
            path.unlink()


def _path(folder: Path, step: int, process: int, processes: int) -> Path:
    return folder / f"{step}.{process}-of-{processes}.npz"


def _read(path: Path) -> list[PendingRows]:
    minibatches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path) as stored:
        for key, array in stored.items():
            number, _, name = key.partition(".")
            minibatches.setdefault(int(number), {})[name] = array
    ordered = [minibatches[number] for number in sorted(minibatches)]
    return [PendingRows(numbers=arrays.pop(_NUMBERS), batch=Batch.from_arrays(arrays)) for arrays in ordered]


def _dealt(minibatches: Sequence[Sequence[PendingRows]], deal: Deal, multiple: int) -> list[PendingRows]:
    own = [
        sorted(
            (sample for rows in parts for sample in _samples(rows) if deal.owns(sample.number)),
            key=lambda sample: sample.number,
        )
        for parts in minibatches
    ]
    length = minibatches[0][0].batch.tokens.shape[1]
    layouts = [best_fit_rows([len(sample.example.input_ids) for sample in samples], length) for samples in own]
    rows = common_rows(layouts, multiple)
    made = []
    for parts, samples, layout in zip(minibatches, own, layouts, strict=True):
        first = parts[0].batch
        types: SignalTypes = {name: (array.dtype, array.shape[2:]) for name, array in first.signals.items()}
        numbers = np.zeros((rows, length), np.int32)
        packed = []
        for index, row in enumerate([*layout, *[[]] * (rows - len(layout))]):
            packed.append(make_row([samples[each].example for each in row], length, types))
            filled = [np.full(len(samples[each].example.input_ids), samples[each].number + 1) for each in row]
            numbers[index, : sum(map(len, filled))] = np.concatenate([*filled, np.zeros(0, np.int32)])
        left_out = np.zeros((rows, 3), np.float32)
        if deal.process == 0:  # in which row a sample is counted makes no difference
            left_out[0] = sum(part.batch.left_out.sum(0) for part in parts if part.batch.left_out is not None)
        made.append(PendingRows(stack_rows(packed)._replace(left_out=left_out), numbers))
    return made


class _Sample(NamedTuple):
    number: int  # of its prompt
    example: Example


def _samples(rows: PendingRows) -> Iterator[_Sample]:
    batch = rows.batch
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, int(segments.max(initial=0)) + 1):
            at = np.flatnonzero(segments == segment)
            part = slice(at[0], at[-1] + 1)
            signals = {name: values[row, part] for name, values in batch.signals.items()}
            example = Example(batch.tokens[row, part], batch.loss_weights[row, part], signals)
            yield _Sample(int(rows.numbers[row, at[0]]) - 1, example)
