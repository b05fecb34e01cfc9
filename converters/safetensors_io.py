"""Reads safetensors files by byte ranges and writes them as streams.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header of
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes. The safetensors package also reads slices, but maps
complete files: imports for eight devices needed 2.4 times the file's size in memory, plain reads need under 1.2 times.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.errors import ConversionError
from converters.integer_matrices import with_matrices
from converters.json_files import read_json_object
from converters.packed_tensors import Entry, unpacked
from converters.quantization import config_of_folder, integer_format, section_of, weight_block_size
from converters.towers import PLAIN_NAMES, TextNames, text_config, text_names, tower_of, unused_prefixes
from converters.weight_rows import Index, Shape
from jaxtrain.hub import local_folder
from jaxtrain.named import did_you_mean

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
STORED = {
    **DTYPES,
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The types of tensors that are copied without being read as parameters."""
_MAX_HEADER = 100_000_000  # the reference implementation's limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHORT_RUN = 16 << 10  # for contiguous runs below this many bytes, it is faster to read the gaps than to skip them
_PIECE = 16 << 20  # bytes of temporary memory for reads that include gaps


@dataclass
class Checkpoint:
    """An opened folder, from which rectangles of tensors can be read. Thread-safe."""

    folder: Path
    entries: dict[str, Entry]  # of a language model beside other models, under the names of its family
    # Tensors of the other models and of multi-token prediction, as they are stored.
    others: dict[str, Entry] = field(default_factory=dict)
    names: TextNames | None = None  # of the language model, if there are others
    _files: dict[Path, int] = field(default_factory=dict)

    def __enter__(self) -> Checkpoint:
        every = [*self.entries.values(), *self.others.values()]
        self._files = {file: os.open(file, os.O_RDONLY) for file in set[Path]().union(*(e.files for e in every))}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def dtype(self, name: str) -> np.dtype:
        """Raises ConversionError for any dtype other than those in `DTYPES`."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ConversionError(
                f"{entry.file}: tensor {name} is {entry.dtype}; only {', '.join(DTYPES)} can be read "
                "(dequantise a quantised checkpoint first)"
            )
        return DTYPES[entry.dtype]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The rectangle `index` of a tensor (default: the full tensor) in its stored dtype.

        Reads only the bytes of the rectangle, plus short gaps between its rows.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        index = index if index is not None else tuple(slice(0, size) for size in entry.shape)
        if entry.packed is not None:
            return entry.packed.read(index, self._read)
        return self._read(entry, dtype, index)

    def read_other(self, name: str) -> np.ndarray:
        """A tensor of another model, as it is stored or dequantised, of a type in `STORED`."""
        entry = self.others[name]
        index = tuple(slice(0, size) for size in entry.shape)
        if entry.packed is not None:
            return entry.packed.read(index, self._read)
        return self._read(entry, STORED[entry.dtype], index)

    def _read(self, entry: Entry, dtype: Any, index: Index) -> np.ndarray:
        out = np.empty([s.stop - s.start for s in index], dtype)
        if out.size:
            self._fill(out, entry, index)
        return out

    def _fill(self, out: np.ndarray, entry: Entry, index: Index) -> None:
        strides = [math.prod(entry.shape[axis + 1 :]) * out.itemsize for axis in range(out.ndim)]
        # Axes after `run` are read in full, so a range of axis `run` is one contiguous run of bytes.
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
            rows_read = np.empty((len(part), *entry.shape[1:]), out.dtype)
            self._pread(rows_read, entry.file, entry.start + (index[0].start + first) * row_bytes)
            part[...] = rows_read[(slice(None), *index[1:])]

    def _pread(self, out: np.ndarray, file: Path, start: int) -> None:
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = os.preadv(self._files[file], [view[done:]], start + done)
            if count == 0:
                raise ConversionError(f"{file} ended while it was read, at byte {start + done}")
            done += count


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Parse the headers of the safetensors files of a folder, or of a model on the hub.

    Use the result as a context manager to read.

    A tensor in several files is read from the last of them in sorted order, as in transformers, with a warning if the
    copies differ.

    Raises ConversionError for a missing folder or file, a pickle, an invalid header, a truncated file, and an index
    with paths outside of the folder or without agreement with its files.
    """
    folder = local_folder(folder)
    check_folder(folder)
    index = _read_index(folder)
    files = sorted(set(index.values())) if index is not None else [SINGLE]
    headers = {file: read_header(folder / file) for file in files}
    for name, file in (index or {}).items():
        if name not in headers[file]:
            raise ConversionError(f"{folder / INDEX} puts tensor {name} into {file}, which does not hold it")
    entries: dict[str, Entry] = {}
    copies: dict[str, list[Entry]] = {}
    for header in headers.values():
        for name, entry in header.items():
            if name in entries:
                copies.setdefault(name, []).append(entries[name])
            entries[name] = entry
    for name, others in copies.items():
        _warn_of_differing_copies(folder, name, others, entries[name])
    hf = config_of_folder(folder)
    section = section_of(hf)
    entries = unpacked(with_matrices(entries, integer_format(section)), weight_block_size(section))
    if tower_of(hf) is None:
        unused = unused_prefixes(hf)
        others = {name: entry for name, entry in entries.items() if name.startswith(unused)}
        own = {name: entry for name, entry in entries.items() if name not in others}
        return Checkpoint(folder, own, others, PLAIN_NAMES if others else None)
    try:
        names = text_names(entries)
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}") from None
    unused = unused_prefixes(text_config(hf))
    plain = {name: names.plain(name) for name in entries}
    plain = {name: None if each and each.startswith(unused) else each for name, each in plain.items()}
    own = {each: entries[name] for name, each in plain.items() if each is not None}
    return Checkpoint(folder, own, {name: entries[name] for name, each in plain.items() if each is None}, names)


def _warn_of_differing_copies(folder: Path, name: str, others: Sequence[Entry], used: Entry) -> None:
    for other in others:
        same_type = (other.dtype, other.shape) == (used.dtype, used.shape)
        if not same_type or _stored_bytes(other) != _stored_bytes(used):
            warnings.warn(
                f"{folder}: tensor {name} is in both {other.file.relative_to(folder)} and "
                f"{used.file.relative_to(folder)} with different values; the latter is used, as in transformers",
                stacklevel=3,
            )


def _stored_bytes(entry: Entry) -> bytes:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        return stream.read(_num_bytes(entry))


def check_folder(folder: Path) -> None:
    """Raises ConversionError, with the most similar sibling folder, if the folder does not exist."""
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, siblings) or "; models are read from folders, as `hf download` writes them"
        raise ConversionError(f"no checkpoint folder {folder}{hint}")


def read_header(file: Path) -> dict[str, Entry]:
    """The entries of all tensors in a file.

    Raises ConversionError for every header that the reference implementation refuses: invalid JSON, an unknown dtype,
    byte ranges that overlap or leave gaps, and a file length that does not match. Also for a tensor that is named twice
    (the reference implementation uses the last one).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ConversionError(f"{file} is not a safetensors file, or truncated: {size} bytes, header of {length}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds something other than strings")
        entries = {name: _entry(file, 8 + length, tensor) for name, tensor in header.items()}
        end = _check_contiguous(entries, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{file} has an invalid safetensors header: {error}") from None
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise ConversionError(f"{file} is {state}: {size} bytes, its header says {end}")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return found


def _entry(file: Path, data: int, header: Mapping[str, Any]) -> Entry:
    begin, end = header["data_offsets"]
    dtype, shape = header["dtype"], header["shape"]
    if dtype not in _ITEM_SIZES:
        raise ValueError(f"unknown dtype {dtype}")
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"offsets {begin} and {end}, shape {shape}: not all are integers from 0")
    entry = Entry(file, dtype, tuple(shape), data + begin)
    if end - begin != _num_bytes(entry):
        raise ValueError(f"bytes {begin} to {end} for {dtype} {shape}")
    return entry


def _check_contiguous(entries: Mapping[str, Entry], start: int) -> int:
    """The end of the last tensor. Raises ValueError if a byte from `start` on is in no tensor, or in two."""
    end, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, _num_bytes(item[1]))):
        if entry.start != end:
            fault = "overlaps" if entry.start < end else "leaves a gap after"
            raise ValueError(f"tensor {name} {fault} {before}")
        end, before = entry.start + _num_bytes(entry), name
    return end


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * _ITEM_SIZES[entry.dtype]


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None if a single file holds the model (which has precedence, as in
    transformers).

    Raises ConversionError for an invalid index. Paths outside of the folder are refused before any file is opened.
    """
    if (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        raise ConversionError(_no_weights(folder))
    index = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ConversionError(f"{folder / INDEX}: weight_map must be an object, not {str(index)[:80]}")
    if not index:
        raise ConversionError(f"{folder / INDEX}: weight_map names no tensor")
    for name, file in index.items():
        if not isinstance(file, str):
            raise ConversionError(f"{folder / INDEX} names {file!r} for {name}, which is not a file name")
        if leaves_folder(file):
            raise ConversionError(f"{folder / INDEX} names {file} (for {name}), which is outside of the folder")
    for name, file in index.items():
        if not (folder / file).is_file():
            raise ConversionError(f"{folder / INDEX} names {file} (for {name}), which does not exist")
    return index


def leaves_folder(file: str) -> bool:
    """Whether a relative file name leads out of its folder. Links are not resolved: the Hub's cache consists of links
    to files elsewhere."""
    paths = PurePosixPath(file), PureWindowsPath(file)
    return any(path.is_absolute() or bool(path.anchor) or ".." in path.parts for path in paths)


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), which are not read because a pickle can run any "
            "code. If you trust it, convert it to safetensors with transformers: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)`"
        )
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    return f"{folder} holds neither {SINGLE} nor {INDEX}" + (f"; it holds {', '.join(found[:5])}" if found else "")


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(specs: Sequence[TensorSpec], max_bytes: int) -> dict[str, list[TensorSpec]]:
    """The tensors of each file, in the order of writing: `model.safetensors`, or numbered files of at most `max_bytes`.
    A larger tensor gets a separate file."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in sorted(specs, key=lambda spec: _natural(spec.name)):
        if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(spec)
    # Wide types first, as in the reference implementation, so that every tensor is aligned.
    shards = [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def write_checkpoint(
    folder: Path, files: Mapping[str, Sequence[TensorSpec]], fetch: Callable[[str], np.ndarray]
) -> None:
    """Write `files`, and an index if there are several.

    `fetch` is called once for each tensor, in order, and its result is written immediately, so that only one tensor
    is in memory.
    """
    for name, shard in files.items():
        _write_file(folder / name, shard, fetch)
    if len(files) > 1:
        total = sum(spec.num_bytes for shard in files.values() for spec in shard)
        weight_map = {spec.name: name for name, shard in files.items() for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, specs: Sequence[TensorSpec], fetch: Callable[[str], np.ndarray]) -> None:
    codes = {dtype: code for code, dtype in STORED.items()}
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
    """A sort key that orders layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
