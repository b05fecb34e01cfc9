"""Reads JSON files of Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

from converters.errors import ConversionError


def read_json_object(file: Path) -> dict[str, Any]:
    """Raises ConversionError for a missing file and for one that is not a JSON object."""
    if not file.is_file():
        raise ConversionError(f"{file.parent} holds no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{file} must be an object, not {type(content).__name__}")
    return content
