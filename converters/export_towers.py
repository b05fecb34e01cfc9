"""Writes a trained language model back into a folder with the other models that it was read beside."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.export_hf import copy_files, empty_folder, temporary_folder
from converters.json_files import read_json_object
from converters.quantization import QUANTIZATION
from converters.safetensors_io import STORED, TensorSpec, open_checkpoint, plan_files, write_checkpoint
from converters.towers import has_section, text_config, tower_of

_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_NAMES = ("architectures", "model_type")


def has_towers(folder: Path) -> bool:
    """Whether a folder holds other models beside a language model."""
    return tower_of(read_json_object(folder / "config.json")) is not None


def export_towers(text: Path, source: Path, out: Path, *, max_shard_bytes: int) -> Path:
    """Write the folder `source` with its language model replaced by that of the folder `text`, which `export_hf` wrote
    of it. Returns `out`.

    Tensors have the names of `source`; those of other models are copied bit for bit. Of config.json only what changed
    in the language model is changed. Raises ConversionError if `out` is not empty.
    """
    empty_folder(out)
    with open_checkpoint(source) as base, open_checkpoint(text) as trained, temporary_folder(out) as partial:
        assert base.names is not None
        own = {base.names.stored(name): name for name in trained.entries}
        specs = [TensorSpec(name, trained.dtype(plain), trained.entries[plain].shape) for name, plain in own.items()]
        for name, entry in base.others.items():
            if entry.dtype not in STORED:
                raise ConversionError(f"{entry.file}: tensor {name} is {entry.dtype}, which cannot be written")
            specs.append(TensorSpec(name, STORED[entry.dtype], entry.shape))

        def fetch(name: str) -> np.ndarray:
            return trained.read(own[name]) if name in own else base.read_other(name)

        write_checkpoint(partial, plan_files(specs, max_shard_bytes), fetch)
        config = _with_text_config(read_json_object(source / "config.json"), read_json_object(text / "config.json"))
        (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        copy_files(source, partial, _FILES)
        written = {"config.json", *(file.name for file in text.glob("*.safetensors*"))}
        copy_files(text, partial, sorted(file.name for file in text.iterdir() if file.name not in written))
    return out


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
