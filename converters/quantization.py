"""`quantization_config` of config.json: which formats are read, and what to do with the others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from converters.errors import ConversionError
from converters.weight_rows import Shape

QUANTIZATION = "quantization_config"
_TOOL = "`gptqmodel.utils.model_dequant.dequantize_model(DIR, OUT)` of GPTQModel writes it as bfloat16"
_REFUSED = ("gptq", "awq", "compressed-tensors")
_BITS = {"gptq": (2, 4, 8), "awq": (4,)}
_BASE = "the checkpoint that it was quantised from is the better base for training (model.quantize makes a QLoRA of it)"


def without_quantization(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without a `quantization_config` whose tensors are dequantised while they are read: FP8 of
    transformers (DeepSeek-V3, Qwen3) and of compressed-tensors, GPTQ, AWQ and bitsandbytes (see `integer_format`).
    Other formats are left to the families.

    Raises ConversionError for a format that another tool can dequantise, which it names.
    """
    section = hf.get(QUANTIZATION)
    if section is None or not isinstance(section, Mapping):
        return dict(hf)
    method = section.get("quant_method")
    if not section or method == "fp8" or (method == "compressed-tensors" and _is_fp8(section)):
        weight_block_size(section)
        return {key: value for key, value in hf.items() if key != QUANTIZATION}
    if integer_format(section) is not None:
        return {key: value for key, value in hf.items() if key != QUANTIZATION}
    if method in _REFUSED:
        raise ConversionError(
            f"config.json: {method} with these settings of {QUANTIZATION} is not supported; {_BASE}, and {_TOOL}"
        )
    return dict(hf)


class IntegerFormat(NamedTuple):
    """How a folder stores matrices of integers: see `integer_matrices`."""

    method: str  # gptq, awq or bitsandbytes
    bits: int = 4
    group_size: int = -1  # inputs that share a scale; -1: all
    zeros_less_one: bool = False


def integer_format(section: Mapping[str, Any]) -> IntegerFormat | None:
    """The format of GPTQ (2, 4 or 8 bits, versions 1 and 2), AWQ (gemm) or bitsandbytes; None for others.

    Raises ConversionError for a size that is none.
    """
    method = section.get("quant_method")
    if method == "bitsandbytes":
        return IntegerFormat("bitsandbytes")
    if not isinstance(method, str) or method not in _BITS:
        return None
    bits, size = section.get("bits"), section.get("group_size", 128)
    if type(bits) is not int or type(size) is not int or (size <= 0 and size != -1):
        raise ConversionError(
            f"config.json: {QUANTIZATION} needs integers bits and group_size, not {bits!r} and {size!r}"
        )
    if bits not in _BITS[method] or not _is_plain(method, section):
        return None
    return IntegerFormat(method, bits, size, method == "gptq" and section.get("checkpoint_format") != "gptq_v2")


def _is_plain(method: str, section: Mapping[str, Any]) -> bool:
    if method == "awq":
        return section.get("version", section.get("format", "gemm")) in (None, "gemm") and section.get(
            "zero_point", True
        )
    known = {
        "checkpoint_format": (None, "gptq", "gptq_v2"),
        "is_marlin_format": (None, False),
        "pack_dtype": (None, "int32"),
    }
    return all(section.get(key) in values for key, values in known.items())


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


def section_of_folder(folder: Path) -> Mapping[str, Any]:
    """`quantization_config` of a folder's config.json; empty if it has none. A file that cannot be read has none:
    reading the config reports it."""
    try:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(QUANTIZATION)
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}
    return section if isinstance(section, Mapping) else {}
