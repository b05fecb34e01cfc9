"""An estimate before anything is compiled: parameters, the optimizer's state, and FLOPs over the peak."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np

from jaxtrain.config import MeshSection, RunConfig
from jaxtrain.observe.flops import train_flops
from jaxtrain.optim import make_optimizer
from jaxtrain.parallel.mesh import make_mesh, mesh_sizes
from jaxtrain.parallel.sharding import RULES
from jaxtrain.plan.batches import bundle_size
from jaxtrain.plan.target import Target
from jaxtrain.roles.declare import declare
from jaxtrain.types import Params


@dataclass(frozen=True)
class StateEstimate:
    """Bytes are those of a device that trains."""

    parameters: int  # how many there are
    trained: int
    mesh: dict[str, int]
    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    tokens: int  # of a step
    flops: float  # of a step, on all devices
    seconds: float | None  # of a step at the peak; None for a CPU

    @property
    def bytes(self) -> float:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def estimate(config: RunConfig, target: Target) -> StateEstimate:
    """The estimate of the update of `config`. Needs neither libtpu nor devices.

    Raises ValueError for a mesh whose sizes do not divide the devices.
    """
    kept = _kept_devices(config)
    sizes = mesh_sizes(config.mesh, target.devices - kept)
    model = config.model
    multiple = math.lcm(model.vocab_multiple, sizes["tensor"])
    alone = make_mesh(MeshSection(), jax.devices("cpu")[:1])
    # Options of another compiler would be refused here.
    changed = model.model_copy(update={"vocab_multiple": multiple, "compiler_options": {}})
    declared = declare(changed, alone, config.mesh.preset)
    shares = _shares(declared.model.axes(), config.mesh.preset, sizes)
    trained, frozen = declared.trained, declared.frozen
    tx = make_optimizer(config.optimizer, lambda step: 0.0, declared.trained_axes)  # type: ignore[arg-type, return-value]
    moments = jax.eval_shape(tx.init, trained)
    trained_bytes = _bytes(trained, shares)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trained))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments))
    length, rows = config.data.tokens_per_row(bundle_size(config)), _rows(config)
    one = np.ones((1, length), np.int32)
    flops = train_flops(declared.model.config, one, one.astype(np.float32), declared.model.lora) * rows
    devices = target.devices - kept
    return StateEstimate(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(declared.target)),
        trained=sum(leaf.size for leaf in jax.tree.leaves(trained)),
        mesh={axis: size for axis, size in sizes.items() if size > 1},
        parameter_bytes=trained_bytes + _bytes(frozen, shares),
        gradient_bytes=trained_bytes,
        optimizer_bytes=trained_bytes * held / max(total, 1),
        tokens=rows * length,
        flops=flops,
        seconds=flops / devices / target.peak if target.peak else None,
    )


def sample_rows(config: RunConfig) -> int:
    """Rows of all samples of a rollout, each as long as a row."""
    assert config.rl is not None
    return config.rl.prompts * config.rl.generations


def _rows(config: RunConfig) -> int:
    """Rows of one step."""
    if config.rl is None:
        return config.train.batch_size
    return -(-sample_rows(config) // config.rl.minibatches) * config.rl.updates


def _kept_devices(config: RunConfig) -> int:
    """Devices that hold models which are not trained."""
    placement = config.rl.placement if config.rl else None
    rollout = placement.rollout_devices if placement and placement.kind == "disjoint" else 0
    return max(rollout or 0, *(section.devices if section else 0 for section in (config.reference, config.teacher)))


def _shares(axes: Params, preset: str, sizes: dict[str, int]) -> dict[str, int]:
    """The number of devices that a parameter is split over, by its path."""
    rules = RULES[preset]

    def share(names: tuple[str | None, ...]) -> int:
        over = [rules.get(name) if name else None for name in names]
        flat = [axis for each in over for axis in ((each,) if isinstance(each, str) else each or ())]
        return math.prod(sizes[axis] for axis in flat)

    flat = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))[0]
    return {jax.tree_util.keystr(path): share(names) for path, names in flat}


def _bytes(tree: Params, shares: dict[str, int]) -> float:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return sum(leaf.size * leaf.dtype.itemsize / _share(jax.tree_util.keystr(path), shares) for path, leaf in flat)


def _share(path: str, shares: dict[str, int]) -> int:
    """Of the parameter at `path`, or that it is the quantised form of."""
    return next((share for known, share in shares.items() if path.startswith(known)), 1)
