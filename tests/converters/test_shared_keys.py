"""The table covers every key of config.json that transformers' shared code reads."""

import ast
from pathlib import Path

import pytest
import transformers

from converters.errors import ConversionError
from converters.families.keys import INERT_VALUES
from converters.families.registry import FAMILIES
from converters.families.shared_keys import HONOURED, IGNORED, REFUSED
from converters.import_hf import read_config

# What every model runs through, from config.json to logits and generation, in the source of the installed transformers.
SHARED_CODE = (
    *("configuration_utils.py", "modeling_utils.py", "modeling_layers.py", "modeling_rope_utils.py", "cache_utils.py"),
    *("masking_utils.py", "modeling_flash_attention_utils.py", "modeling_outputs.py", "core_model_loading.py"),
    *("conversion_mapping.py", "fusion_mapping.py", "monkey_patching.py", "initialization.py", "pytorch_utils.py"),
    *("activations.py", "generation/utils.py", "generation/configuration_utils.py", "generation/logits_process.py"),
    *("models/auto/auto_factory.py", "models/auto/configuration_auto.py", "quantizers/auto.py", "loss/loss_utils.py"),
    *("integrations/moe.py", "integrations/sdpa_attention.py", "integrations/flash_attention.py"),
    *("integrations/flex_attention.py", "integrations/eager_paged.py", "integrations/sdpa_paged.py"),
    *("integrations/hub_kernels.py", "integrations/tensor_parallel.py", "integrations/peft.py"),
    *("integrations/accelerate.py", "integrations/heterogeneity/configuration_utils.py"),
    *("utils/generic.py", "utils/output_capturing.py"),
)
# What those files call an object made of config.json; `generation_config` and the like are others.
CONFIGS = {
    *("config", "_config", "text_config", "model_config", "layer_config", "effective_config", "decoder_config"),
    *("config_to_return", "subconfig", "sub_config", "parent_config"),
}


def reads(tree: ast.AST, own: bool) -> set[str]:
    """Attributes of configs that are read; `own`: `self` is a config, too."""

    def is_config(node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.func.attr == "get_text_config"
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in CONFIGS or (own and name == "self")

    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called:
            found |= {node.attr} if is_config(node.value) else set()
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "hasattr") and is_config(node.args[0]) and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def read_by_shared_code() -> set[str]:
    root = Path(transformers.__file__).parent
    found: set[str] = set()
    for file in SHARED_CODE:
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        found |= reads(tree, own=False)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in BASES:
                found |= reads(node, own=True)
    return found


BASES = ("PreTrainedConfig", "RotaryEmbeddingConfigMixin", "HeterogeneousConfigMixin")
# Attributes of the classes' own machinery, which they set themselves.
INTERNAL = {
    *("__class__", "__dict__", "_auto_class", "_heterogeneity_spec", "_post_init_done", "default_theta"),
    *("allow_global_per_layer_attribute_access", "ignore_keys_at_rope_validation", "is_heterogeneous"),
    *("per_layer_attributes", "serialize_explicit_per_layer_config", "sub_configs_defaults", "validate"),
}


def test_every_key_that_shared_code_reads_is_known():
    """A key that a later transformers reads must be added to converters/families/shared_keys.py."""
    of_families = set().union(*(family.DEFAULTS for family in FAMILIES.values()))
    assert read_by_shared_code() - {*HONOURED, *IGNORED, *REFUSED} - of_families - INTERNAL == set()


def test_no_key_is_in_two_tables():
    assert len({*HONOURED, *IGNORED, *REFUSED}) == len(HONOURED) + len(IGNORED) + len(REFUSED)
    assert not INERT_VALUES.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys_are_refused_by_name_unless_the_family_reads_them(name, key):
    family = FAMILIES[name]
    if key in family.DEFAULTS or (name == "gpt_oss" and key == "quantization_config"):
        return
    minimal = {"architectures": [family.ARCHITECTURE]}
    read_config({**minimal, key: REFUSED[key][-1]})
    for value in ("false", 7, {"a": 1}, *([None, False] if key == "is_causal" else [])):
        with pytest.raises(ConversionError, match=rf"config\.json: {key}=.* is not supported"):
            read_config({**minimal, key: value})
