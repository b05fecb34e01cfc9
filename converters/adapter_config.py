"""adapter_config.json of PEFT: what an adapter's settings are, and which of its keys are honoured or refused."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.families.keys import ConfigKeys, is_positive
from converters.import_hf import ADAPTER_CONFIG
from converters.json_files import read_json_object
from converters.safetensors_io import check_folder

_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # peft.LoraConfig (0.21)

# Keys that change what an adapter computes, with the values that do not.
INERT_KEYS: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": (None, "none"),
    "corda_config": (None, {}),  # like the other initializations, it changes the base weights too
    "eva_config": (None, {}),
    "fan_in_fan_out": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (None, False),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
# Keys that do not: those that are read, those that follow from the tensor names, and how PEFT trains or loads.
KNOWN_KEYS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
    *("modules_to_save", "ensure_weight_tying"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_config", "megatron_core", "runtime_config"),
}
MERGE = (
    "`AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)` of peft merges it into "
    "its base; training can start from OUT"
)
_CHANGES_BASE = "; it is an adapter of changed base weights: save it with path_initial_model_for_weight_conversion, or "


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of a plain LoRA. Modules are named as in transformers: `model.layers.3.self_attn.q_proj`."""

    file: Path
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    ranks: Mapping[str, int]  # by a pattern of modules' names
    alphas: Mapping[str, float]
    saved: list[str]  # modules_to_save
    keeps_tie: bool  # a tied head that is saved stays tied
    targets: str | list[str] | None
    excluded: str | list[str] | None
    layers: list[int] | None

    @property
    def scale(self) -> float:
        return self._scale(self.alpha, self.rank)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        return self._scale(_by_pattern(self.alphas, module, self.alpha), self.rank_of(module))

    def alpha_for(self, rank: int) -> float:
        """The alpha that gives an adapter of another rank the same scale."""
        return self.alpha if rank == self.rank else self.scale * (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str, layer: int) -> bool:
        """Whether a module, of a kind that has adapters, has one: single layers may have none."""
        named = self.targets in (None, [], "all-linear") or _is_named(self.targets, module)
        chosen = self.layers is None or layer in self.layers
        return named and chosen and not _is_named(self.excluded, module)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Path) -> AdapterSettings:
    """Raises ConversionError, which names the file and the key, for a folder without an adapter, a setting of the wrong
    type, and an adapter that is not a plain LoRA."""
    check_folder(folder)
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise ConversionError(f"{folder} is not a PEFT folder: it holds no {ADAPTER_CONFIG}")
    hf = read_json_object(file)
    if hf.get("peft_type") != "LORA":
        raise ConversionError(f"{file}: peft_type={hf.get('peft_type')} is not supported; only LORA is. {MERGE}")
    for key, value in hf.items():
        if key not in KNOWN_KEYS and value not in INERT_KEYS.get(key, (None, False, [], {})):
            harmless = f"; only {INERT_KEYS[key][-1]!r} is" if key in INERT_KEYS else ": the key is unknown"
            between = _CHANGES_BASE if key == "init_lora_weights" else ". "
            raise ConversionError(f"{file}: {key}={value!r} is not supported{harmless}{between}{MERGE}")
    optional = ("lora_dropout", "use_rslora")
    given = {key: hf[key] for key in _DEFAULTS if key in hf and not (key in optional and hf[key] is None)}
    keys = ConfigKeys(given, _DEFAULTS, file=str(file))
    return AdapterSettings(
        file=file,
        rank=keys.size("r"),
        alpha=keys.number("lora_alpha"),
        dropout=keys.share("lora_dropout"),
        rslora=keys.flag("use_rslora"),
        ranks=_pattern(hf, "rank_pattern", int, file),
        alphas=_pattern(hf, "alpha_pattern", int | float, file),
        saved=_saved(hf, file),
        keeps_tie=bool(hf.get("ensure_weight_tying")),
        targets=_modules(hf, "target_modules", file),
        excluded=_modules(hf, "exclude_modules", file),
        layers=_layers(hf, file),
    )


def _pattern(hf: Mapping[str, Any], key: str, kind: Any, file: Path) -> dict[str, Any]:
    section = hf.get(key) or {}
    if not isinstance(section, dict):
        raise ConversionError(f"{file}: {key} must be an object, not {section!r}")
    for name, value in section.items():
        _check_regex(name, key, file)
        if not isinstance(value, kind) or not is_positive(value):
            raise ConversionError(f"{file}: {key}.{name} must be a positive number, of ranks an integer, not {value!r}")
    return section


def _saved(hf: Mapping[str, Any], file: Path) -> list[str]:
    saved = hf.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ConversionError(f"{file}: modules_to_save must be a list of names, not {saved!r}")
    return saved


def _modules(hf: Mapping[str, Any], key: str, file: Path) -> str | list[str] | None:
    """A regular expression of modules' names, or ends of them."""
    value = hf.get(key)
    if isinstance(value, str):
        _check_regex(value, key, file)
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ConversionError(f"{file}: {key} must be a list of names, or a regular expression, not {value!r}")
    return value


def _layers(hf: Mapping[str, Any], file: Path) -> list[int] | None:
    value = hf.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise ConversionError(
            f"{file}: layers_to_transform must be the number of a layer or a list of them, not {value!r}"
        )
    return layers or None


def _check_regex(text: str, key: str, file: Path) -> None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConversionError(f"{file}: {key} holds {text!r}, which is no regular expression: {error}") from None


def _is_named(names: str | list[str] | None, module: str) -> bool:
    """As PEFT matches: a regular expression must match the whole name, one of a list an end of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches an end of the name, as in PEFT."""
    return next((value for name, value in values.items() if re.match(rf"(.*\.)?({name})$", module)), default)
