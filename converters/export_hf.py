"""A Hugging Face folder out: safetensors with index, config.json, generation_config.json, tokenizer, chat template.

The folder is written under a temporary name beside its own and renamed when it is whole, so that nobody ever sees half
of one. What is there already is never overwritten: a folder that is not empty is an error, whoever wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerFast

from converters.errors import CheckpointError
from converters.families.registry import FAMILIES, for_head, weight_rows
from converters.import_hf import bind_checkpoint
from converters.rows import bind, by_name, flatten, join
from converters.safetensors_io import DTYPES, Spec, open_checkpoint, plan_files, write_checkpoint
from converters.tokenizer import load_tokenizer
from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Params

MAX_SHARD_BYTES = 5 * 10**9
CUSTOM_HEAD = "custom_head.safetensors"  # what transformers has no place for, under our names
GENERATION = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def export_hf(
    params: Params,
    config: ModelConfig,
    hf: Mapping[str, Any] | None,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer_from: str | Path | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `params` (without adapters) as a folder that transformers loads. Returns the folder.

    `hf` is the config.json that the model came from: every key of it is kept unless the model changed. `dtype` casts
    (default: the parameters' own). The tokenizer's files, chat template and generation_config.json are copied from the
    folder `tokenizer_from`; `tokenizer`, where given, knows more tokens than that one does. Every process must call
    this; one tensor at a time is gathered, the first process writes.

    Raises CheckpointError where `out` is not empty, `dtype` is none that safetensors files of models have, or the
    parameters do not fit the family.
    """
    folder = empty_folder(Path(out))
    writable = [each.name for each in DTYPES.values()]
    if dtype is not None and dtype not in writable:
        raise CheckpointError(f"cannot write weights as {dtype!r}; known: {', '.join(writable)}")
    family, leaves = FAMILIES[config.family], flatten(params)
    own_head = {ours: leaves.pop(ours) for ours in list(leaves) if ours.startswith("custom_head.")}
    tensors = bind(weight_rows(config), {ours: leaf.shape for ours, leaf in leaves.items()}, config)
    named = by_name(tensors)
    cast = {ours: np.dtype(dtype or leaf.dtype) for ours, leaf in leaves.items()}
    specs = [Spec(name, cast[parts[0].ours], parts[0].shape) for name, parts in named.items()]
    files = plan_files(specs, max_shard_bytes)

    def fetch(name: str) -> np.ndarray:
        whole = join(named[name], lambda tensor: gather(leaves[tensor.ours], tensor.stack))
        return whole.astype(cast[named[name][0].ours], copy=False)

    if jax.process_index() > 0:
        # A tensor that is spread over hosts is gathered by all of them.
        for spec in (spec for shard in files.values() for spec in shard):
            fetch(spec.name)
        for leaf in own_head.values():
            gather(leaf, ())
        return folder
    scalar = "value_head.kernel" in leaves
    config_json = _with_dtype(for_head(family.to_hf(config, hf), config, scalar), cast["embed.weight"])
    with written_aside(folder) as partial:
        write_checkpoint(partial, files, fetch)
        if own_head:
            specs = [Spec(name, leaf.dtype, leaf.shape) for name, leaf in own_head.items()]
            write_checkpoint(partial, {CUSTOM_HEAD: specs}, lambda name: gather(own_head[name], ()))
        _write_rest(partial, config_json, Path(tokenizer_from) if tokenizer_from is not None else None)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.save(str(partial / "tokenizer.json"))
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
    """Import and export without training, one tensor in memory at a time, every tensor in its own dtype.

    `config` and `hf` are `read_config(source)`'s, `target` is the parameter tree (anything with shapes). The result
    holds the same tensors under the same names, so this checks a folder and tidies it: other file sizes, no stray
    files. Returns the folder. Raises CheckpointError as `import_params` and `export_hf` do.
    """
    folder = empty_folder(Path(out))
    shapes = {ours: leaf.shape for ours, leaf in flatten(target).items()}
    with open_checkpoint(source) as checkpoint, written_aside(folder) as partial:
        tensors = bind_checkpoint(checkpoint, config, shapes)
        named = by_name(tensors) | {t.name: [t] for t in tensors if t.alias}
        specs = [Spec(name, checkpoint.dtype(name), parts[0].shape) for name, parts in named.items()]

        def fetch(name: str) -> np.ndarray:
            stored = checkpoint.read(name)
            return join(named[name], lambda tensor: tensor.to_ours_in_full(stored))

        write_checkpoint(partial, plan_files(specs, max_shard_bytes), fetch)
        _write_rest(partial, FAMILIES[config.family].to_hf(config, hf), Path(source))
    return folder


def empty_folder(out: Path) -> Path:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not an empty folder; name another or remove it")
    return out


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name once the block is through, and is gone where it fails."""
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
    """One layer's part of a parameter, whole, on this host."""
    part = _at(leaf, stack) if stack else leaf  # jitted with a traced place: one program for all layers
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def _with_dtype(hf: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """`dtype` as transformers 5 spells it, `torch_dtype` where the file is an older one."""
    return {**hf, "torch_dtype" if "torch_dtype" in hf and "dtype" not in hf else "dtype": dtype.name}


def _write_rest(folder: Path, hf: Mapping[str, Any], source: Path | None) -> None:
    """config.json, and what the source folder holds of tokenizer, chat template and generation_config.json.

    Where neither says which token ends a text, as for a model that began here, the tokenizer does: without one
    transformers' generate goes on to its limit.
    """
    _write_json(folder / "config.json", hf)
    if source is not None:
        copy_files(source, folder, (*TOKENIZER_FILES, GENERATION))
    if (folder / GENERATION).exists():
        return
    tokens = {key: hf[key] for key in _SPECIAL if hf.get(key) is not None}
    if not tokens and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
        tokens = {key: getattr(tokenizer, key) for key in _SPECIAL if getattr(tokenizer, key) is not None}
    if tokens:
        _write_json(folder / GENERATION, tokens)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Those of `names` that `source` holds, folders whole."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
