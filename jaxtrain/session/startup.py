"""What a run prints before its first step: what is loaded, what is trained, on what, and where."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from jaxtrain.config import RunConfig
from jaxtrain.parallel.sharding import bytes_text, device_bytes
from jaxtrain.roles.role import TrainedRole


@runtime_checkable
class _HasRows(Protocol):
    """Training data that knows its length."""

    @property
    def epoch_rows(self) -> float: ...


class RunLength(NamedTuple):
    step: int  # after which it goes on
    num_steps: int
    row: int | None  # tokens of a packed row; None in recipes that pack otherwise


def start_facts(config: RunConfig, roles: Sequence[TrainedRole], data: Any, length: RunLength) -> list[tuple[str, str]]:
    """Names and texts. Reads no arrays."""
    mesh = roles[0].mesh
    resumed = f", resumed after step {length.step}" if length.step else ""
    facts = [("run", f"{config.recipe} in {config.run.dir}{resumed} (jaxtrain {version('jaxtrain')})")]
    facts += [("model" if role is roles[0] else role.name, _model_text(role)) for role in roles]
    facts += [(name, section.path) for name in ("teacher", "reference") if (section := getattr(config, name))]
    facts += [
        ("data", _data_text(config, data)),
        ("steps", _steps_text(config, length)),
        ("devices", _devices_text(mesh)),
        ("memory", _memory_text(roles)),
    ]
    return [(name, text) for name, text in facts if text]


def _model_text(role: TrainedRole) -> str:
    section, declared = role.section, role.declared
    leaves, trained = jax.tree.leaves(declared.target), jax.tree.leaves(declared.trained)
    total, some = (sum(leaf.size for leaf in each) for each in (leaves, trained))
    share = "all are trained" if some == total else f"{count_text(some)} ({some / total:.2%}) are trained"
    lora = f", LoRA of rank {section.lora.rank}" if section.lora else ""
    frozen = f", the others in {section.quantize}" if section.quantize else ""
    origin = section.path or "random weights"
    kind = declared.hf.get("model_type", "")
    return (
        f"{origin} ({kind}), {count_text(total)} parameters, {share}{lora}{frozen}; "
        f"{trained[0].dtype}, computed in {section.compute_dtype}"
    )


def _data_text(config: RunConfig, data: Any) -> str:
    paths = [str(source.path) for source in config.data.train_sources]
    named = paths[0] if len(paths) == 1 else f"{len(paths)} sources ({', '.join(paths)})"
    rows = f"{data.epoch_rows:,.0f} rows of " if isinstance(data, _HasRows) and math.isfinite(data.epoch_rows) else ""
    return rows + named


def _steps_text(config: RunConfig, length: RunLength) -> str:
    rl = config.rl
    if rl is not None:
        return (
            f"{length.num_steps:,} updates; {rl.updates} on each {rl.prompts} x {rl.generations} samples of up to "
            f"{rl.max_completion_length:,} tokens"
        )
    rows, tokens = config.train.batch_size, length.row
    if tokens is None:
        return f"{length.num_steps:,}"
    pieces = f" in {config.train.microbatches} pieces" if config.train.microbatches > 1 else ""
    return f"{length.num_steps:,} of {rows} rows x {tokens:,} tokens = {rows * tokens:,} tokens{pieces}"


def _devices_text(mesh: jax.sharding.Mesh) -> str:
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        + (f", mesh: {axes}" if axes else "")
        + processes
    )


def _memory_text(roles: Sequence[TrainedRole]) -> str:
    """Of one device; the gradients are as large as the trained parameters at the end of a backward pass."""
    parts: Counter[str] = Counter()
    for role in roles:
        state = role.abstract_state()
        parts["parameters"] += device_bytes(state.params) + device_bytes(role.declared.frozen)
        parts["optimizer"] += device_bytes(state.opt_state)
        parts["gradients"] += device_bytes(state.params)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {bytes_text(limit)}" if limit else ""
    texts = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
    return f"{bytes_text(sum(parts.values()))}{of} per device before activations ({texts})"


def count_text(count: int) -> str:
    """A number of parameters, to three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
