"""The tokenizer of a run, and the tokens that end an answer."""

from pathlib import Path
from typing import Any

import jaxtrain.data
from converters.export_hf import TOKENIZER_FILES
from converters.json_files import read_json_object
from converters.tokenizer import add_tokens, end_token_ids, load_tokenizer
from jaxtrain.config import ModelSection
from jaxtrain.data.turn_ends import turn_end_ids
from jaxtrain.hub import local_folder

_BUILTIN = "builtin:"
_TEMPLATES = Path(jaxtrain.data.__file__).parent / "templates"


def tokenizer_folder(section: ModelSection) -> str | None:
    """The folder of the tokenizer, or None if there is none; then every data row must have `input_ids`."""
    if section.tokenizer is None and section.path is not None:
        folder = local_folder(section.path, weights=False)
        return section.path if any((folder / name).exists() for name in TOKENIZER_FILES) else None
    return section.tokenizer


def make_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer with the tokens of `model.add_tokens` and, if given, the template `model.chat_template`.

    Returns None if there is no tokenizer, and raises ValueError if one of these keys needs it.
    """
    folder = tokenizer_folder(section)
    if folder is None:
        for key in ("add_tokens", "chat_template"):
            if getattr(section, key) is not None:
                raise ValueError(f"model.{key} needs a tokenizer, which the model lacks; set model.tokenizer")
        return None
    tokenizer = load_tokenizer(folder)
    if section.add_tokens is not None:
        add_tokens(tokenizer, section.add_tokens.tokens, section.add_tokens.special)
    if section.chat_template is not None:
        tokenizer.chat_template = template_text(section.chat_template)
    return tokenizer


def template_text(name: str) -> str:
    """The text of `model.chat_template`: a file, or one of the package's own."""
    kind, _, builtin = name.partition(_BUILTIN)
    path = Path(name) if kind else _TEMPLATES / f"{builtin}.jinja"
    if path.is_file():
        return path.read_text()
    if kind:
        raise ValueError(f"model.chat_template: the file {path} does not exist")
    known = ", ".join(sorted(_BUILTIN + path.stem for path in _TEMPLATES.glob("*.jinja")))
    raise ValueError(f"model.chat_template: there is no {name}; known: {known}")


def stop_ids(section: ModelSection, hf: dict[str, Any], tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the end tokens of generation_config.json, of config.json (`hf`) and of the tokenizer,
    and those with which the chat template ends an assistant turn."""
    generation = local_folder(section.path or section.tokenizer or "", weights=False) / "generation_config.json"
    ids = end_token_ids(read_json_object(generation), generation) if generation.is_file() else []
    ids += end_token_ids(hf, "config.json")
    if tokenizer is not None:
        ids += [*turn_end_ids(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    return sorted(set(ids))
