"""`plan`: lowers the programs of a run, compiles them for devices that need not be there, and reads what was made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.import_hf import read_config
from jaxtrain.config import RunConfig
from jaxtrain.ops.gpu.described import hopper_gpus
from jaxtrain.parallel.mesh import compiler_options
from jaxtrain.parallel.sharding import device_bytes
from jaxtrain.plan.compile import Compiled, compile_program, save_program
from jaxtrain.plan.estimate import StateEstimate, estimate
from jaxtrain.plan.hlo import Module
from jaxtrain.plan.prices import Gpu
from jaxtrain.plan.programs import Program, data_programs, without_weights
from jaxtrain.plan.reading import Reading, Setting, read_tpu
from jaxtrain.plan.reading_gpu import read_gpu
from jaxtrain.plan.report import Phase, RunPlan
from jaxtrain.plan.rl_programs import SAMPLING, rl_programs
from jaxtrain.plan.target import Target, parse_target, target_devices
from jaxtrain.plan.transfer import WeightTransfer, weight_transfer
from jaxtrain.rl.placement import sampling_meshes

_PASSING = ("batch", "merged parameters")  # inputs that are in memory only for their programs
_OF_ENGINE = ("engine's parameters", "cache")


def plan(
    config: RunConfig,
    on: str,
    *,
    slices: int = 1,
    price: float | None = None,
    save: Path | None = None,
    compiled: bool = True,
    first: Callable[[Target, StateEstimate], None] | None = None,
) -> RunPlan:
    """What the run of `config` would need and how fast it would be.

    Args:
        config: Its model's weights are not read: config.json is enough.
        on: The devices: v5p:4x4x8, v5e:8x8, v6e:16x16, tpu7x:4x4x4, h100:8, h200:8 or cpu:8.
        slices: TPU slices of this size, combined along "data".
        price: Of a chip and hour, for the cost of the run.
        save: A folder for the HLO of every program and a JSON file about it.
        compiled: False: only the estimate, which takes a second.
        first: Called with the estimate before the compilation.

    Raises ValueError for devices that are unknown or that cannot be compiled for, a config that does not fit them, and
    a kernel that has no price.
    """
    target = parse_target(on, slices)
    config = without_weights(config)
    devices = target_devices(target) if target.chip is None else None  # before JAX makes a CPU device of its own
    found = estimate(config, target)
    if first is not None:
        first(target, found)
    made = RunPlan(config.recipe, target, found, price=price, steps=config.train.steps)
    if not compiled:
        return made
    devices = devices or target_devices(target)
    with hopper_gpus() if isinstance(target.chip, Gpu) else contextlib.nullcontext():
        programs = (data_programs if config.rl is None else rl_programs)(config, devices)
        compilations = [_compiled(program, target, config) for program in programs]
    if save is not None:
        for program, each in zip(programs, compilations, strict=True):
            _save(program, each, config, target, save)
    phased = config.rl is not None and config.rl.placement.memory == "phased"
    phases = [
        Phase(program, each, _read(program, each, target), beside(program, programs, phased=phased))
        for program, each in zip(programs, compilations, strict=True)
    ]
    sent = None if config.rl is None else _transfer(config, programs, target, devices)
    copied = _host_seconds(programs, target) if phased else 0.0
    return replace(made, phases=phases, step_tokens=_trained_tokens(config, phases), transfer=sent, host_seconds=copied)


def _transfer(
    config: RunConfig, programs: Sequence[Program], target: Target, devices: Sequence[Any]
) -> WeightTransfer | None:
    assert config.rl is not None
    by_name = {program.name: program for program in programs}
    engines = sampling_meshes(config.rl.placement, config.mesh, by_name["update"].mesh, devices)
    return weight_transfer(by_name, len(engines), target)


def _trained_tokens(config: RunConfig, phases: Sequence[Phase]) -> int:
    """Of a step: with recipe rl those of a pass over the samples."""
    (update,) = (phase.program for phase in phases if phase.program.name == "update")
    return update.tokens * (config.rl.minibatches if config.rl else 1)


def _compiled(program: Program, target: Target, config: RunConfig) -> Compiled:
    name = f"{target.kind} {target.name} {target.slices}"
    return compile_program(
        program.lowered, name, compiler_options(program.mesh, tuple(config.model.compiler_options.items()))
    )


def beside(program: Program, programs: Sequence[Program], *, phased: bool) -> dict[str, int]:
    """Bytes of what other programs read and is on the same devices meanwhile.

    `phased`: by `rl.placement.memory`, optimizers wait on the host while an engine samples, and there is no engine
    while roles train or score. The engine's weights are the outputs of its own "reshard".
    """
    mine = set(program.mesh.devices.flat)
    found: dict[str, int] = {}
    for other in programs:
        if mine & set(other.mesh.devices.flat):
            found |= {
                kind: device_bytes(tree)
                for kind, tree in other.inputs.items()
                if kind not in program.inputs and kind not in _PASSING
            }
    if phased:
        with_optimizer, with_engine = program.name not in SAMPLING, program.name in ("prefill", "decode")
        found = {
            kind: size
            for kind, size in found.items()
            if (with_optimizer or not kind.endswith("optimizer")) and (with_engine or kind not in _OF_ENGINE)
        }
    return {kind: size for kind, size in found.items() if size}


def _host_seconds(programs: Sequence[Program], target: Target) -> float | None:
    """Of a step: what the optimizers' states take to the host and back. None for a CPU."""
    if target.chip is None:
        return None
    kinds = {kind: tree for program in programs for kind, tree in program.inputs.items() if kind.endswith("optimizer")}
    return 2 * sum(device_bytes(tree) for tree in kinds.values()) / target.chip.host_link


def _read(program: Program, made: Compiled, target: Target) -> Reading | None:
    if target.chip is None or target.peak is None or made.refused:
        return None
    read = read_gpu if isinstance(target.chip, Gpu) else read_tpu
    network = target.network(program.mesh)
    setting = Setting(target.chip, target.peak, network, program.trips, program.never, program.grouped_rows)
    return read(Module(made.text), setting)


def _save(program: Program, made: Compiled, config: RunConfig, target: Target, folder: Path) -> None:
    origin = config.model.config if config.model.path is None else config.model.path
    assert origin is not None
    _, hf = read_config(origin)
    rows = max(program.rows, 1)
    lora = config.model.lora
    case: Mapping[str, Any] = {
        "model": str(config.model.path or hf.get("model_type", "model")).rstrip("/").split("/")[-1].lower(),
        "hf": hf,
        "topology": target.name,
        "rows": rows,
        "length": program.tokens // rows,
        "microbatches": config.train.microbatches if program.name == "update" else 1,
        "remat": config.model.remat,
        "kind": {"update": "sft", "critic update": "sft"}.get(program.name, program.name),
        "model_section": {"lora": {"rank": lora.rank or 16}} if lora else {},
    }
    about = {
        "case": case,
        "name": program.name,
        "device_kind": target.kind,
        "n": program.mesh.size,
        "mesh": {str(axis): size for axis, size in program.mesh.shape.items()},
    }
    save_program(made, folder, program.name.replace(" ", "-"), about)
