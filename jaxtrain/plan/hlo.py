"""Compiled HLO as text: its computations, the shapes of their instructions, and the lines of source they come from."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from functools import cached_property
from typing import NamedTuple

_FLOATS = ("bf16", "f16", "f32", "f64")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2}
_BYTES |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OURS = re.compile(r".*/(jaxtrain|converters)/")


class Instruction(NamedTuple):
    name: str
    shape: str  # of its result, as text
    opcode: str
    text: str  # all after the `=`
    root: bool = False  # of its computation

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        rest = self.text[len(self.shape) + 1 + len(self.opcode) :]
        depth, end = 0, len(rest)
        for at, character in enumerate(rest):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if depth == 0:
                end = at
                break
        return re.findall(r"%([\w.\-]+)", rest[:end])

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found and found[1]

    @property
    def operation(self) -> str:
        """The JAX operation, with its scopes."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate. For an operation that it cannot estimate this is an absurd number."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found and int(found[1]) < 1e15 else None

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` names."""
        found = re.search(attribute + r"=%?([\w.\-]+)", self.text)
        return found and found[1]


def array_sizes(shape: str, *, floats: bool = False) -> list[tuple[int, ...]]:
    """The sizes of every array, or of every array of floats, in the text of a shape."""
    found = [(kind, sizes) for kind, sizes in _ARRAY.findall(shape) if not floats or kind in _FLOATS]
    return [tuple(int(size) for size in sizes.split(",") if size) for _, sizes in found]


def shape_bytes(shape: str) -> float:
    """Bytes of all arrays in the text of a shape."""
    arrays = _ARRAY.findall(shape)
    return float(sum(_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays))


class Module:
    """A compiled program. `computations` are lists of instructions by name, `entry` is the name of the outermost."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._files: dict[int, str] = {}
        self._functions: dict[int, str] = {}
        self._locations: dict[int, tuple[int, int]] = {}
        self._named: dict[int, int] = {}  # location -> its function
        self._frames: dict[int, tuple[int, int]] = {}
        self._parse(text)

    def where(self, instruction: Instruction, lines: int = 2) -> str:
        """The innermost lines of ours that it comes from, `file:line < file:line`; ? if there are none."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.text)
        frame, places = int(found[1]) if found else 0, []
        while frame in self._frames and len(places) < lines:
            location, frame = self._frames[frame]
            file, line = self._locations[location]
            name = self._files[file]
            if _OURS.match(name):
                places.append(f"{_OURS.sub('', name)}:{line}")
        return " < ".join(places) or "?"

    def function(self, instruction: Instruction) -> str:
        """The name of our innermost function that it comes from."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.text)
        frame = int(found[1]) if found else 0
        while frame in self._frames:
            location, frame = self._frames[frame]
            if _OURS.match(self._files[self._locations[location][0]]):
                return self._functions.get(self._named[location], "").split(".")[-1]
        return ""

    def shape(self, computation: str, name: str) -> str:
        """The shape of an instruction; an empty text for an unknown one."""
        return self._shapes[computation].get(name, "")

    @cached_property
    def _shapes(self) -> dict[str, dict[str, str]]:
        shapes: dict[str, dict[str, str]] = defaultdict(dict)
        for name, instructions in self.computations.items():
            shapes[name] = {each.name: each.shape for each in instructions}
        return shapes

    def constants(self, computation: str) -> list[int]:
        """The integer constants in a computation, such as the number of trips in the condition of a loop."""
        lines = self.computations.get(computation, ())
        return [int(value) for each in lines for value in re.findall(r"constant\((\d+)\)", each.text)]

    def _parse(self, text: str) -> None:
        table, current = "", None
        for line in text.splitlines():
            if line in _TABLES:
                table = line
            elif table and (found := re.match(r"(\d+) (.*)", line)):
                self._add_row(table, int(found[1]), found[2])
            elif not line.startswith(" ") and (found := _COMPUTATION.match(line)):
                table, current = "", self.computations.setdefault(found[2], [])
                if found[1]:
                    self.entry = found[2]
            elif current is not None and (found := _INSTRUCTION.match(line)):
                made = _instruction(found[1], found[2])
                current.append(made._replace(root=line.lstrip().startswith("ROOT ")))

    def _add_row(self, table: str, number: int, row: str) -> None:
        if table == "FileNames":
            self._files[number] = row.strip('"')
        elif table == "FunctionNames":
            self._functions[number] = row.strip('"')
        elif table == "FileLocations" and (found := re.search(r"file_name_id=(\d+).*?\bline=(\d+)", row)):
            self._locations[number] = int(found[1]), int(found[2])
            named = re.search(r"function_name_id=(\d+)", row)
            self._named[number] = int(named[1]) if named else 0
        elif table == "StackFrames" and (found := re.search(r"file_location_id=(\d+)(?: parent_frame_id=(\d+))?", row)):
            self._frames[number] = (
                int(found[1]),
                int(found[2] or 1) - 1,
            )  # a parent is counted from 1; the first has none


def _instruction(name: str, text: str) -> Instruction:
    if text.startswith("("):  # a tuple
        depth = 0
        for at, character in enumerate(text):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if depth == 0:
                shape, rest = text[: at + 1], text[at + 2 :]
                break
        else:
            shape, rest = text, ""
    else:
        shape, _, rest = text.partition(" ")
    return Instruction(name, shape, rest.partition("(")[0], text)
