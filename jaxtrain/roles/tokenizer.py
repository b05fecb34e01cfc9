"""The tokenizer of a run, and the tokens that end an answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from converters.export_hf import TOKENIZER_FILES
from converters.tokenizer import add_tokens, load_tokenizer
from jaxtrain.config import ModelSection
from jaxtrain.data.turn_ends import turn_end_ids


def tokenizer_folder(section: ModelSection) -> str | None:
    """The folder of the tokenizer. None: there is none, and every row must hold `input_ids`."""
    if section.tokenizer is None and section.path is not None:
        return section.path if any((Path(section.path) / name).exists() for name in TOKENIZER_FILES) else None
    return section.tokenizer


def make_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer with `model.add_tokens` added and, where given, `model.chat_template` as its template.

    Returns None where there is no tokenizer. Raises ValueError for a key that needs one then.
    """
    folder = tokenizer_folder(section)
    if folder is None:
        for key in ("add_tokens", "chat_template"):
            if getattr(section, key) is not None:
                raise ValueError(f"model.{key} needs a tokenizer, and the model has none; name one by model.tokenizer")
        return None
    tokenizer = load_tokenizer(folder)
    if section.add_tokens is not None:
        add_tokens(tokenizer, section.add_tokens.tokens, section.add_tokens.special)
    if section.chat_template is not None:
        path = Path(section.chat_template)
        if not path.is_file():
            raise ValueError(f"model.chat_template: there is no file {path}")
        tokenizer.chat_template = path.read_text()
    return tokenizer


def stop_ids(section: ModelSection, hf: dict[str, Any], tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of generation_config.json, of config.json (`hf`), of the tokenizer, and those
    that end a turn of the assistant under the chat template."""
    generation = Path(section.path or section.tokenizer or "") / "generation_config.json"
    named = [json.loads(generation.read_text()).get("eos_token_id")] if generation.is_file() else []
    named += [hf.get("eos_token_id"), tokenizer and tokenizer.eos_token_id]
    if tokenizer is not None:
        named.append(turn_end_ids(tokenizer))
    return sorted({token for ids in named if ids is not None for token in (ids if isinstance(ids, list) else [ids])})


def fingerprint(tokenizer: Any) -> str:
    """Changes with the ids or the chat template, not with padding and truncation, which encoding turns off."""
    if tokenizer is None:
        return ""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    content = backend.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
