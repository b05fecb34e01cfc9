"""Export of a Hugging Face folder: safetensors with index, config.json, generation_config.json, tokenizer, template.

The folder is written under a temporary name next to its own and renamed when it is complete, so that an incomplete
folder never appears under the final name. Existing files are never overwritten: a folder that is not empty is an error.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerFast

from converters.errors import ConversionError
from converters.families.registry import for_head, to_hf, weight_rows
from converters.import_hf import bind_checkpoint
from converters.json_files import read_json_object
from converters.safetensors_io import DTYPES, TensorSpec, open_checkpoint, plan_files, write_checkpoint
from converters.tokenizer import end_token_ids, load_tokenizer
from converters.weight_rows import bind, by_name, flatten, fuse
from jaxtrain.hub import local_folder
from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Params

MAX_SHARD_BYTES = 5 * 10**9
CUSTOM_HEAD = "custom_head.safetensors"  # parameters without a counterpart in transformers, under our names
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
    "additional_chat_templates",
)


@dataclass(frozen=True)
class TrainedText:
    """What a run changed in the tokenizer, relative to the folder that its files are copied from."""

    tokenizer: PreTrainedTokenizerFast | None = None  # with added tokens
    chat_template: str | None = None  # replaces that of the folder
    end_ids: Sequence[int] = ()  # tokens that end an answer, added to `eos_token_id` in generation_config.json
    padding: tuple[str, int] | None = None  # the token, and its id, that replaces the padding token of the folder


UNCHANGED_TEXT = TrainedText()


def export_hf(
    params: Params,
    config: ModelConfig,
    hf: Mapping[str, Any] | None,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer_from: str | Path | None = None,
    text: TrainedText = UNCHANGED_TEXT,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `params` (without adapters) as a folder that transformers loads. Returns the folder.

    `hf` is the config.json that the model was read from: every key of it is kept unless the model changed. `dtype`
    casts the weights (default: no cast). The tokenizer's files, chat template and generation_config.json are copied
    from the folder `tokenizer_from`, with the changes of `text`. Every process must call this; one tensor at a time is
    gathered, and the first process writes.

    Raises ConversionError if `out` is not empty, `dtype` is not one of `DTYPES`, or the parameters do not fit the
    family.
    """
    folder = empty_folder(Path(out))
    writable = [each.name for each in DTYPES.values()]
    if dtype is not None and dtype not in writable:
        raise ConversionError(f"cannot write weights as {dtype!r}; known: {', '.join(writable)}")
    leaves = flatten(params)
    own_head = {ours: leaves.pop(ours) for ours in list(leaves) if ours.startswith("custom_head.")}
    tensors = bind(weight_rows(config), {ours: leaf.shape for ours, leaf in leaves.items()}, config)
    named = by_name(tensors)
    cast = {ours: np.dtype(dtype or leaf.dtype) for ours, leaf in leaves.items()}
    specs = [TensorSpec(name, cast[parts[0].ours], parts[0].shape) for name, parts in named.items()]
    files = plan_files(specs, max_shard_bytes)

    def fetch(name: str) -> np.ndarray:
        joined = fuse(named[name], lambda tensor: gather(leaves[tensor.ours], tensor.stack))
        return joined.astype(cast[named[name][0].ours], copy=False)

    if jax.process_index() > 0:
        # A tensor that is sharded over hosts is gathered by all of them.
        for spec in (spec for shard in files.values() for spec in shard):
            fetch(spec.name)
        for leaf in own_head.values():
            gather(leaf, ())
        return folder
    scalar = "value_head.kernel" in leaves
    config_json = _with_dtype(for_head(to_hf(config, hf), config, scalar), cast["embed.weight"])
    if text.padding is not None:
        config_json["pad_token_id"] = text.padding[1]
    with temporary_folder(folder) as partial:
        write_checkpoint(partial, files, fetch)
        if own_head:
            specs = [TensorSpec(name, leaf.dtype, leaf.shape) for name, leaf in own_head.items()]
            write_checkpoint(partial, {CUSTOM_HEAD: specs}, lambda name: gather(own_head[name], ()))
        _write_json(partial / "config.json", config_json)
        write_text_files(partial, config_json, tokenizer_from, text)
    return folder


def convert(
    source: str | Path,
    config: ModelConfig,
    hf: Mapping[str, Any],
    target: Params,
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Import and export without training, one tensor in memory at a time, every tensor in its stored dtype.

    `config` and `hf` are the results of `read_config(source)`, `target` is the parameter tree (only its shapes are
    used). The result holds the same tensors under the same names: this checks a folder, changes the sizes of its files
    and leaves out unrelated files. Returns the folder. Raises ConversionError as `import_params` and `export_hf` do.
    """
    folder = empty_folder(Path(out))
    shapes = {ours: leaf.shape for ours, leaf in flatten(target).items()}
    with open_checkpoint(source) as checkpoint, temporary_folder(folder) as partial:
        tensors = bind_checkpoint(checkpoint, config, shapes)
        named = by_name(tensors) | {t.name: [t] for t in tensors if t.alias}
        specs = [TensorSpec(name, checkpoint.dtype(name), parts[0].shape) for name, parts in named.items()]

        def fetch(name: str) -> np.ndarray:
            stored = checkpoint.read(name)
            return fuse(named[name], lambda tensor: tensor.to_ours_in_full(stored))

        write_checkpoint(partial, plan_files(specs, max_shard_bytes), fetch)
        config_json = to_hf(config, hf)
        _write_json(partial / "config.json", config_json)
        write_text_files(partial, config_json, source)
    return folder


def empty_folder(out: Path) -> Path:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConversionError(f"{out} already exists and is not an empty folder; choose another folder or remove it")
    return out


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, renamed to it at the end of the block and removed if the block fails."""
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@jax.jit
def _at(stacked: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    return stacked[place]


def gather(leaf: jax.Array, stack: tuple[int, ...]) -> np.ndarray:
    """One layer's part of a parameter, unsharded, on this host."""
    part = _at(leaf, stack) if stack else leaf  # the index is traced: one program for all layers
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def declared_dtype(hf: Mapping[str, Any]) -> str | None:
    """The `dtype` of a config.json (or `torch_dtype`, its name before transformers 5), or None if it names none: it is
    missing, null or "auto".

    Raises ConversionError for a dtype that is not in `DTYPES`.
    """
    key = "dtype" if hf.get("dtype") is not None else "torch_dtype"
    value, known = hf.get(key), [each.name for each in DTYPES.values()]
    if value is None or value == "auto":
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in known:
        raise ConversionError(f"config.json: {key}={value!r} is not supported; known: {', '.join(known)}, auto")
    return name


def _with_dtype(hf: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """Set `dtype`, or `torch_dtype` in a file of an older version of transformers."""
    return {**hf, "torch_dtype" if "torch_dtype" in hf and "dtype" not in hf else "dtype": dtype.name}


def write_text_files(
    folder: Path, hf: Mapping[str, Any], source: str | Path | None, text: TrainedText = UNCHANGED_TEXT
) -> None:
    """Write tokenizer, chat template and generation_config.json: those of `source`, with the changes of `text`.

    `hf` is the model's config.json, which names the end token if generation_config.json is missing.
    """
    if source is not None:
        copy_files(local_folder(source, weights=False), folder, (*TOKENIZER_FILES, GENERATION))
    if text.tokenizer is not None:
        text.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    if text.chat_template is not None:
        _replace_template(folder, text.chat_template)
    if text.padding is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                _write_json(folder / name, {**read_json_object(folder / name), "pad_token": text.padding[0]})
    _write_generation_config(folder, hf, text.end_ids)


def _replace_template(folder: Path, template: str) -> None:
    """Write the template, and remove the one that an older version of transformers stored elsewhere. Templates with
    other names are kept."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    config = read_json_object(file) if file.is_file() else {}
    stored = config.pop("chat_template", None)
    if stored is None:
        return
    for named in stored if isinstance(stored, list) else []:
        if named["name"] != "default":
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            other = folder / "additional_chat_templates" / f"{named['name']}.jinja"
            other.write_text(named["template"], encoding="utf-8")
    _write_json(file, config)


def _write_generation_config(folder: Path, hf: Mapping[str, Any], end_ids: Sequence[int]) -> None:
    """Add `end_ids` to the `eos_token_id` of generation_config.json; do not touch a file that has them already.

    A missing file is written with the special tokens of config.json, or, if that names no end token, of the tokenizer:
    without an end token, `generate` of transformers runs to its length limit.
    """
    file = folder / GENERATION
    content = (
        read_json_object(file) if file.is_file() else {key: hf[key] for key in _SPECIAL if hf.get(key) is not None}
    )
    if not file.is_file() and "eos_token_id" not in content and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
        content = {key: getattr(tokenizer, key) for key in _SPECIAL if getattr(tokenizer, key) is not None} | content
    ends = end_token_ids(content, file)
    added = [token for token in dict.fromkeys(end_ids) if token not in ends]
    if added:
        ends = [*ends, *added]
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if content and (added or not file.is_file()):
        _write_json(file, content)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy those of `names` that `source` holds, files and folders."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
