"""Tensors that are stored as numbers of 4 or 8 bits and their scales, each read as one bfloat16 tensor.

MXFP4: `<name>_blocks` and `<name>_scales` of GPT-OSS, see `mxfp4`.

FP8: a matrix `<name>` [O, I] of float8 (e4m3) and a tensor of scales. The FP8 checkpoints of DeepSeek-V3 and Qwen3
call it `<name>_scale_inv`, with one scale for each tile of `weight_block_size` numbers, or one for the matrix;
compressed-tensors calls it `<name>_scale`, with one scale for the matrix or for each row. The product is rounded to
bfloat16, as in the dequantisation of transformers. `input_scale`, the scale of quantised activations, has no meaning
for the matrix and is not read. A trained model is exported as bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from converters import mxfp4
from converters.errors import ConversionError
from converters.weight_rows import Index, Shape

FP8 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")
_SCALE_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_INPUT_SCALES = (".input_scale", ".activation_scale")


class Entry(NamedTuple):
    """The location of one tensor."""

    file: Path
    dtype: str  # the name in safetensors
    shape: Shape
    start: int  # bytes from the beginning of the file
    packed: PackedMatrix | None = None

    @property
    def files(self) -> set[Path]:
        return {self.file} if self.packed is None else {entry.file for entry in self.packed.entries}


ReadEntry = Callable[[Entry, Any, Index], np.ndarray]
"""Reads the rectangle of an entry as numbers of a dtype."""


class PackedMatrix(Protocol):
    """Several tensors that encode one."""

    @property
    def entries(self) -> tuple[Entry, ...]: ...

    def read(self, index: Index, read: ReadEntry) -> np.ndarray:
        """The rectangle `index` of the encoded tensor, in bfloat16."""
        ...


class NumbersAndScales(NamedTuple):
    """A tensor of MXFP4 or FP8."""

    numbers: Entry
    scales: Entry
    tile: Shape = ()  # numbers that share a scale, along each axis of a matrix of FP8; () for MXFP4

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.numbers, self.scales

    def read(self, index: Index, read: ReadEntry) -> np.ndarray:
        return _read_fp8(self, index, read) if self.tile else _read_mxfp4(self, index, read)


def unpacked(entries: Mapping[str, Entry], tile: Shape | None) -> dict[str, Entry]:
    """The entries with one for each packed tensor in place of the two that encode it. `tile` is the
    `weight_block_size` of config.json.

    Raises ConversionError for shapes that do not fit each other.
    """
    tensors = dict(entries)
    for name, numbers in entries.items():
        base = name.removesuffix(mxfp4.BLOCKS)
        scales = entries.get(base + mxfp4.SCALES)
        if base != name and scales is not None and (numbers.dtype, scales.dtype) == ("U8", "U8"):
            del tensors[name], tensors[base + mxfp4.SCALES]
            tensors[base] = _mxfp4(name, numbers, scales)
        elif numbers.dtype == FP8:
            suffix = next((each for each in _SCALES if name + each in entries), None)
            if suffix is None:
                raise ConversionError(f"{numbers.file}: tensor {name} is {FP8} and has no {name}{_SCALES[0]}")
            tensors[name] = _fp8(name, numbers, tensors.pop(name + suffix), tile)
            for each in _INPUT_SCALES:
                tensors.pop(name.rpartition(".")[0] + each, None)
    return tensors


def _mxfp4(name: str, blocks: Entry, scales: Entry) -> Entry:
    if blocks.shape != (*scales.shape, mxfp4.RUN // 2) or len(scales.shape) != 3:
        raise ConversionError(
            f"{blocks.file}: {name} {list(blocks.shape)} and scales {list(scales.shape)} are not a valid MXFP4 pair"
        )
    experts, outside, runs = scales.shape
    return Entry(
        blocks.file, "BF16", (experts, runs * mxfp4.RUN, outside), blocks.start, NumbersAndScales(blocks, scales)
    )


def _fp8(name: str, numbers: Entry, scales: Entry, tile: Shape | None) -> Entry:
    if len(numbers.shape) == 2 and scales.dtype in _SCALE_DTYPES:
        rows, columns = numbers.shape
        # Of a scale for the matrix the shape may be [], [1] or [1, 1], of one for each row [O] or [O, 1].
        flat = scales._replace(
            shape=(scales.shape[0] if scales.shape else 1, 1) if len(scales.shape) < 2 else scales.shape
        )
        for each in (tile, (rows, columns), (1, columns)):
            if each and flat.shape == tuple(-(-size // step) for size, step in zip(numbers.shape, each, strict=True)):
                return Entry(numbers.file, "BF16", numbers.shape, numbers.start, NumbersAndScales(numbers, flat, each))
    raise ConversionError(
        f"{numbers.file}: {name} {list(numbers.shape)} of {FP8} does not fit its scales {list(scales.shape)} of "
        f"{scales.dtype}; known are one for each tile of quantization_config.weight_block_size={tile and list(tile)}, "
        "for each row, or for the matrix"
    )


def _read_mxfp4(packed: NumbersAndScales, index: Index, read: ReadEntry) -> np.ndarray:
    """The rectangle of [E, I, O], decoded from the runs along I that overlap it."""
    experts, inside, outside = index
    runs = slice(inside.start // mxfp4.RUN, -(-inside.stop // mxfp4.RUN))
    where = (experts, outside, runs)
    blocks = read(packed.numbers, np.uint8, (*where, slice(0, packed.numbers.shape[3])))
    numbers = mxfp4.decode_mxfp4(blocks, read(packed.scales, np.uint8, where))
    first = runs.start * mxfp4.RUN
    return numbers[..., inside.start - first : inside.stop - first].swapaxes(1, 2)


def _read_fp8(packed: NumbersAndScales, index: Index, read: ReadEntry) -> np.ndarray:
    """The rectangle of [O, I], from the scales of the tiles that overlap it."""
    tiles = tuple(
        slice(each.start // step, -(-each.stop // step)) for each, step in zip(index, packed.tile, strict=True)
    )
    scales = read(packed.scales, _SCALE_DTYPES[packed.scales.dtype], tiles).astype(np.float32)
    rows, columns = (
        np.arange(each.start, each.stop) // step - first.start
        for each, step, first in zip(index, packed.tile, tiles, strict=True)
    )
    numbers = read(packed.numbers, ml_dtypes.float8_e4m3fn, index).astype(np.float32)
    return (numbers * scales[np.ix_(rows, columns)]).astype(ml_dtypes.bfloat16)
