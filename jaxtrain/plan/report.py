"""`RunPlan`: what was found out, as text and as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.parallel.sharding import bytes_text
from jaxtrain.plan.compile import Compiled
from jaxtrain.plan.estimate import StateEstimate
from jaxtrain.plan.memory import memory_by_kind
from jaxtrain.plan.programs import Program
from jaxtrain.plan.reading import Reading
from jaxtrain.plan.target import Target
from jaxtrain.plan.transfer import WeightTransfer


@dataclass(frozen=True)
class Phase:
    """One compiled program of a step."""

    program: Program
    compiled: Compiled
    reading: Reading | None  # None: no time is predicted for these devices, or the program was refused
    beside: dict[str, int] = field(default_factory=dict)  # bytes in memory meanwhile that the program does not read

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a device by kind."""
        if self.compiled.refused:
            return {"all, by the compiler's refusal": self.compiled.refused, **self.beside}
        return {**memory_by_kind(self.program, self.compiled), **self.beside}

    @property
    def used(self) -> int:
        """The most bytes of a device at a time."""
        return self.compiled.memory + sum(self.beside.values())

    @property
    def seconds(self) -> float | None:
        """In a step."""
        return None if self.reading is None else self.reading.seconds * self.program.times

    def mfu(self, target: Target) -> float | None:
        if self.reading is None or not self.reading.seconds or target.peak is None:
            return None
        return self.program.flops / (self.program.mesh.size * target.peak * self.reading.seconds)


@dataclass(frozen=True)
class RunPlan:
    """The plan of a config on a target. Times are predictions of one step, in seconds; bytes are those of a device."""

    recipe: str
    target: Target
    estimate: StateEstimate
    phases: Sequence[Phase] = ()
    price: float | None = None  # of a chip and hour
    steps: int | None = None  # of the run
    step_tokens: int = 0  # trained in a step
    transfer: WeightTransfer | None = None  # of weights to engines on other devices
    host_seconds: float | None = 0.0  # of optimizers to the host and back (`rl.placement.memory`); None: not known

    @property
    def update(self) -> Phase | None:
        """The phase that trains the policy."""
        return next((phase for phase in self.phases if phase.program.name == "update"), None)

    @property
    def seconds(self) -> float | None:
        """Of a step; None if the time of a program is not known."""
        known = [phase.seconds for phase in self.phases]
        if self.transfer is not None:
            known.append(self.transfer.seconds)
        known.append(self.host_seconds)
        return None if not self.phases or None in known else sum(each for each in known if each is not None)

    @property
    def mfu(self) -> float | None:
        """Of the update, with causal attention counted by half."""
        return None if self.update is None else self.update.mfu(self.target)

    @property
    def tokens_per_second_per_chip(self) -> float | None:
        return self.step_tokens / self.seconds / self.target.chips if self.seconds else None

    @property
    def used(self) -> int:
        """The most memory of any phase."""
        return max((phase.used for phase in self.phases), default=0)

    @property
    def fits(self) -> bool | None:
        """None for a CPU, whose memory is that of the machine, and where nothing was compiled."""
        if self.target.chip is None or not self.phases:
            return None
        return self.used <= self.target.chip.hbm and not any(phase.compiled.refused for phase in self.phases)

    @property
    def cost(self) -> float | None:
        """Of the whole run."""
        if self.price is None or self.seconds is None or self.steps is None:
            return None
        return self.price * self.target.chips * self.seconds * self.steps / 3600

    def as_json(self, profile: int = 0) -> dict[str, Any]:
        """Everything, for programs. `profile`: so many of the dearest fusions of each program."""
        made: dict[str, Any] = {
            "recipe": self.recipe,
            "target": self.target.name,
            "slices": self.target.slices,
            "chips": self.target.chips,
            "devices": self.target.devices,
            "mesh": self.estimate.mesh,
            "parameters": self.estimate.parameters,
            "trained_parameters": self.estimate.trained,
            "step_tokens": self.step_tokens or self.estimate.tokens,
            "flops": self.estimate.flops,
            "estimate": {"bytes": self.estimate.bytes, "seconds_at_peak": self.estimate.seconds},
        }
        if not self.phases:
            return made
        hbm = None if self.target.chip is None else self.target.chip.hbm
        return made | {
            "hbm": hbm,
            "used": self.used,
            "fits": self.fits,
            "free": None if hbm is None else hbm - self.used,
            "step_seconds": self.seconds,
            "mfu": self.mfu,
            "tokens_per_second_per_chip": self.tokens_per_second_per_chip,
            "bound": None if self.update is None else bound(self.update),
            "cost": self.cost,
            "transfer": self.transfer and self.transfer._asdict(),
            "host_seconds": self.host_seconds,
            "programs": {phase.program.name: _program_json(phase, self.target, profile) for phase in self.phases},
        }


def bound(phase: Phase) -> str | None:
    """What most of the time of a program goes to."""
    reading = phase.reading
    if reading is None:
        return None
    if reading.hidden_seconds > reading.compute_seconds:
        return "interconnect: the asynchronous collectives take longer than the computation they run beside"
    parts = {
        "matrix products and other fusions": reading.compute_seconds - reading.kernel_seconds,
        "attention and other kernels": reading.kernel_seconds,
        "exposed collectives": reading.exposed_seconds,
    }
    return max(parts, key=lambda name: parts[name])


def estimate_text(recipe: str, target: Target, found: StateEstimate) -> str:
    """The part of the text that needs no compiler."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items()) or "one device"
    lines = [
        f"{recipe} on {target.name}" + (f" x {target.slices} slices" if target.slices > 1 else ""),
        f"  {target.chips} chips, {target.devices} devices, mesh {mesh}",
        f"  {found.parameters / 1e9:.3f}e9 parameters, {found.trained / 1e9:.3f}e9 of them trained; "
        f"{found.tokens} tokens a step",
        f"estimate, before compilation: {bytes_text(found.bytes)} a device without activations "
        f"(parameters {bytes_text(found.parameter_bytes)}, gradients {bytes_text(found.gradient_bytes)}, "
        f"optimizer {bytes_text(found.optimizer_bytes)})",
        f"  {found.flops / 1e12:.1f} TFLOP a step (causal attention counted by half, recomputation not at all)"
        + (f": {found.seconds:.3f} s at the peak" if found.seconds else ""),
    ]
    if target.chip is not None and found.bytes > target.chip.hbm:
        lines.append(f"  does not fit {target.chip.hbm / 1e9:.1f} GB of HBM, whatever the activations need")
    return "\n".join(lines)


def plan_text(plan: RunPlan, profile: int = 0) -> str:
    """The part of the text that is computed from compiled programs."""
    lines = []
    for phase in plan.phases:
        lines += _phase_lines(phase, plan.target, profile)
    if plan.transfer is not None:
        size, engines, seconds = plan.transfer
        time = "" if seconds is None else f", {seconds:.4f} s"
        lines.append(
            f"weights to {engines} engine{'s' if engines > 1 else ''} of other devices: {bytes_text(size)}{time}"
        )
    if plan.seconds is not None:
        parts = [f"{phase.program.name} {phase.seconds:.3f}" for phase in plan.phases if phase.seconds is not None]
        if plan.transfer is not None:
            parts.append(f"weights {plan.transfer.seconds:.3f}")
        if plan.host_seconds:
            parts.append(f"optimizer to the host and back {plan.host_seconds:.3f}")
        lines.append(f"step: {plan.seconds:.3f} s predicted" + (f" ({', '.join(parts)})" if len(parts) > 1 else ""))
        lines.append(f"  {plan.tokens_per_second_per_chip:.0f} tokens/s/chip")
    if plan.mfu is not None:
        lines.append(f"  MFU of the update {100 * plan.mfu:.1f} % (causal attention counted by half)")
        assert plan.update is not None
        lines.append(f"  bound by {bound(plan.update)}")
    if plan.cost is not None:
        lines.append(f"  cost of {plan.steps} steps: {plan.cost:.2f}")
    lines.append(_verdict(plan))
    return "\n".join(lines)


def _verdict(plan: RunPlan) -> str:
    if plan.target.chip is None:
        return f"memory: {bytes_text(plan.used)} a device; no time is predicted for a CPU"
    hbm, worst = plan.target.chip.hbm, max(plan.phases, key=lambda phase: phase.used)
    of = f"{bytes_text(plan.used)} of {bytes_text(hbm)} HBM a device, in {worst.program.name}"
    if plan.fits:
        return f"fits: {of}; {bytes_text(hbm - plan.used)} free"
    return f"does not fit: {of}; {bytes_text(plan.used - hbm)} too much"


def _phase_lines(phase: Phase, target: Target, profile: int) -> list[str]:
    program, compiled = phase.program, phase.compiled
    times = f", {program.times:g} times a step" if program.times != 1 else ""
    lines = [f"{program.name} (compiled in {compiled.seconds:.0f} s{times})"]
    lines.append(
        f"  memory {bytes_text(phase.used)}: " + ", ".join(f"{k} {bytes_text(v)}" for k, v in phase.memory.items() if v)
    )
    reading = phase.reading
    if reading is None:
        return lines
    lines.append(
        f"  {reading.seconds:.4f} s: fusions {reading.compute_seconds - reading.kernel_seconds:.4f}, "
        f"kernels {reading.kernel_seconds:.4f}, exposed collectives {reading.exposed_seconds:.4f}; "
        f"hidden collectives {reading.hidden_seconds:.4f}"
        + (f", host copies {reading.host_seconds:.4f}" if reading.host_bytes else "")
    )
    for (kind, axes, hidden), (size, seconds) in _by_axis(reading).items():
        how = "hidden" if hidden else "exposed"
        lines.append(f"    {kind} over {axes}: {bytes_text(size)}, {seconds:.4f} s {how}")
    for part in reading.dearest(profile):
        lines.append(f"    {1e3 * part.seconds:9.2f} ms x{part.trips:g}  {part.where}  {part.operation}")
    return lines


def _by_axis(reading: Reading) -> dict[tuple[str, str, bool], tuple[float, float]]:
    totals: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in reading.collectives:
        total = totals[each.kind, each.axes, each.hidden]
        total[0] += each.bytes
        total[1] += each.seconds
    return {key: (size, seconds) for key, (size, seconds) in sorted(totals.items(), key=lambda item: -item[1][1])}


def _program_json(phase: Phase, target: Target, profile: int) -> dict[str, Any]:
    reading, compiled = phase.reading, phase.compiled
    made: dict[str, Any] = {
        "memory": phase.memory,
        "used": phase.used,
        "arguments": compiled.arguments,
        "temporaries": compiled.temporaries,
        "outputs": compiled.outputs,
        "aliased": compiled.aliased,
        "compile_seconds": compiled.seconds,
        "flops": phase.program.flops,
        "tokens": phase.program.tokens,
        "times": phase.program.times,
        "seconds": phase.seconds,
        "mfu": phase.mfu(target),
    }
    if reading is None:
        return made
    made |= {
        "fusion_seconds": reading.compute_seconds - reading.kernel_seconds,
        "kernel_seconds": reading.kernel_seconds,
        "exposed_seconds": reading.exposed_seconds,
        "hidden_seconds": reading.hidden_seconds,
        "host_bytes": reading.host_bytes,
        "collectives": [
            {"kind": kind, "axes": axes, "hidden": hidden, "bytes": size, "seconds": seconds}
            for (kind, axes, hidden), (size, seconds) in _by_axis(reading).items()
        ],
    }
    if profile:
        made["profile"] = [part._asdict() for part in reading.dearest(profile)]
    return made
