"""Import and export of LoRA adapters as PEFT folders: adapter_model.safetensors and adapter_config.json.

There is no separate weight table: the two factors of an adapter go through the ops of their kernel's row. `lora_a`
[*in, r] has the layout of a kernel with r outputs, `lora_b` [r, *out] that of one with r inputs, so the ops that map
the checkpoint's [out, in] to our kernel also map PEFT's `lora_A` [r, in] and `lora_B` [out, r] to ours.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.errors import CheckpointError, nearest
from converters.export_hf import UNCHANGED_TEXT, TrainedText, empty_folder, gather, write_text_files, written_aside
from converters.families.keys import Keys
from converters.families.registry import weight_rows
from converters.import_hf import ADAPTER_CONFIG, place, read_json_object
from converters.rows import Index, Shape, Tensor, Weight, bind, flatten, unflatten
from converters.safetensors_io import Checkpoint, Spec, check_folder, read_header, write_checkpoint
from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.types import Params

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # peft.LoraConfig (0.21)
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}

# Keys of adapter_config.json that change what an adapter computes, with the values that do not.
INERT_KEYS: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "arrow_config": (None,),
    "bias": (None, "none"),
    "corda_config": (None, {}),  # like the other starting points, it changes the base weights too
    "ensure_weight_tying": (None, False),
    "eva_config": (None, {}),
    "fan_in_fan_out": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None, []),
    "loftq_config": (None, {}),
    "lora_bias": (None, False),
    "lora_ga_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
# Keys that do not: what is read, what the names of the tensors tell as well, and how PEFT trains or loads.
KNOWN_KEYS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_pattern", "qalora_group_size"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "runtime_config"),
}


@dataclass(frozen=True)
class _Drop:
    """Insert `count` axes of size 1 at `at`: the kernel's layout has them, the factor does not."""

    at: int
    count: int

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return (*shape[: self.at], *[1] * self.count, *shape[self.at :])

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        return (*index[: self.at], *[slice(0, 1)] * self.count, *index[self.at :])

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        return block.reshape(shape)

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        return array.reshape(hf_shape)


def read_lora(folder: str | Path, config: ModelConfig) -> Lora:
    """The settings of the adapter in a PEFT folder, its targets derived from its tensors.

    Raises CheckpointError for a folder without an adapter, an adapter that is not a plain LoRA, a setting of the wrong
    type, and a tensor that belongs to no linear of the model.
    """
    keys = _read_config(Path(folder))
    rows = [row for row in _linears(config) if row.part is None]
    modules = {_module(row, layer): row for row in rows for layer in range(config.num_layers)}
    targets = {}
    with _open(Path(folder)) as checkpoint:
        for name in checkpoint.entries:
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
            if module not in modules:
                raise CheckpointError(
                    f"{folder}: adapter tensor {name} belongs to no linear of the model" + nearest(module, modules)
                )
            targets[_path(modules[module]).removeprefix("layers.")] = None
    if not targets:
        raise CheckpointError(f"{folder}: the adapter holds no tensor")
    return Lora(
        keys.size("r"), keys.number("lora_alpha"), keys.share("lora_dropout"), tuple(targets), keys.flag("use_rslora")
    )


def import_adapter(folder: str | Path, config: ModelConfig, target: Params) -> Params:
    """Read a PEFT folder into the tree of `target`: `lora_a` and `lora_b` as sharded `jax.ShapeDtypeStruct`s.

    Raises CheckpointError for a missing, unexpected or misshapen tensor.
    """
    leaves = flatten(target)
    tensors = list(_bind(config, {ours: leaf.shape for ours, leaf in leaves.items()}))
    with _open(Path(folder)) as checkpoint:
        expected = {tensor.name: tensor.shape for tensor in tensors}
        for name in sorted(expected.keys() ^ checkpoint.entries.keys()):
            fault = "lacks" if name in expected else "holds, in addition to those of model.lora.targets,"
            raise CheckpointError(f"{folder} {fault} adapter tensor {name}")
        for name, shape in expected.items():
            if checkpoint.entries[name].shape != shape:
                raise CheckpointError(
                    f"{folder}: adapter tensor {name} is {list(checkpoint.entries[name].shape)}, the model needs "
                    f"{list(shape)}"
                )
        return unflatten(
            {ours: place(checkpoint, leaf, [t for t in tensors if t.ours == ours]) for ours, leaf in leaves.items()}
        )


def export_adapter(
    adapters: Params,
    config: ModelConfig,
    lora: Lora,
    out: str | Path,
    base: str | None,
    *,
    tokenizer_from: str | Path | None = None,
    text: TrainedText = UNCHANGED_TEXT,
) -> Path:
    """Write `lora_a` and `lora_b` as a folder that `peft` loads onto the model at `base`. Returns the folder.

    The tokenizer's files, chat template and generation_config.json are those of the folder `tokenizer_from`, with the
    changes of `text`. Every process must call this. Raises CheckpointError if `out` is not empty, or if PEFT has no
    form for the adapters (those of experts, or of parts of a fused matrix).
    """
    folder, leaves = empty_folder(Path(out)), flatten(adapters)
    by_name = {t.name: t for t in _bind(config, {ours: leaf.shape for ours, leaf in leaves.items()})}
    specs = [Spec(name, np.dtype(leaves[t.ours].dtype), t.shape) for name, t in by_name.items()]

    def fetch(name: str) -> np.ndarray:
        tensor = by_name[name]
        return tensor.to_hf(gather(leaves[tensor.ours], tensor.stack))

    if jax.process_index() > 0:
        for spec in specs:
            fetch(spec.name)
        return folder
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": _target_modules(config, {ours.rpartition(".")[0] for ours in leaves}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with written_aside(folder) as partial:
        write_checkpoint(partial, {WEIGHTS: specs}, fetch)
        (partial / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if tokenizer_from is not None:
            write_text_files(partial, {}, tokenizer_from, text)
    return folder


def _bind(config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[Tensor]:
    """PEFT's tensors of the factors of `shapes`, by dotted path."""
    rows = {_path(row): row for row in _linears(config)}
    for path in dict.fromkeys(ours.rpartition(".")[0] for ours in shapes):
        if path not in rows:
            raise CheckpointError(f"PEFT has no place for the adapter of {path}: in transformers it is no linear")
        a, b = shapes[f"{path}.lora_a"], shapes[f"{path}.lora_b"]
        rank, inputs, outputs = a[-1], math.prod(a[1:-1]), math.prod(b[2:])
        drops = {"lora_a": _Drop(len(a) - 1, len(b) - 3), "lora_b": _Drop(1, len(a) - 3)}
        wanted = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}
        for factor, theirs in _FACTORS.items():
            row, ours = rows[path], f"{path}.{factor}"
            name = f"{_PREFIX}{row.hf.removesuffix('.weight')}.{theirs}.weight"
            for tensor in bind([Weight(ours, name, (*row.ops, drops[factor]))], {ours: shapes[ours]}, config):
                if row.part or tensor.shape != wanted[factor]:
                    raise CheckpointError(
                        f"PEFT has no place for the adapter of {path}: in transformers it is part of another matrix "
                        f"({row.hf})"
                    )
                yield tensor


def _linears(config: ModelConfig) -> list[Weight]:
    """The rows of the matrices that are linear modules of every layer."""
    return [
        row
        for row in weight_rows(config)
        if row.ours.startswith("layers.")
        and row.ours.endswith(".kernel")
        and row.hf.endswith(".weight")
        and [field for _, field, _, _ in string.Formatter().parse(row.hf) if field] == ["layer"]
    ]


def _path(row: Weight) -> str:
    return row.ours.removesuffix(".kernel")


def _module(row: Weight, layer: int) -> str:
    return row.hf.removesuffix(".weight").format(layer=layer)


def _target_modules(config: ModelConfig, adapted: set[str]) -> list[str]:
    """Module names without their parents where those are unambiguous, as is usual with PEFT; else with one parent."""
    names: dict[str, list[tuple[str, bool]]] = {}
    for row in _linears(config):
        module = _module(row, 0)
        names.setdefault(module.rpartition(".")[2], []).append((module, _path(row) in adapted))
    found = []
    for last, rows in names.items():
        if all(is_adapted for _, is_adapted in rows):
            found.append(last)
        else:
            found += [".".join(module.split(".")[-2:]) for module, is_adapted in rows if is_adapted]
    return sorted(found)


def _read_config(folder: Path) -> Keys:
    check_folder(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a PEFT folder: it holds no {ADAPTER_CONFIG}")
    file = folder / ADAPTER_CONFIG
    hf = read_json_object(file)
    if hf.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type={hf.get('peft_type')} is not supported; only LORA is")
    for key, value in hf.items():
        if key not in KNOWN_KEYS and value not in INERT_KEYS.get(key, (None, False, [], {})):
            harmless = f"; only {INERT_KEYS[key][-1]!r} is" if key in INERT_KEYS else ": the key is not known"
            raise CheckpointError(f"{file}: {key}={value!r} is not supported{harmless}")
    optional = ("lora_dropout", "use_rslora")
    given = {key: hf[key] for key in _DEFAULTS if key in hf and not (key in optional and hf[key] is None)}
    return Keys(given, _DEFAULTS, file=str(file))


def _open(folder: Path) -> Checkpoint:
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}")
    return Checkpoint(folder, read_header(folder / WEIGHTS))
