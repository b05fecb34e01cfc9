"""What a compiled program for NVIDIA GPUs does and how long that would take: a roofline of its kernels.

XLA has no time estimates for GPUs. The time of a kernel is that of a launch plus the longer of those of its FLOPs and
of its bytes, at the shares of `prices.Gpu`. Collectives run, one by one, during the kernels that the schedule puts
between their start and their end.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from typing import NamedTuple

from jaxtrain.plan.hlo import Instruction, Module, array_sizes, shape_bytes
from jaxtrain.plan.prices import CallPrice, Gpu, UnpricedCallError
from jaxtrain.plan.reading import Collective, Reading, Setting, TimedPart, branches, replica_group

_TILE, _DEPTH = 128, 512  # of a matmul on one multiprocessor, and how deep a part of it one takes at least
_GROUPED_TILE = 128  # rows that a group costs beside its own: tiles that two groups share are computed for both
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    "opt-barrier",
}
_COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"),
}
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # the operand with what is written in place


class _Kernel(NamedTuple):
    kind: str
    flops: float
    bytes: float
    seconds: float


class _Pending(NamedTuple):  # an asynchronous collective
    kind: str
    axes: str
    devices: int
    bytes: float
    seconds: float
    start: float
    where: str


def read_gpu(module: Module, setting: Setting) -> Reading:
    """Read a program for NVIDIA GPUs.

    Raises UnpricedCallError for a custom call without a price, and ValueError for a loop without a known number.
    """
    walker = _Walker(module, setting)
    walker.walk(module.entry, 1.0)
    return walker.reading


class _Walker:
    def __init__(self, module: Module, setting: Setting):
        assert isinstance(setting.chip, Gpu)
        self.module, self.setting, self.gpu = module, setting, setting.chip
        self.reading = Reading()
        self._named: dict[str, dict[str, Instruction]] = {}
        self._users: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        for name, instructions in module.computations.items():
            self._named[name] = {each.name: each for each in instructions}
            self._users[name] = users = defaultdict(list)
            for each in instructions:
                for place, operand in enumerate(each.operands):
                    users[operand].append((each, place))

    def walk(self, computation: str, times: float) -> float:
        """Seconds of one run of a computation that runs `times` times."""
        now, network = 0.0, 0.0
        pending: dict[str, _Pending] = {}
        for each in self.module.computations[computation]:
            if each.opcode in _FREE:
                continue
            if each.opcode == "while":
                trips = self._trips(each)
                now += trips * self.walk(str(each.called("body")), times * trips)
            elif each.opcode == "conditional":
                found = branches(self.module, each, self.setting.never)
                now += sum(share * self.walk(branch, times * share) for branch, share in found)
            elif each.opcode == "call":
                now += self.walk(str(each.called("to_apply")), times)
            elif each.opcode.endswith("-update"):
                if each.operands[0] in pending:
                    pending[each.name] = pending[each.operands[0]]
            elif each.opcode.endswith("-done"):
                if (transfer := pending.pop(each.operands[0], None)) is not None:
                    exposed = max(0.0, transfer.start + transfer.seconds - now)
                    now += exposed
                    self._record(transfer, exposed, times)
            elif (collective := self._collective(each, computation)) is not None:
                transfer = collective._replace(start=max(now, network))
                network = transfer.start + transfer.seconds
                if each.opcode.endswith("-start") and '"is_sync":true' not in each.text:
                    pending[each.name] = transfer
                else:
                    self._record(transfer, network - now, times)
                    now = network
            elif each.opcode in ("copy-start", "async-start"):
                inner = each.called("calls")
                now += self.walk(inner, times) if inner else 0.0
            else:
                kernel = self._kernel(each, computation)
                now += kernel.seconds
                self._time(each, kernel, times)
        return now

    def _time(self, each: Instruction, kernel: _Kernel, times: float) -> None:
        where, operation = self.module.where(each), each.operation or each.name
        part = TimedPart(kernel.seconds * times, times, where, operation)
        if kernel.kind.startswith(("attention", "grouped")):
            price = CallPrice(kernel.kind, kernel.flops * times, kernel.seconds * times)
            self.reading.kernels.append((price, part))
        else:
            self.reading.fusions.append(part)

    def _record(self, transfer: _Pending, exposed: float, times: float) -> None:
        """A part of its time may be exposed: then it is recorded in two parts, with their shares of the bytes."""
        for hidden, seconds in ((False, exposed), (True, transfer.seconds - exposed)):
            if seconds > 0:
                size = transfer.bytes * min(seconds / transfer.seconds, 1.0) * times
                found = Collective(
                    transfer.kind, transfer.axes, transfer.devices, size, seconds * times, hidden, transfer.where
                )
                self.reading.collectives.append(found)

    def _trips(self, each: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.text)
        place = self.module.where(each, lines=8)
        trips = int(known[1]) if known else self.setting.trips(place)
        if trips is None:
            raise ValueError(f"the loop at {place} has a number of trips that plan does not know")
        return trips

    def _collective(self, each: Instruction, computation: str) -> _Pending | None:
        if each.opcode == "async-start":
            inner = each.called("calls") or ""
            wrapped = [one for one in self.module.computations[inner] if one.opcode in _COLLECTIVES]
            return self._collective(wrapped[0], inner) if wrapped else None
        kind = each.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            return None
        devices, axes = replica_group(each.text, self.setting.network.axes)
        given = sum(self._operand_bytes(each, computation))
        share = (devices - 1) / devices
        factors = {"all-gather": devices - 1, "all-reduce": 2 * share, "collective-permute": 1}
        received = given * factors.get(kind, share)
        seconds = received / self.setting.network.links + self.gpu.latency
        return _Pending(kind, axes, devices, received, seconds, 0.0, self.module.where(each))

    def _operand_bytes(self, each: Instruction, computation: str) -> list[float]:
        return [shape_bytes(self.module.shape(computation, name)) for name in each.operands]

    def _cost(self, kind: str, flops: float, moved: float, share: float = 1.0, priced: float | None = None) -> _Kernel:
        compute = (flops if priced is None else priced) / (self.setting.peak * share)
        return _Kernel(kind, flops, moved, max(compute, moved / self.gpu.bandwidth / self.gpu.stream) + self.gpu.launch)

    def _kernel(self, each: Instruction, computation: str) -> _Kernel:
        if each.opcode == "fusion":
            name = str(each.called("calls"))
            moved = sum(self._read(name, place) for place in range(len(each.operands))) + self._written(name)
            flops, priced = self._flops(name)
            return self._cost("matmul" if flops else "element-wise", flops, moved, self.gpu.matmul, priced)
        given, made = self._operand_bytes(each, computation), shape_bytes(each.shape)
        if each.opcode == "custom-call":
            return self._custom(each, computation, sum(given) + made)
        if each.opcode == "dot":
            flops, priced = self._dot_flops(each, computation)
            return self._cost("matmul", flops, sum(given) + made, self.gpu.matmul, priced)
        if each.opcode in ("dynamic-slice", "slice", "gather", "copy", "transpose"):
            return self._cost("copy", 0, 2 * made)
        if each.opcode in _UPDATES:
            return self._cost("copy", 0, 2 * given[_UPDATES[each.opcode]])
        if each.opcode == "sort":
            return self._cost("sort", 0, 8 * sum(given))  # four passes of a radix sort
        return self._cost("element-wise", 0, sum(given) + made)

    def _flops(self, computation: str) -> tuple[float, float]:
        """FLOPs, and FLOPs as priced, of the products in a fusion."""
        found = [
            self._dot_flops(each, computation) if each.opcode == "dot" else self._flops(str(each.called("calls")))
            for each in self.module.computations[computation]
            if each.opcode in ("dot", "fusion")
        ]
        return sum(flops for flops, _ in found), sum(priced for _, priced in found)

    def _dot_flops(self, each: Instruction, computation: str) -> tuple[float, float]:
        """The second is twice as many in float32, and more where there are too few tiles for all multiprocessors."""
        shapes = [self.module.shape(computation, name) for name in each.operands[:2]]
        left = array_sizes(shapes[0])[0]
        axes = dict(re.findall(r"(lhs_\w+)_dims=\{([\d,]*)\}", each.text))
        depth, batch = (
            math.prod(left[int(axis)] for axis in axes.get(key, "").split(",") if axis)
            for key in ("lhs_contracting", "lhs_batch")
        )
        rows = math.prod(left) // depth // batch
        columns = math.prod(array_sizes(each.shape)[0]) // batch // rows
        flops = 2.0 * batch * rows * depth * columns
        tiles = batch * math.ceil(rows / _TILE) * math.ceil(columns / _TILE) * max(1, depth // _DEPTH)
        wide = 2 if any(shape.startswith("f32") for shape in shapes) else 1
        return flops, flops * wide / min(1, tiles / self.gpu.multiprocessors)

    def _read(self, computation: str, place: int) -> float:
        """Bytes that a fusion reads of an operand: those of a slice, if it only slices it."""
        for each in self.module.computations[computation]:
            if each.opcode == "parameter" and f"parameter({place})" in each.text:
                return min(self._read_of(computation, each), shape_bytes(each.shape))
        raise AssertionError((computation, place))

    def _read_of(self, computation: str, each: Instruction) -> float:
        total = 0.0
        for user, place in self._users[computation][each.name]:
            if user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and place == 0):
                total += shape_bytes(user.shape) if place == 0 else 0
            elif user.opcode in _UPDATES and place == 0:
                continue  # in place
            elif user.opcode in ("bitcast", "reshape") and not user.root:
                total += self._read_of(computation, user)
            elif user.opcode == "fusion":
                total += self._read(str(user.called("calls")), place)
            else:
                return shape_bytes(each.shape)
        return total

    def _written(self, computation: str) -> float:
        """Bytes that a fusion writes: those of the updates, if it updates in place."""
        named = self._named[computation]
        (root,) = (each for each in self.module.computations[computation] if each.root)
        total = 0.0
        for part in [named[name] for name in root.operands] if root.opcode == "tuple" else [root]:
            while part.opcode in ("bitcast", "reshape"):
                part = named[part.operands[0]]
            if part.opcode in _UPDATES:
                part = named[part.operands[_UPDATES[part.opcode]]]
            total += shape_bytes(part.shape)
        return total

    def _custom(self, each: Instruction, computation: str, moved: float) -> _Kernel:
        target = each.target or ""
        shapes = [array_sizes(self.module.shape(computation, name)) for name in each.operands]
        if target.startswith("__cudnn$fmha"):
            (batch, queries, heads, width), keys = shapes[0][0], shapes[1][0][1]
            backward = "Backward" in target
            pairs = queries * keys / (2 if "CAUSAL" in each.text else 1)
            window = re.search(r'"sliding_window_length":\s*"?(\d+)', each.text)
            if window and int(window[1]):
                pairs = min(pairs, queries * int(window[1]))
            share = self.gpu.attention_backward if backward else self.gpu.attention_forward
            flops = 2.0 * (5 if backward else 2) * batch * heads * pairs * width
            return self._cost("attention backward" if backward else "attention", flops, moved, share)
        if target.startswith("__cublas$"):
            numbers = json.loads(re.search(r'"dot_dimension_numbers":(\{.*?\})', each.text)[1])  # type: ignore[index]
            depth = math.prod(shapes[0][0][int(axis)] for axis in numbers["lhs_contracting_dimensions"])
            flops = 2.0 * depth * math.prod(array_sizes(each.shape)[0])
            wide = self.module.shape(computation, each.operands[0]).startswith("f32")
            moved -= shape_bytes(each.shape.partition("}")[2])  # the workspace
            return self._cost("matmul", flops, moved, self.gpu.matmul, flops * (2 if wide else 1))
        if target.startswith("mosaic_gpu") and "ops/gpu/ragged.py" in self.module.where(each, lines=4):
            return self._grouped(each, computation, moved)
        if target.startswith("__cub$"):
            return self._cost("sort", 0, 4 * moved)
        if target in ("TopK", "__gpu$TopK"):
            return self._cost("sort", 0, moved)
        raise UnpricedCallError(
            f"the custom call {target} ({self.module.where(each)}, {each.operation or 'no name'}) has no price: add "
            "one to jaxtrain/plan/reading_gpu.py, by its FLOPs and bytes"
        )

    def _grouped(self, each: Instruction, computation: str, moved: float) -> _Kernel:
        """A product of rows [m, k] with matrices [groups, k, n], or of rows [m, k] and [m, n] to such matrices."""
        floats = [
            sizes for name in each.operands for sizes in array_sizes(self.module.shape(computation, name), floats=True)
        ]
        results = array_sizes(each.shape, floats=True)
        matrices = next(sizes for sizes in floats + results if len(sizes) == 3)
        rows = next(sizes for sizes in floats if len(sizes) == 2)[0]
        rows = min(rows, self.setting.grouped_rows or rows)
        tile = _GROUPED_TILE / 2 if results[0] == matrices else _GROUPED_TILE  # the tiles of the transposed kernel
        waste = 1 + matrices[0] * tile / rows
        return self._cost("grouped matmul", 2.0 * rows * math.prod(matrices[1:]), moved, self.gpu.grouped / waste)
