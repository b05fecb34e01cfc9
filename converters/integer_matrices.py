"""Matrices of GPTQ, AWQ and bitsandbytes, each read as one bfloat16 tensor `<module>.weight` [O, I].

GPTQ: `qweight` [I * bits / 32, O], each word with the numbers of consecutive inputs from its lowest bits on; `scales`
[G, O]; `qzeros` [G, O * bits / 32], packed along O; and `g_idx` [I], the group of each input (`desc_act`), without
which groups are consecutive. A weight is `scale * (number - zero)`. In the first version of the format the words of
the zeros are stored less one for each zero, as whole words.

AWQ (gemm): `qweight` [I, O / 8] and `qzeros` [G, O / 8], packed along O in the order `_AWQ_ORDER`; `scales` [G, O].

bitsandbytes, 4 bits (nf4, fp4): `weight` has two numbers per byte, the upper half first, which select from
`weight.quant_map` [16] and are multiplied by a scale for each block, `weight.absmax`. With double quantisation the
scales are numbers of 8 bits themselves, in blocks with their own scales. 8 bits: `weight` int8 [O, I], and `SCB` [O],
127 times the scale of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.errors import ConversionError
from converters.packed_tensors import Entry, ReadEntry
from converters.quantization import IntegerFormat
from converters.weight_rows import Index, Shape, full_index

_FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the place, among eight outputs, of the i-th four bits of a word
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


class Grouped(NamedTuple):
    """A matrix of GPTQ or AWQ."""

    numbers: Entry
    zeros: Entry
    scales: Entry
    groups: Entry | None
    format: IntegerFormat

    @property
    def entries(self) -> tuple[Entry, ...]:
        entries = (self.numbers, self.zeros, self.scales, self.groups)
        return tuple(entry for entry in entries if entry is not None)

    def read(self, index: Index, read: ReadEntry) -> np.ndarray:
        """The rectangle `index` of [O, I], in bfloat16."""
        outputs, inputs = index
        count = _WORD // self.format.bits
        if self.format.method == "gptq":
            words = _words(inputs, count)
            numbers = self._unpacked(read(self.numbers, np.uint32, (words, outputs)).T).T
            numbers = numbers[inputs.start - words.start * count :][: inputs.stop - inputs.start]
        else:
            numbers = self._along_outputs(read(self.numbers, np.uint32, (inputs, _words(outputs, count))), outputs)
        size = self.scales.shape[0]
        zeros = read(self.zeros, np.uint32, (slice(0, size), _words(outputs, count)))
        zeros = self._along_outputs(zeros + np.uint32(self._added_to_zeros()), outputs)
        scales = read(self.scales, _FLOATS[self.scales.dtype], (slice(0, size), outputs)).astype(np.float32)
        group = np.arange(inputs.start, inputs.stop) // self.format.group_size
        if self.groups is not None:
            group = read(self.groups, np.int32, (inputs,))
            if group.size and not 0 <= group.min() <= group.max() < size:
                raise ConversionError(f"{self.groups.file}: g_idx of a matrix names a group that it does not have")
        weights = (numbers.astype(np.float32) - zeros.astype(np.float32)[group]) * scales[group]
        return weights.T.astype(ml_dtypes.bfloat16)

    def _added_to_zeros(self) -> int:
        return sum(1 << shift for shift in range(0, _WORD, self.format.bits)) if self.format.zeros_less_one else 0

    def _unpacked(self, words: np.ndarray) -> np.ndarray:
        """[..., W] uint32 -> [..., W * count] uint8."""
        bits = self.format.bits
        shifts = np.arange(0, _WORD, bits, dtype=np.uint32)
        if self.format.method == "awq":
            shifts = shifts[np.argsort(_AWQ_ORDER)]
        numbers = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
        return numbers.astype(np.uint8).reshape(*words.shape[:-1], -1)

    def _along_outputs(self, words: np.ndarray, outputs: slice) -> np.ndarray:
        count = _WORD // self.format.bits
        first = outputs.start - _words(outputs, count).start * count
        return self._unpacked(words)[:, first : first + outputs.stop - outputs.start]


class Blocks(NamedTuple):
    """A matrix of bitsandbytes in 4 bits."""

    numbers: Entry
    table: Entry
    absmax: Entry
    nested_absmax: Entry | None
    nested_table: Entry | None
    state: Mapping[str, Any]

    @property
    def entries(self) -> tuple[Entry, ...]:
        entries = (self.numbers, self.table, self.absmax, self.nested_absmax, self.nested_table)
        return tuple(entry for entry in entries if entry is not None)

    def read(self, index: Index, read: ReadEntry) -> np.ndarray:
        """The rectangle `index` of [O, I], in bfloat16: whole rows are read, since a matrix is stored flat."""
        rows, columns = index
        width = self.state["shape"][1]
        first, last = rows.start * width, rows.stop * width
        where = slice(first // 2, -(-last // 2))
        packed = read(self.numbers, np.uint8, (where, slice(0, 1)))[:, 0]
        numbers = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[first - 2 * where.start :][: last - first]
        blocks = _words(slice(first, last), self.state["blocksize"])
        block = np.arange(first, last) // self.state["blocksize"] - blocks.start
        values = _dequantized(self.table, read)[numbers] * self._scales(blocks, read)[block]
        return values.reshape(-1, width)[:, columns].astype(ml_dtypes.bfloat16)

    def _scales(self, blocks: slice, read: ReadEntry) -> np.ndarray:
        if self.nested_absmax is None or self.nested_table is None:
            return read(self.absmax, np.float32, (blocks,))
        outer = np.arange(blocks.start, blocks.stop) // self.state["nested_blocksize"]
        numbers = _dequantized(self.nested_table, read)[read(self.absmax, np.uint8, (blocks,))]
        return numbers * _dequantized(self.nested_absmax, read)[outer] + np.float32(self.state["nested_offset"])


class ScaledRows(NamedTuple):
    """A matrix of bitsandbytes in 8 bits."""

    numbers: Entry
    scales: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self)

    def read(self, index: Index, read: ReadEntry) -> np.ndarray:
        scales = read(self.scales, np.float32, index[:1])
        numbers = read(self.numbers, np.int8, index).astype(np.float32)
        return (numbers * (scales / np.float32(127))[:, None]).astype(ml_dtypes.bfloat16)


def _words(numbers: slice, count: int) -> slice:
    """The words of `count` numbers that hold these."""
    return slice(numbers.start // count, -(-numbers.stop // count))


def _dequantized(entry: Entry, read: ReadEntry) -> np.ndarray:
    return read(entry, np.float32, full_index(entry.shape))


def with_matrices(entries: Mapping[str, Entry], form: IntegerFormat | None) -> dict[str, Entry]:
    """The entries with one for each matrix in place of the tensors that encode it.

    Raises ConversionError for a tensor that is missing, and for shapes and types that do not fit each other.
    """
    tensors = dict(entries)
    if form is None:
        return tensors
    for name in entries:
        if form.method in ("gptq", "awq") and name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            parts = {part: tensors.pop(f"{module}.{part}", None) for part in ("qweight", "qzeros", "scales", "g_idx")}
            tensors[f"{module}.weight"] = _grouped(module, parts, form)
        elif form.method == "bitsandbytes" and name.endswith(_STATES):
            module = name.partition(".weight.quant_state.")[0]
            tensors[f"{module}.weight"] = _blocks(module, tensors, tensors.pop(name))
        elif form.method == "bitsandbytes" and name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            numbers, scales = tensors.get(f"{module}.weight"), tensors.pop(name)
            tensors.pop(f"{module}.weight_format", None)
            if numbers is None or (numbers.dtype, scales.dtype) != ("I8", "F32") or scales.shape != numbers.shape[:1]:
                raise ConversionError(f"{scales.file}: {name} {list(scales.shape)} is not the scale of an int8 matrix")
            tensors[f"{module}.weight"] = numbers._replace(dtype="BF16", packed=ScaledRows(numbers, scales))
    return tensors


def _grouped(module: str, parts: Mapping[str, Entry | None], form: IntegerFormat) -> Entry:
    numbers, zeros, scales, groups = parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"]
    assert numbers is not None
    if zeros is None or scales is None:
        missing = "qzeros" if zeros is None else "scales"
        raise ConversionError(f"{numbers.file}: {module}.qweight has no {module}.{missing}")
    count, along = _WORD // form.bits, 0 if form.method == "gptq" else 1
    shape = tuple(size * (count if axis == along else 1) for axis, size in enumerate(numbers.shape))
    groups_of_size = -(-shape[0] // (form.group_size if form.group_size > 0 else shape[0]))
    fits = (
        len(shape) == len(scales.shape) == 2
        and (numbers.dtype, zeros.dtype) == ("I32", "I32")
        and scales.dtype in _FLOATS
        and scales.shape == (groups_of_size, shape[1])
        and zeros.shape == (groups_of_size, shape[1] // count)
        and shape[1] % count == 0
        and (groups is None or (groups.dtype, groups.shape) == ("I32", shape[:1]))
    )
    if not fits:
        found = ", ".join(f"{part} {list(entry.shape)} {entry.dtype}" for part, entry in parts.items() if entry)
        raise ConversionError(
            f"{numbers.file}: {module} does not fit quantization_config.bits={form.bits}, "
            f"group_size={form.group_size}: {found}"
        )
    size = form.group_size if form.group_size > 0 else shape[0]
    packed = Grouped(numbers, zeros, scales, groups, form._replace(group_size=size))
    return Entry(numbers.file, "BF16", (shape[1], shape[0]), numbers.start, packed)


def _blocks(module: str, tensors: dict[str, Entry], state: Entry) -> Entry:
    """Takes the tensors of the matrix out of `tensors`."""
    own = {
        part: tensors.pop(f"{module}.weight.{part}", None)
        for part in ("quant_map", "absmax", "nested_absmax", "nested_quant_map")
    }
    numbers, content = tensors.get(f"{module}.weight"), _state(module, state)
    shape: Shape = tuple(content["shape"])
    size = math.prod(shape)
    blocks = -(-size // content["blocksize"])
    nested = own["nested_absmax"] is not None or own["nested_quant_map"] is not None
    expected = {"quant_map": ("F32", (16,)), "absmax": ("U8" if nested else "F32", (blocks,))}
    if nested:
        outer = -(-blocks // content["nested_blocksize"])
        expected |= {"nested_absmax": ("F32", (outer,)), "nested_quant_map": ("F32", (256,))}
    for part, wanted in expected.items():
        entry = own[part]
        if entry is None or (entry.dtype, entry.shape) != wanted:
            found = f"{entry.dtype} {list(entry.shape)}" if entry else "missing"
            raise ConversionError(
                f"{state.file}: {module}.weight.{part} is {found}, must be {wanted[0]} {list(wanted[1])}"
            )
    if numbers is None or (numbers.dtype, numbers.shape) != ("U8", (-(-size // 2), 1)):
        raise ConversionError(f"{state.file}: {module}.weight does not hold {size} numbers of 4 bits")
    assert own["quant_map"] is not None and own["absmax"] is not None
    packed = Blocks(numbers, own["quant_map"], own["absmax"], own["nested_absmax"], own["nested_quant_map"], content)
    return Entry(numbers.file, "BF16", shape, numbers.start, packed)


def _state(module: str, entry: Entry) -> dict[str, Any]:
    """The JSON that bitsandbytes stores as bytes beside a matrix."""
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        text = stream.read(math.prod(entry.shape))
    try:
        content = {"nested_blocksize": 1, "nested_offset": 0.0, **json.loads(text)}
        sizes = [*content["shape"], content["blocksize"], content["nested_blocksize"]]
        if len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("shape must be two sizes, blocksize and nested_blocksize one each")
        content["nested_offset"] = float(content["nested_offset"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{entry.file}: the quant_state of {module}.weight is not valid: {error!r}") from None
    return content
