"""`quantization_config` of config.json: which formats are read, and what to do with the others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.weight_rows import Shape

QUANTIZATION = "quantization_config"
_TOOLS = {
    **dict.fromkeys(
        ("gptq", "awq", "compressed-tensors"),
        "`gptqmodel.utils.model_dequant.dequantize_model(DIR, OUT)` of GPTQModel writes it as bfloat16",
    ),
    "bitsandbytes": (
        "`AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(OUT)` of transformers writes it as "
        "bfloat16"
    ),
}
_BASE = "the checkpoint that it was quantised from is the better base for training (model.quantize makes a QLoRA of it)"


def without_quantization(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without a `quantization_config` whose tensors are dequantised while they are read: FP8 of
    transformers (DeepSeek-V3, Qwen3) and of compressed-tensors. Other formats are left to the families.

    Raises ConversionError for a format that another tool can dequantise, which it names.
    """
    section = hf.get(QUANTIZATION)
    if section is None or not isinstance(section, Mapping):
        return dict(hf)
    method = section.get("quant_method")
    if not section or method == "fp8" or (method == "compressed-tensors" and _is_fp8(section)):
        weight_block_size(section)
        return {key: value for key, value in hf.items() if key != QUANTIZATION}
    if isinstance(method, str) and method in _TOOLS:
        raise ConversionError(f"config.json: {QUANTIZATION}={method!r} is not supported; {_BASE}, and {_TOOLS[method]}")
    return dict(hf)


def _is_fp8(section: Mapping[str, Any]) -> bool:
    return section.get("format") == "float-quantized"


def weight_block_size(section: Mapping[str, Any]) -> Shape | None:
    """The rows and columns of a tile of FP8, or None if there is no tile. Raises ConversionError for other values."""
    size = section.get("weight_block_size")
    if size is None:
        size = _block_structure(section)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise ConversionError(
            f"config.json: {QUANTIZATION}.weight_block_size must be two positive integers, not {size!r}"
        )
    return size[0], size[1]


def _block_structure(section: Mapping[str, Any]) -> Any:
    """What compressed-tensors calls the tile; it may name it for several groups of modules."""
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure") is not None:
            return weights["block_structure"]
    return None


def tile_of_folder(folder: Path) -> Shape | None:
    """`weight_block_size` of a folder's config.json; None if it has none. A file that cannot be read has none: reading
    the config reports it."""
    try:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(QUANTIZATION)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return weight_block_size(section) if isinstance(section, Mapping) else None
