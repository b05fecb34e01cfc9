"""Safetensors files, read by byte range and written as a stream.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header of
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes. The safetensors package reads slices too, but maps
whole files: importing for eight devices peaked at 2.4 times the file's size, against under 1.2 with plain reads.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters import mxfp4
from converters.errors import CheckpointError, nearest
from converters.rows import Index, Shape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_MAX_HEADER = 100_000_000  # the reference implementation's limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHORT_RUN = 16 << 10  # below this many bytes in a row, reading the gaps too is faster than seeking over them
_PIECE = 16 << 20  # bytes of scratch memory where gaps are read


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it
    shape: Shape
    start: int  # bytes from the beginning of the file
    packed: tuple[Entry, Entry] | None = None  # blocks and scales of an MXFP4 tensor, which is read as this BF16 one

    @property
    def files(self) -> set[Path]:
        return {entry.file for entry in self.packed or (self,)}


@dataclass
class Checkpoint:
    """An opened folder: every tensor's entry, and reads of rectangles of them. Reads may run in several threads."""

    folder: Path
    entries: dict[str, Entry]
    _files: dict[Path, int] = field(default_factory=dict)

    def __enter__(self) -> Checkpoint:
        self._files = {
            file: os.open(file, os.O_RDONLY) for file in set[Path]().union(*(e.files for e in self.entries.values()))
        }
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def dtype(self, name: str) -> np.dtype:
        """Raises CheckpointError for a type that is no plain float."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is {entry.dtype}; only {', '.join(DTYPES)} can be read "
                "(a quantised checkpoint must be dequantised first)"
            )
        return DTYPES[entry.dtype]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The rectangle `index` of a tensor (default: all of it) in its own dtype. Reads little more than its bytes."""
        entry, dtype = self.entries[name], self.dtype(name)
        index = index if index is not None else tuple(slice(0, size) for size in entry.shape)
        if entry.packed is not None:
            return self._read_packed(*entry.packed, index)
        return self._read(entry, dtype, index)

    def _read(self, entry: Entry, dtype: Any, index: Index) -> np.ndarray:
        out = np.empty([s.stop - s.start for s in index], dtype)
        if out.size:
            self._fill(out, entry, index)
        return out

    def _read_packed(self, blocks: Entry, scales: Entry, index: Index) -> np.ndarray:
        """The rectangle of [E, I, O], from the runs along I that it touches."""
        experts, inside, outside = index
        runs = slice(inside.start // mxfp4.RUN, -(-inside.stop // mxfp4.RUN))
        where = (experts, outside, runs)
        numbers = mxfp4.decode(
            self._read(blocks, np.uint8, (*where, slice(0, blocks.shape[3]))), self._read(scales, np.uint8, where)
        )
        first = runs.start * mxfp4.RUN
        return numbers[..., inside.start - first : inside.stop - first].swapaxes(1, 2)

    def _fill(self, out: np.ndarray, entry: Entry, index: Index) -> None:
        strides = [math.prod(entry.shape[axis + 1 :]) * out.itemsize for axis in range(out.ndim)]
        # Axes after `run` are wanted whole, so a range of axis `run` is one run of bytes.
        cut = [axis for axis in range(out.ndim) if out.shape[axis] != entry.shape[axis]]
        run = max(cut, default=0)
        if run > 0 and math.prod(out.shape[run:]) * out.itemsize < _SHORT_RUN:
            return self._fill_over_gaps(out, entry, index, strides[0])
        for outer in np.ndindex(out.shape[:run]):
            offsets = [s.start + o for s, o in zip(index, (*outer, *[0] * (out.ndim - run)), strict=True)]
            start = entry.start + sum(o * stride for o, stride in zip(offsets, strides, strict=True))
            self._pread(out[outer] if outer else out, entry.file, start)
        return None

    def _fill_over_gaps(self, out: np.ndarray, entry: Entry, index: Index, row_bytes: int) -> None:
        rows = max(1, _PIECE // row_bytes)
        for first in range(0, len(out), rows):
            part = out[first : first + rows]
            whole = np.empty((len(part), *entry.shape[1:]), out.dtype)
            self._pread(whole, entry.file, entry.start + (index[0].start + first) * row_bytes)
            part[...] = whole[(slice(None), *index[1:])]

    def _pread(self, out: np.ndarray, file: Path, start: int) -> None:
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = os.preadv(self._files[file], [view[done:]], start + done)
            if count == 0:
                raise CheckpointError(f"{file} ended while it was read, at byte {start + done}")
            done += count


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Parse the headers of a folder's safetensors files; use the result as a context manager to read.

    Raises CheckpointError for a missing folder or file, a pickle, a header that is not one, a truncated file, and an
    index that does not agree with its files.
    """
    folder = Path(folder)
    check_folder(folder)
    index = _read_index(folder)
    files = dict.fromkeys(index.values()) if index is not None else [SINGLE]
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(folder / file).items():
            if name in entries:
                raise CheckpointError(f"tensor {name} is in both {entries[name].file} and {entry.file}")
            entries[name] = entry
    for name, file in (index or {}).items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(f"{folder / INDEX} puts tensor {name} into {file}, which does not hold it")
    return Checkpoint(folder, _unpacked(entries))


def _unpacked(entries: dict[str, Entry]) -> dict[str, Entry]:
    """With each pair of MXFP4 blocks and scales as the one tensor that they stand for."""
    tensors = dict(entries)
    for name, blocks in entries.items():
        whole = name.removesuffix(mxfp4.BLOCKS)
        scales = entries.get(whole + mxfp4.SCALES)
        if whole == name or scales is None or (blocks.dtype, scales.dtype) != ("U8", "U8"):
            continue
        if blocks.shape != (*scales.shape, mxfp4.RUN // 2) or len(scales.shape) != 3:
            raise CheckpointError(
                f"{blocks.file}: {name} {list(blocks.shape)} and its scales {list(scales.shape)} are no MXFP4 tensor"
            )
        experts, outside, runs = scales.shape
        del tensors[name], tensors[whole + mxfp4.SCALES]
        shape = (experts, runs * mxfp4.RUN, outside)
        tensors[whole] = Entry(blocks.file, "BF16", shape, blocks.start, packed=(blocks, scales))
    return tensors


def check_folder(folder: Path) -> None:
    """Raises CheckpointError where there is no such folder, with the nearest one beside it."""
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, beside) or "; models are read from folders, as `hf download` writes them"
        raise CheckpointError(f"no checkpoint folder {folder}{hint}")


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor's entry. Raises CheckpointError for a header that is not one and for a file of the wrong length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} is no safetensors file, or cut short: {size} bytes, header of {length}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = {n: _entry(file, 8 + length, h) for n, h in header.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a broken safetensors header: {error}") from None
    end = max((e.start + _num_bytes(e) for e in entries.values()), default=8 + length)
    if end != size:
        state = "cut short" if end > size else "longer than its header says"
        raise CheckpointError(f"{file} is {state}: {size} bytes where its header needs {end}")
    return entries


def _entry(file: Path, data: int, header: Mapping[str, Any]) -> Entry:
    begin, end = header["data_offsets"]
    entry = Entry(file, header["dtype"], tuple(header["shape"]), data + begin)
    if entry.dtype not in _ITEM_SIZES:
        raise ValueError(f"unknown dtype {entry.dtype}")
    if begin < 0 or end - begin != _num_bytes(entry):
        raise ValueError(f"bytes {begin} to {end} for {entry.dtype} {list(entry.shape)}")
    return entry


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * _ITEM_SIZES[entry.dtype]


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None where one file holds all (which wins, as in transformers)."""
    if (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is no safetensors index: {error!r}") from None
    for name, file in index.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / INDEX} names {file} (for {name}), which is not there")
    return index


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}): a pickle can run any code, so it is not read. Where "
            "you trust it, convert it: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)` of "
            "transformers writes safetensors"
        )
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    return f"{folder} holds neither {SINGLE} nor {INDEX}" + (f"; it holds {', '.join(found[:5])}" if found else "")


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(specs: Sequence[Spec], max_bytes: int) -> dict[str, list[Spec]]:
    """Which tensors go into which file, in the order they are written: `model.safetensors`, or numbered files where
    that would exceed `max_bytes`. A tensor larger than that has a file to itself."""
    shards: list[list[Spec]] = [[]]
    for spec in sorted(specs, key=lambda spec: _natural(spec.name)):
        if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(spec)
    # Wide types first, as the reference implementation does, so that every tensor is aligned to its type.
    shards = [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def write_checkpoint(folder: Path, files: Mapping[str, Sequence[Spec]], fetch: Callable[[str], np.ndarray]) -> None:
    """Write `files`, and an index where there are several.

    `fetch` is called once for each tensor, in order, and its result is written at once: one tensor is in memory.
    """
    for name, shard in files.items():
        _write_file(folder / name, shard, fetch)
    if len(files) > 1:
        total = sum(spec.num_bytes for shard in files.values() for spec in shard)
        weight_map = {spec.name: name for name, shard in files.items() for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, specs: Sequence[Spec], fetch: Callable[[str], np.ndarray]) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": codes[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            array = np.asarray(fetch(spec.name), order="C")
            assert (array.dtype, array.shape) == (spec.dtype, spec.shape), (spec, array.dtype, array.shape)
            stream.write(array.reshape(-1).view(np.uint8).data)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
