"""Data sets on the Hugging Face hub: which of a repository's files are a split, downloaded into the hub's cache.

A repository declares it in the header of its README (`configs`, with `data_files`), as `datasets` reads it; otherwise
the names of files or folders contain the name of the split, below a folder named after the configuration.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fsspec.utils import glob_translate

from jaxtrain.data.files.errors import DataError
from jaxtrain.hub import HubError, list_files, missing, snapshot, with_owner

HUB = "hf:"
# Files that describe a data set, beside its rows: of `datasets`, LLaMA-Factory, the hub and ML Commons.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "metadata.json", "croissant.json")
_README = "README.md"
_SPLITS = {  # what files of a split have in their names
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

Splits = dict[str, list[str]]  # name -> files


def hub_files(path: str, config: str | None, split: str | None, readable: Callable[[str], bool]) -> list[str]:
    """The local paths of the files of a split of `hf:owner/name[@revision]`.

    Raises DataError where the configuration or the split is not one of the data set's, or has to be named.
    """
    try:
        name = with_owner(path.removeprefix(HUB), "dataset")
        names = [file for file in list_files(name, "dataset") if Path(file).name not in METADATA]
        root = snapshot(name, "dataset", [_README]) if _README in names else None
        splits = _splits(path, names, _header(root), config, readable)
        if split is None and splits and "train" not in splits:
            raise DataError(f"{path}: has no split train: name one of {', '.join(splits)} as `split`")
        found = _chosen(path, "split", split, splits)
        root = snapshot(name, "dataset", found)
    except HubError as error:
        raise DataError(str(error)) from None
    absent = [file for file in found if not (root / file).is_file()]
    if absent:  # the hub was not asked, and the cache has a part of the repository
        raise DataError(missing(name, "dataset", f"{absent[0]} is not in the cache"))
    return [str(root / file) for file in found]


def is_hub(path: str) -> bool:
    return path.startswith(HUB) and not path.startswith(f"{HUB}//")


def _splits(
    path: str, names: list[str], header: list[dict[str, Any]], config: str | None, readable: Callable[[str], bool]
) -> Splits:
    """The splits of a configuration."""
    declared = {str(each.get("config_name", "default")): each for each in header if each.get("data_files")}
    if declared:
        default = next((name for name, each in declared.items() if each.get("default") or name == "default"), None)
        entry = _chosen(path, "config", config if config is not None else default, declared)
        splits = {split: _matching(names, patterns) for split, patterns in _patterns(entry["data_files"]).items()}
        unreadable = [file for files in splits.values() for file in files if not readable(file)]
        if unreadable:
            raise DataError(f"{path}: {unreadable[0]}: unknown kind of file")
        return {split: files for split, files in splits.items() if files}
    files = [file for file in names if readable(file)]
    folders = {file.partition("/")[0] for file in files if "/" in file} - {"data"}
    named = {folder for folder in folders if not any(folder in words for words in _SPLITS.values())}
    if config is not None or (named and not any("/" not in file or file.startswith("data/") for file in files)):
        folder = _chosen(path, "config", config, {folder: folder for folder in sorted(named)})
        files = [file for file in files if file.startswith(f"{folder}/")]
    if len({Path(file).suffix for file in files}) > 1:
        raise DataError(
            f"{path}: holds several kinds of files and does not declare which are its data: name one kind, as "
            f"hf://datasets/{path.removeprefix(HUB)}/**/*{Path(files[0]).suffix}"
        )
    splits = {
        split: [file for file in files if re.search(rf"(?:^|[/._-])(?:{'|'.join(words)})(?:[/._-])", file)]
        for split, words in _SPLITS.items()
    }
    return {split: each for split, each in splits.items() if each} or ({"train": files} if files else {})


def _header(root: Path | None) -> list[dict[str, Any]]:
    """`configs` of the README's YAML header."""
    text = (root / _README).read_text(encoding="utf-8") if root is not None else ""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    header = yaml.safe_load(found.group(1)) if found else {}
    configs = header.get("configs") if isinstance(header, dict) else None
    return [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """`data_files` of a configuration: a pattern, patterns, or those of each split, as `datasets` allows."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    if all(isinstance(each, str) for each in entries):
        return {"train": entries}
    paths = {str(each["split"]): each["path"] for each in entries}
    return {split: [path] if isinstance(path, str) else list(path) for split, path in paths.items()}


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    return sorted({name for pattern in patterns for name in names if re.match(glob_translate(pattern), name)})


def _chosen(path: str, key: str, wanted: str | None, known: dict[str, Any]) -> Any:
    """Of the things that `key` chooses from, the one that is named, or the only one."""
    if not known:
        raise DataError(f"{path}: holds no data files that can be read here")
    if wanted is None and len(known) == 1:
        return next(iter(known.values()))
    if wanted not in known:
        problem = f"name one with `{key}`" if wanted is None else f"there is no {key} {wanted!r}"
        raise DataError(f"{path}: {problem}: it has {', '.join(known)}")
    return known[wanted]
