"""Writes a trained language model back into a folder with the other models that it was read beside."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.export_hf import copy_files, empty_folder, temporary_folder
from converters.families.registry import weight_rows
from converters.import_hf import bind_checkpoint, read_config, with_aliases_resolved
from converters.json_files import read_json_object
from converters.quantization import QUANTIZATION
from converters.safetensors_io import STORED, Checkpoint, TensorSpec, open_checkpoint, plan_files, write_checkpoint
from converters.towers import has_section, text_config, tower_of, unused_prefixes
from converters.weight_rows import Tensor, bind, by_name, flatten, fuse
from jaxtrain.types import Params

_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_NAMES = ("architectures", "model_type")


def has_towers(folder: Path) -> bool:
    """Whether a folder holds other models beside a language model."""
    return tower_of(read_json_object(folder / "config.json")) is not None


def has_others(folder: Path) -> bool:
    """Whether a folder holds other models, or layers of multi-token prediction, beside a language model."""
    declared = unused_prefixes(read_json_object(folder / "config.json"))
    return has_towers(folder) or (bool(declared) and bool(open_checkpoint(folder).others))


def export_towers(text: Path, source: Path, out: Path, target: Params, *, max_shard_bytes: int) -> Path:
    """Write the folder `source` with its language model replaced by that of the folder `text`, which `export_hf` wrote
    of it. `target` is the parameter tree of the latter, of which only shapes are used. Returns `out`.

    Tensors have the names of `source`, also where it stores experts in another way than `text`; those of other models
    are copied bit for bit. Of config.json only what changed in the language model is changed.
    Raises ConversionError if `out` is not empty.
    """
    empty_folder(out)
    with open_checkpoint(source) as base, open_checkpoint(text) as trained, temporary_folder(out) as partial:
        assert base.names is not None
        read = _in_layout(trained, base, target)
        own = {base.names.stored(name): parts for name, parts in read.items()}
        specs = [TensorSpec(name, trained.dtype(parts[0][1][0].name), parts[0][0].shape) for name, parts in own.items()]
        for name, entry in base.others.items():
            if entry.dtype not in STORED:
                raise ConversionError(f"{entry.file}: tensor {name} is {entry.dtype}, which cannot be written")
            specs.append(TensorSpec(name, STORED[entry.dtype], entry.shape))

        def fetch(name: str) -> np.ndarray:
            return _joined(trained, own[name]) if name in own else base.read_other(name)

        write_checkpoint(partial, plan_files(specs, max_shard_bytes), fetch)
        config = _with_text_config(read_json_object(source / "config.json"), read_json_object(text / "config.json"))
        (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        copy_files(source, partial, _FILES)
        written = {"config.json", *(file.name for file in text.glob("*.safetensors*"))}
        copy_files(text, partial, sorted(file.name for file in text.iterdir() if file.name not in written))
    return out


_Parts = list[tuple[Tensor, list[Tensor]]]
"""Of a tensor of the output each part, with the tensors that hold its values in the trained folder."""


def _in_layout(trained: Checkpoint, base: Checkpoint, target: Params) -> dict[str, _Parts]:
    """The tensors of `trained` in the layout of `base`, by the family's names."""
    config, _ = read_config(trained.folder)
    shapes = {ours: leaf.shape for ours, leaf in flatten(target).items()}
    held = bind_checkpoint(trained, config, shapes)
    wanted = with_aliases_resolved(bind(weight_rows(config), shapes, config), base.entries.keys(), False)
    second = {t.name: [t] for t in wanted if t.alias and t.name in trained.entries}

    def sources(part: Tensor) -> list[Tensor]:
        return [t for t in held if t.ours == part.ours and not t.alias and t.stack[: len(part.stack)] == part.stack]

    return {name: [(part, sources(part)) for part in parts] for name, parts in (by_name(wanted) | second).items()}


def _joined(trained: Checkpoint, parts: _Parts) -> np.ndarray:
    """A tensor from the tensors that hold its values."""
    held = dict(parts)

    def fetch(part: Tensor) -> np.ndarray:
        arrays = [each.to_ours_in_full(trained.read(each.name)) for each in held[part]]
        return np.stack(arrays) if held[part][0].stack != part.stack else arrays[0]

    return fuse([part for part, _ in parts], fetch)


def _with_text_config(hf: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """`hf` with what differs between the config.json of its language model and `text`."""
    before = text_config(hf)
    changed = {
        key: value for key, value in text.items() if key not in _NAMES and (key not in before or before[key] != value)
    }
    gone = {key for key in before if key not in text}
    config = {key: value for key, value in hf.items() if key != QUANTIZATION}
    # A key of both levels, as dtype, has one meaning.
    config = {key: changed.get(key, value) for key, value in config.items() if key not in gone or has_section(hf)}
    if has_section(hf):
        section = {key: value for key, value in hf["text_config"].items() if key not in gone}
        return config | {"text_config": section | changed}
    return config | changed
