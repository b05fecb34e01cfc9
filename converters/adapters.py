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
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from converters.adapter_config import MERGE, AdapterSettings, read_settings
from converters.errors import ConversionError
from converters.export_hf import UNCHANGED_TEXT, TrainedText, empty_folder, gather, temporary_folder, write_text_files
from converters.families.registry import weight_rows
from converters.import_hf import ADAPTER_CONFIG, check_alias, place
from converters.safetensors_io import Checkpoint, TensorSpec, read_header, write_checkpoint
from converters.weight_rows import Drop, PadVocab, Shape, Tensor, Weight, bind, flatten, full_index, unflatten
from jaxtrain.hub import local_folder
from jaxtrain.named import did_you_mean
from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.types import Params

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_MODULE_PARTS = (".weight", ".bias")


@dataclass(frozen=True)
class _PadRank(PadVocab):
    """Pad a factor of rank `rank`, on `axis` of the checkpoint's layout, with zeros, and multiply it by `factor`.

    The ranks of zeros have no gradient, so that they stay zeros: training is that of the smaller rank.
    """

    rank: int
    factor: float

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return (*shape[: self.axis], self.rank, *shape[self.axis + 1 :])

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        scaled = block if self.factor == 1 else block.astype(np.float32) * np.float32(self.factor)
        return super().to_ours(scaled, shape)


def read_lora(folder: str | Path, config: ModelConfig) -> Lora:
    """The settings of the adapter in a PEFT folder, its targets and full paths derived from its tensors.

    With a `rank_pattern` the rank is the largest one; see `import_adapter`.

    Raises ConversionError for a folder without an adapter, an adapter that is not a plain LoRA, a setting of the wrong
    type, a tensor that belongs to no linear module of the model and to none of `modules_to_save`, and a module of these
    without a tensor.
    """
    settings = read_settings(local_folder(folder))
    tied = ["lm_head"] if config.tied and settings.keeps_tie else []  # PEFT saves it with the embedding
    modules: dict[str, list[str]] = {}
    for row in _linears(config):
        for layer in config.layers_of(row.ours.split(".")[1]):
            modules.setdefault(_module(row, layer), []).append(_path(row).removeprefix("layers."))
    targets, full, ranks, used = {}, {}, set(), set()
    with _open(local_folder(folder)) as checkpoint:
        for name in checkpoint.entries:
            if ".lora_" not in name:
                ours, holders = _full_path(name.removeprefix(_PREFIX), [*settings.saved, *tied], config)
                if ours is None:
                    raise ConversionError(
                        f"{folder}: tensor {name} belongs to no linear module of the model and to no module of "
                        f"modules_to_save={settings.saved}. {MERGE}"
                    )
                full[ours] = None
                used |= holders
                continue
            module = _adapted_module(name)
            if module not in modules:
                raise ConversionError(
                    f"{folder}: adapter tensor {name} belongs to no linear module of the model's layers"
                    f"{did_you_mean(module, modules)}. {MERGE}"
                )
            targets |= dict.fromkeys(modules[module])
            ranks.add(settings.rank_of(module))
    if not targets:
        raise ConversionError(f"{folder}: the adapter holds no tensors")
    if unused := sorted(set(settings.saved) - used):
        raise ConversionError(f"{folder}: modules_to_save names {unused[0]}, of which the folder holds no tensor")
    rank = max(ranks)
    return Lora(
        rank, settings.alpha_for(rank), settings.dropout, tuple(targets), settings.rslora, full_paths=tuple(full)
    )


def import_adapter(folder: str | Path, config: ModelConfig, target: Params) -> Params:
    """Read a PEFT folder into the tree of `target`: `lora_a`, `lora_b` and the parameters that are trained in full, as
    sharded `jax.ShapeDtypeStruct`s.

    Adapters of a smaller rank are padded with zeros, and where `alpha_pattern` or `rank_pattern` gives a module another
    scale, its `lora_b` is multiplied by the quotient of the two. Both factors of a module without an adapter are zero,
    so that it stays without one. The parts of a fused matrix get its `lora_A` each, and their rows of its `lora_B`.

    Raises ConversionError for a missing, unexpected or misshapen tensor, and for a tied head that differs from the
    embedding.
    """
    leaves, settings = flatten(target), read_settings(local_folder(folder))
    bound = list(_bind(config, {ours: leaf.shape for ours, leaf in leaves.items()}))
    with _open(local_folder(folder)) as checkpoint:
        tensors = []
        for tensor in bound:
            stored = tensor.name in checkpoint.entries
            if ".lora_" in tensor.name:
                module = _adapted_module(tensor.name)
                if stored or settings.adapts(module, tensor.layers[tensor.stack[0]]):
                    tensors.append(_with_own_rank(tensor, module, settings))
            elif stored or not (tensor.alias and settings.keeps_tie):
                tensors.append(tensor)
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


def _adapted_module(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")


def _with_own_rank(tensor: Tensor, module: str, settings: AdapterSettings) -> Tensor:
    """A factor of our rank as one of the module's rank in the folder."""
    is_a, rank = tensor.name.endswith(".lora_A.weight"), settings.rank_of(module)
    axis, factor = (0, 1.0) if is_a else (1, settings.scale_of(module) / settings.scale)
    if rank == tensor.shapes[0][axis] and factor == 1:
        return tensor
    if rank > tensor.shapes[0][axis]:
        raise ConversionError(
            f"{settings.file}: {module} has rank {rank}, the model's adapters have {tensor.shapes[0][axis]}"
        )
    shape = (*tensor.shapes[0][:axis], rank, *tensor.shapes[0][axis + 1 :])
    return replace(tensor, ops=(_PadRank(axis, rank, factor), *tensor.ops), shapes=(shape, *tensor.shapes))


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
    The adapters of the parts of a fused matrix become one: its `lora_A` has the ranks of all parts, and each part's
    rows of `lora_B` are zero but for its own ranks.

    The tokenizer's files, chat template and generation_config.json are those of the folder `tokenizer_from`, with the
    changes of `text`. Every process must call this. Raises ConversionError if `out` is not empty, or if PEFT cannot
    represent the parameters (those of experts).
    """
    folder, leaves = empty_folder(Path(out)), flatten(adapters)
    by_name: dict[str, list[Tensor]] = {}
    for tensor in _bind(config, {ours: leaf.shape for ours, leaf in leaves.items()}):
        by_name.setdefault(tensor.name, []).append(tensor)
    specs = [
        TensorSpec(name, np.dtype(leaves[parts[0].ours].dtype), _joined_shape(parts)) for name, parts in by_name.items()
    ]

    def fetch(name: str) -> np.ndarray:
        return _joined(
            by_name[name], [tensor.to_hf(gather(leaves[tensor.ours], tensor.stack)) for tensor in by_name[name]]
        )

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
        **_fused_ranks(by_name, lora),
        "modules_to_save": _names_of_saved(
            {_hf_module(name) for name, (part, *_) in by_name.items() if part.ours in lora.full_paths}, config
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
    named = [row for row in _rows(config) if row.ours in full]
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
            part = row.part if factor == "lora_b" else None
            weight = Weight(ours, name, (*row.ops, drops[factor]), part=part)
            for tensor in bind([weight], {ours: shapes[ours]}, config):
                if tensor.shapes[0] != wanted[factor] or (tensor.slot and tensor.slot.axis != 0):
                    raise ConversionError(
                        f"PEFT cannot represent the adapter of {path}: it is not a matrix of transformers ({row.hf})"
                    )
                yield tensor


def _rows(config: ModelConfig) -> list[Weight]:
    """The rows of what transformers has as modules of its own; the second name of a tied embedding is one."""
    return [row for row in weight_rows(config) if not row.alias or (config.tied and row.ours == "embed.weight")]


def _joined_shape(parts: list[Tensor]) -> Shape:
    """The shape of PEFT's factor of a fused matrix, of those of its parts."""
    count = len(parts)
    if count == 1 and parts[0].slot is None:
        return parts[0].shape
    rows, columns = parts[0].shape
    return (rows, columns * count) if parts[0].slot else (rows * count, columns)


def _joined(parts: list[Tensor], arrays: list[np.ndarray]) -> np.ndarray:
    if parts[0].slot is None:  # each part has its own ranks
        return np.concatenate(arrays)
    joined, rank = np.zeros(_joined_shape(parts), arrays[0].dtype), arrays[0].shape[1]
    for number, (part, array) in enumerate(zip(parts, arrays, strict=True)):
        assert part.slot is not None
        rows, _ = part.slot.place(full_index(array.shape))
        joined[rows, number * rank : (number + 1) * rank] = array
    return joined


def _fused_ranks(by_name: Mapping[str, list[Tensor]], lora: Lora) -> dict[str, dict[str, float]]:
    """`rank_pattern` and `alpha_pattern` of fused matrices, whose rank is that of all of their adapted parts."""
    counts = {_adapted_module(name).rpartition(".")[2]: len(parts) for name, parts in by_name.items() if parts[0].slot}
    counts = {name: count for name, count in counts.items() if count > 1}
    return {
        "rank_pattern": {name: lora.rank * count for name, count in counts.items()},
        "alpha_pattern": {name: lora.alpha * (count**0.5 if lora.rslora else count) for name, count in counts.items()},
    }


def _full_path(name: str, saved: Collection[str], config: ModelConfig) -> tuple[str | None, set[str]]:
    """The parameter of a tensor that is of the modules `saved`, or None; and which of these hold it.

    PEFT matches their names by the ends of modules' names, and saves all that is in a module.
    """
    parts = _hf_module(name).split(".")
    modules = [".".join(parts[: end + 1]) for end in range(len(parts))]
    holders = {each for each in saved if any(module.endswith(each) for module in modules)}
    absent = ("value_head.", "lm_head.") if config.tied else ("value_head.",)
    rows = (row for row in _rows(config) if not row.ours.startswith(absent))
    found = next(
        (row.ours for row in rows if re.fullmatch(re.sub(r"\\{\w+\\}", r"\\d+", re.escape(row.hf)), name)), None
    )
    return (found if holders else None), holders


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
    names: dict[str, dict[str, list[bool]]] = {}
    for row in _linears(config):
        module = _module(row, 0)
        names.setdefault(module.rpartition(".")[2], {}).setdefault(module, []).append(_path(row) in adapted)
    found = []
    for last, modules in names.items():
        if all(any(parts) for parts in modules.values()):
            found.append(last)
        else:
            found += [".".join(module.split(".")[-2:]) for module, parts in modules.items() if any(parts)]
    return sorted(found)


def _open(folder: Path) -> Checkpoint:
    if not (folder / WEIGHTS).is_file():
        raise ConversionError(f"{folder} holds no {WEIGHTS}")
    return Checkpoint(folder, read_header(folder / WEIGHTS))
