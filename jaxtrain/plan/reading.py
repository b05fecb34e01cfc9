"""What a compiled program for TPUs does and how long that takes: fusions, kernels, collectives, copies to the host.

The sum is: the compiler's estimated cycles of every fusion times the trips of its loops, over the clock; gathers and
scatters of rows, which it does not estimate, by their bytes; kernels, by the table of prices; and collectives that
nothing runs beside, by their bytes and the links. An asynchronous collective is taken to be hidden behind the
computation between its start and its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxtrain.plan.hlo import Instruction, Module, array_sizes, shape_bytes
from jaxtrain.plan.prices import DCN, FREE_CALLS, CallPrice, Chip, Gpu, UnpricedCallError, call_price, row_bytes

_KINDS = ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all"]
_COLLECTIVES = {*_KINDS, *(f"{kind}-start" for kind in _KINDS)}
_SWITCHES = ("nn/attention.py",)  # where a conditional chooses by the kind of a layer
_ROUNDS = "nn/moe.py"  # of `ops.exchange`: one, where no device gets half as many rows again as its share


class TimedPart(NamedTuple):
    """Of the time of a program: an instruction, in all its trips."""

    seconds: float
    trips: float
    where: str
    operation: str


class Collective(NamedTuple):
    """One collective, in all its trips."""

    kind: str
    axes: str  # of the mesh, joined by +
    devices: int  # of a group
    bytes: float  # of the results on a device
    seconds: float
    hidden: bool
    where: str


class Network(NamedTuple):
    """How the devices of a mesh are connected."""

    axes: Mapping[str, int]  # name -> size, in the order of the devices
    links: float  # bytes/s into a device over all links of its slice
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())


@dataclass
class Reading:
    """The parts of a program, in seconds of one run on one device."""

    fusions: list[TimedPart] = field(default_factory=list)
    kernels: list[tuple[CallPrice, TimedPart]] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    host_bytes: float = 0.0  # copied to and from the host
    host_seconds: float = 0.0

    @property
    def compute_seconds(self) -> float:
        return sum(part.seconds for part in self.fusions) + self.kernel_seconds

    @property
    def kernel_seconds(self) -> float:
        return sum(part.seconds for _, part in self.kernels)

    @property
    def exposed_seconds(self) -> float:
        return sum(each.seconds for each in self.collectives if not each.hidden)

    @property
    def hidden_seconds(self) -> float:
        """Of collectives that run beside the computation, if there is enough of it."""
        return sum(each.seconds for each in self.collectives if each.hidden)

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    def dearest(self, count: int) -> list[TimedPart]:
        """The fusions and kernels that take longest, summed by source line and operation."""
        totals: dict[tuple[str, str], list[float]] = {}
        for part in [*self.fusions, *(part for _, part in self.kernels)]:
            total = totals.setdefault((part.where, part.operation.split("/")[-1]), [0.0, 0.0])
            total[0] += part.seconds
            total[1] += part.trips
        made = [TimedPart(seconds, trips, *key) for key, (seconds, trips) in totals.items()]
        return sorted(made, key=lambda part: -part.seconds)[:count]


class Setting(NamedTuple):
    """What a program is read for."""

    chip: Chip | Gpu
    peak: float  # dense bf16 FLOP/s of a device
    network: Network
    trips: Callable[[str], int | None]  # of a loop whose number depends on the data, by its source lines
    never: frozenset[str] = frozenset()  # functions of ours whose conditionals are false
    grouped_rows: int | None = None  # of a grouped matmul, that belong to a group; None: all of them


def read_tpu(module: Module, setting: Setting) -> Reading:
    """Read a program for TPUs.

    Raises UnpricedCallError for a custom call without a price, and ValueError for a loop without a known number.
    """
    walker = _Walker(module, setting)
    walker.walk(module.entry, 1.0)
    return walker.reading


class _Walker:
    def __init__(self, module: Module, setting: Setting):
        assert isinstance(setting.chip, Chip)
        self.module, self.setting, self.chip, self.network = module, setting, setting.chip, setting.network
        self.reading = Reading()
        self._channels: set[tuple[str, str]] = set()

    def walk(self, computation: str, times: float) -> None:
        for each in self.module.computations[computation]:
            if each.opcode == "custom-call":
                self._custom_call(each, computation, times)
            elif each.cycles is not None:
                self.reading.fusions.append(self._part(each.cycles / self.chip.clock, each, times))
            if each.opcode in _COLLECTIVES:
                self._collective(each, each.opcode.removesuffix("-start"), times, hidden="-start" in each.opcode)
            elif each.opcode == "recv":
                self._between_slices(each, times)
            elif each.opcode == "fusion":
                self._fused(each, computation, times)
                if each.cycles is None and (size := row_bytes(each, self.module)):
                    self.reading.fusions.append(self._part(size / self.chip.bandwidth, each, times))
            elif each.opcode == "while":
                self._loop(each, times)
            elif each.opcode == "call" and (called := each.called("to_apply")) in self.module.computations:
                self.walk(str(called), times)
            elif each.opcode == "conditional":
                for branch, share in branches(self.module, each, self.setting.never):
                    self.walk(branch, times * share)
            elif each.opcode == "copy-start" and "S(5)" in each.shape:  # the host's memory
                size = shape_bytes(each.shape) / 2  # source and destination
                self.reading.host_bytes += size * times
                self.reading.host_seconds += size * times / self.chip.host_link

    def _part(self, seconds: float, each: Instruction, times: float) -> TimedPart:
        return TimedPart(seconds * times, times, self.module.where(each), each.operation or each.name)

    def _custom_call(self, each: Instruction, computation: str, times: float) -> None:
        if each.cycles is not None and each.target != "tpu_custom_call":
            self.reading.fusions.append(self._part(each.cycles / self.chip.clock, each, times))
        elif each.target == "tpu_custom_call":
            price = call_price(each, self.module, computation, self.chip, self.setting.peak, self.setting.grouped_rows)
            total = price._replace(flops=price.flops * times, seconds=price.seconds * times)
            self.reading.kernels.append((total, self._part(price.seconds, each, times)))
        elif each.target not in FREE_CALLS:
            raise UnpricedCallError(
                f"the custom call {each.target} ({self.module.where(each)}) has neither an estimate of the compiler "
                "nor a price: add one to jaxtrain/plan/prices.py"
            )

    def _loop(self, each: Instruction, times: float) -> None:
        condition, body = each.called("condition"), each.called("body")
        assert condition is not None and body is not None, each.text
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.text)
        count = int(known[1]) if known else max(self.module.constants(condition), default=0)
        if not count:
            place = self.module.where(each, lines=8)
            found = self.setting.trips(place)
            if found is None and _ROUNDS in place:
                found = 1
            if found is None:
                raise ValueError(f"the loop at {place} has a number of trips that plan does not know")
            count = found
        self.walk(body, times * count)

    def _fused(self, each: Instruction, computation: str, times: float) -> None:
        """The collectives that the compiler fused with what they run beside; one may be spread over several."""
        inner = self.module.computations.get(each.called("calls") or "", ())
        for one in inner:
            if one.opcode not in _COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", one.text)
            if channel:
                if (channel[1], computation) in self._channels:
                    continue
                self._channels.add((channel[1], computation))
            self._collective(one, one.opcode.removesuffix("-start"), times, hidden=True)

    def _between_slices(self, each: Instruction, times: float) -> None:
        """A part of a collective over "data" that leaves the slice. It comes after the gradients: nothing hides it."""
        named = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.text)
        if named is None:
            return
        kind, size = named[1].lower().replace("_", "-"), shape_bytes(each.shape.split(", u32[]")[0])
        seconds = _received(kind, size, self.network.slices, started=False) / DCN
        place = self.module.where(each)
        found = Collective(kind, "data", self.network.slices, size * times, seconds * times, False, place)
        self.reading.collectives.append(found)

    def _collective(self, each: Instruction, kind: str, times: float, *, hidden: bool) -> None:
        size, (group, axes) = shape_bytes(each.shape), replica_group(each.text, self.network.axes)
        if kind == "ragged-all-to-all" and self.setting.grouped_rows:  # of a buffer [blocks, rows of a block, width]
            size *= min(1.0, self.setting.grouped_rows / math.prod(array_sizes(each.shape)[0][:2]))
        received = _received(kind, size, group, started=each.opcode.endswith("-start"))
        devices = self.network.devices
        # A group of all devices may use every link, a smaller one the share log(group) / log(devices) of them.
        share = math.log(group) / math.log(devices) if 1 < group < devices else 1.0
        seconds = received / (self.network.links * share) if received else 0.0
        if self.network.slices > 1 and "data" in axes.split("+"):
            seconds = max(seconds, received / DCN)
        made = Collective(kind, axes, group, size * times, seconds * times, hidden, self.module.where(each))
        self.reading.collectives.append(made)


def branches(module: Module, each: Instruction, never: frozenset[str]) -> Iterator[tuple[str, float]]:
    """The branches of a conditional that run, and how often of every time. `never`: see `Setting`."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", each.text)
    if listed:
        names = [name.strip().lstrip("%") for name in listed[1].split(",")]
    else:
        names = [str(each.called("true_computation")), str(each.called("false_computation"))]
    place = module.where(each)
    if any(file in place for file in _SWITCHES):
        yield from ((name, 1 / len(names)) for name in names)
    else:
        # Of `lax.cond`: the last branch is that of a true predicate, and `true_computation` comes first.
        true, false = (names[-1], names[0]) if listed else names
        yield (false if module.function(each) in never else true), 1.0


def _received(kind: str, size: float, group: int, *, started: bool) -> float:
    """Bytes that a device must receive for a result of `size` bytes."""
    others = (group - 1) / group
    if kind == "all-reduce":
        return 2 * size * others
    if kind == "reduce-scatter":
        return size * (group - 1)
    if kind == "collective-permute":
        return size / 2 if started else size
    return size * others


def replica_group(text: str, axes: Mapping[str, int]) -> tuple[int, str]:
    """The number of devices of a collective's group, and the mesh axes that they differ in, joined by +."""
    group = _first_group(text, math.prod(axes.values()))
    if group is None:
        return 1, "none"
    places = np.array(np.unravel_index(group, tuple(axes.values())))
    differing = [name for name, of_axis in zip(axes, places, strict=True) if len(set(of_axis.tolist())) > 1]
    return len(group), "+".join(differing) or "none"


def _first_group(text: str, devices: int) -> list[int] | None:
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if named:  # axes of the compiler's own, of which some differ within a group
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        places = tuple(slice(None) if f"'{name}'" in named[2] else 0 for name in sizes)
        return np.arange(devices).reshape(tuple(sizes.values()))[places].ravel().tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(device) for device in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        sizes = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(len(sizes)))
        grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(int(iota[1]), int(iota[2]))
        return grid[0].tolist()
    if "replica_groups={}" in text:
        return list(range(devices))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
    return [int(pairs[1]), int(pairs[2])] if pairs else None
