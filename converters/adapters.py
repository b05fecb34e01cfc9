"""Import and export of LoRA adapters as PEFT folders: adapter_model.safetensors and adapter_config.json.

Parameters that are trained in full beside the adapters are PEFT's `modules_to_save`.

There is no separate weight table: the two factors of an adapter go through the ops of their kernel's row. `lora_a`
[*in, r] has the layout of a kernel with r outputs, `lora_b` [r, *out] that of one with r inputs, so the ops that map
the checkpoint's [out, in] to our kernel also map PEFT's `lora_A` [r, in] and `lora_B` [out, r] to ours.
"""

import json
import math
import re
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.errors import ConversionError
from converters.export_hf import UNCHANGED_TEXT, TrainedText, empty_folder, gather, temporary_folder, write_text_files
from converters.families.keys import ConfigKeys
from converters.families.registry import weight_rows
from converters.import_hf import ADAPTER_CONFIG, check_alias, place
from converters.json_files import read_json_object
from converters.safetensors_io import Checkpoint, TensorSpec, check_folder, read_header, write_checkpoint
from converters.weight_rows import Drop, Shape, Tensor, Weight, bind, flatten, unflatten
from jaxtrain.hub import local_folder
from jaxtrain.named import did_you_mean
from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.types import Params

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # peft.LoraConfig (0.21)
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_MODULE_PARTS = (".weight", ".bias")

# Keys of adapter_config.json that change what an adapter computes, with the values that do not.
INERT_KEYS: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "arrow_config": (None,),
    "bias": (None, "none"),
    "corda_config": (None, {}),  # like the other initializations, it changes the base weights too
    "eva_config": (None, {}),
    "fan_in_fan_out": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None, []),
    "loftq_config": (None, {}),
    "lora_bias": (None, False),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
# Keys that do not: those that are read, those that follow from the tensor names, and how PEFT trains or loads.
KNOWN_KEYS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_pattern", "qalora_group_size"),
    *("modules_to_save", "ensure_weight_tying"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "runtime_config"),
}


def read_lora(folder: str | Path, config: ModelConfig) -> Lora:
    """The settings of the adapter in a PEFT folder, its targets and full paths derived from its tensors.

    Raises ConversionError for a folder without an adapter, an adapter that is not a plain LoRA, a setting of the wrong
    type, a tensor that belongs to no linear module of the model and to none of `modules_to_save`, and a module of these
    without a tensor.
    """
    hf, keys = _read_config(local_folder(folder))
    saved = _saved_modules(hf, folder)
    tied = ["lm_head"] if config.tied and hf.get("ensure_weight_tying") else []  # PEFT saves it with the embedding
    rows = [row for row in _linears(config) if row.part is None]
    modules = {_module(row, layer): row for row in rows for layer in range(config.num_layers)}
    targets, full, used = {}, {}, set()
    with _open(local_folder(folder)) as checkpoint:
        for name in checkpoint.entries:
            if ".lora_" not in name:
                ours, holders = _full_path(name.removeprefix(_PREFIX), [*saved, *tied], config)
                if ours is None:
                    raise ConversionError(
                        f"{folder}: tensor {name} belongs to no linear module of the model and to no module of "
                        f"modules_to_save={saved}"
                    )
                full[ours] = None
                used |= holders
                continue
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
            if module not in modules:
                raise ConversionError(
                    f"{folder}: adapter tensor {name} belongs to no linear module of the model"
                    + did_you_mean(module, modules)
                )
            targets[_path(modules[module]).removeprefix("layers.")] = None
    if not targets:
        raise ConversionError(f"{folder}: the adapter holds no tensors")
    if unused := sorted(set(saved) - used):
        raise ConversionError(f"{folder}: modules_to_save names {unused[0]}, of which the folder holds no tensor")
    return Lora(
        keys.size("r"),
        keys.number("lora_alpha"),
        keys.share("lora_dropout"),
        tuple(targets),
        keys.flag("use_rslora"),
        full_paths=tuple(full),
    )


def import_adapter(folder: str | Path, config: ModelConfig, target: Params) -> Params:
    """Read a PEFT folder into the tree of `target`: `lora_a`, `lora_b` and the parameters that are trained in full, as
    sharded `jax.ShapeDtypeStruct`s.

    Raises ConversionError for a missing, unexpected or misshapen tensor, and for a tied head that differs from the
    embedding.
    """
    leaves = flatten(target)
    tensors = list(_bind(config, {ours: leaf.shape for ours, leaf in leaves.items()}))
    keeps_tie = _read_config(local_folder(folder))[0].get("ensure_weight_tying")
    with _open(local_folder(folder)) as checkpoint:
        if keeps_tie:
            tensors = [t for t in tensors if not t.alias or t.name in checkpoint.entries]
        expected = {tensor.name: tensor.shape for tensor in tensors}
        for name in sorted(expected.keys() ^ checkpoint.entries.keys()):
            fault = "lacks" if name in expected else "holds, in addition to those of model.lora.targets,"
            tied = next((f"; {t.ours} is both embedding and head" for t in tensors if t.name == name and t.alias), "")
            raise ConversionError(f"{folder} {fault} adapter tensor {name}{tied}")
        for name, shape in expected.items():
            if checkpoint.entries[name].shape != shape:
                raise ConversionError(
                    f"{folder}: adapter tensor {name} is {list(checkpoint.entries[name].shape)}, the model needs "
                    f"{list(shape)}"
                )
        own = {ours: [t for t in tensors if t.ours == ours and not t.alias] for ours in leaves}
        for alias in (t for t in tensors if t.alias):
            check_alias(checkpoint, alias, own[alias.ours][0])
        return unflatten({ours: place(checkpoint, leaf, own[ours]) for ours, leaf in leaves.items()})


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
    """Write the trained parameters as a folder that `peft` loads onto the model at `base`. Returns the folder.

    They are `lora_a`, `lora_b` and `lora.full_paths`. A tied embedding is written twice, since PEFT unties its copies.

    The tokenizer's files, chat template and generation_config.json are those of the folder `tokenizer_from`, with the
    changes of `text`. Every process must call this. Raises ConversionError if `out` is not empty, or if PEFT cannot
    represent the parameters (those of experts, or of parts of a fused matrix).
    """
    folder, leaves = empty_folder(Path(out)), flatten(adapters)
    by_name = {t.name: t for t in _bind(config, {ours: leaf.shape for ours, leaf in leaves.items()})}
    specs = [TensorSpec(name, np.dtype(leaves[t.ours].dtype), t.shape) for name, t in by_name.items()]

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
        "target_modules": _target_modules(
            config, {ours.rpartition(".")[0] for ours in leaves if ours.rpartition(".")[2] in _FACTORS}
        ),
        "modules_to_save": _names_of_saved(
            {_hf_module(t.name) for t in by_name.values() if t.ours in lora.full_paths}, config
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with temporary_folder(folder) as partial:
        write_checkpoint(partial, {WEIGHTS: specs}, fetch)
        (partial / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if tokenizer_from is not None:
            write_text_files(partial, {}, tokenizer_from, text)
    return folder


def _bind(config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[Tensor]:
    """PEFT's tensors of the factors and full parameters of `shapes`, by dotted path."""
    factors = [ours for ours in shapes if ours.rpartition(".")[2] in _FACTORS]
    full = {ours: shape for ours, shape in shapes.items() if ours not in factors}
    named = [row for row in weight_rows(config) if row.ours in full and (config.tied or not row.alias)]
    for tensor in bind(named, full, config):
        if tensor.slot or not tensor.name.endswith(_MODULE_PARTS):
            raise ConversionError(
                f"PEFT cannot represent {tensor.ours}: in transformers it is not a module of its own ({tensor.name})"
            )
        yield replace(tensor, name=f"{_PREFIX}{tensor.name}")
    rows = {_path(row): row for row in _linears(config)}
    for path in dict.fromkeys(ours.rpartition(".")[0] for ours in factors):
        if path not in rows:
            raise ConversionError(
                f"PEFT cannot represent the adapter of {path}: transformers has no linear module for it"
            )
        a, b = shapes[f"{path}.lora_a"], shapes[f"{path}.lora_b"]
        rank, inputs, outputs = a[-1], math.prod(a[1:-1]), math.prod(b[2:])
        drops = {"lora_a": Drop(len(a) - 1, len(b) - 3), "lora_b": Drop(1, len(a) - 3)}
        wanted = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}
        for factor, theirs in _FACTORS.items():
            row, ours = rows[path], f"{path}.{factor}"
            name = f"{_PREFIX}{row.hf.removesuffix('.weight')}.{theirs}.weight"
            for tensor in bind([Weight(ours, name, (*row.ops, drops[factor]))], {ours: shapes[ours]}, config):
                if row.part or tensor.shape != wanted[factor]:
                    raise ConversionError(
                        f"PEFT cannot represent the adapter of {path}: in transformers it is part of a fused matrix "
                        f"({row.hf})"
                    )
                yield tensor


def _full_path(name: str, saved: Collection[str], config: ModelConfig) -> tuple[str | None, set[str]]:
    """The parameter of a tensor that is of the modules `saved`, or None; and which of these hold it.

    PEFT matches their names by the ends of modules' names, and saves all that is in a module.
    """
    parts = _hf_module(name).split(".")
    modules = [".".join(parts[: end + 1]) for end in range(len(parts))]
    holders = {each for each in saved if any(module.endswith(each) for module in modules)}
    absent = ("value_head.", "lm_head.") if config.tied else ("value_head.",)
    rows = (row for row in weight_rows(config) if not row.ours.startswith(absent) and (config.tied or not row.alias))
    found = next(
        (row.ours for row in rows if re.fullmatch(re.sub(r"\\{\w+\\}", r"\\d+", re.escape(row.hf)), name)), None
    )
    return (found if holders else None), holders


def _saved_modules(hf: Mapping[str, Any], folder: str | Path) -> list[str]:
    saved = hf.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ConversionError(f"{folder}: {ADAPTER_CONFIG}: modules_to_save must be a list of names, not {saved!r}")
    return saved


def _names_of_saved(saved: set[str], config: ModelConfig) -> list[str] | None:
    """Names that PEFT, which compares ends, matches with these modules alone: the last part, or else the full name."""
    layers = range(config.num_layers)
    known = {_hf_module(row.hf.replace("{layer}", str(layer))) for row in weight_rows(config) for layer in layers}
    names = set()
    for module in saved:
        last = module.rpartition(".")[2]
        names.add(last if all(other in saved for other in known if other.endswith(last)) else module)
    return sorted(names) or None


def _hf_module(tensor: str) -> str:
    """The module of a tensor of transformers or PEFT."""
    return tensor.removeprefix(_PREFIX).rpartition(".")[0]


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
    """Module names without their parents if unambiguous, as is usual with PEFT; else with one parent."""
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


def _read_config(folder: Path) -> tuple[dict[str, Any], ConfigKeys]:
    """adapter_config.json, and the keys of it that have defaults."""
    check_folder(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConversionError(f"{folder} is not a PEFT folder: it holds no {ADAPTER_CONFIG}")
    file = folder / ADAPTER_CONFIG
    hf = read_json_object(file)
    if hf.get("peft_type") != "LORA":
        raise ConversionError(f"{file}: peft_type={hf.get('peft_type')} is not supported; only LORA is")
    for key, value in hf.items():
        if key not in KNOWN_KEYS and value not in INERT_KEYS.get(key, (None, False, [], {})):
            harmless = f"; only {INERT_KEYS[key][-1]!r} is" if key in INERT_KEYS else ": the key is unknown"
            raise ConversionError(f"{file}: {key}={value!r} is not supported{harmless}")
    optional = ("lora_dropout", "use_rslora")
    given = {key: hf[key] for key in _DEFAULTS if key in hf and not (key in optional and hf[key] is None)}
    return hf, ConfigKeys(given, _DEFAULTS, file=str(file))


def _open(folder: Path) -> Checkpoint:
    if not (folder / WEIGHTS).is_file():
        raise ConversionError(f"{folder} holds no {WEIGHTS}")
    return Checkpoint(folder, read_header(folder / WEIGHTS))
