"""Every key of adapter_config.json is honoured, ignored or refused by name, and matched to modules as in PEFT."""

import json
from dataclasses import fields

import hf_folders
import pytest

from converters.adapter_config import INERT_KEYS, KNOWN_KEYS, read_settings
from converters.errors import ConversionError

peft = pytest.importorskip("peft")


@pytest.fixture
def adapter(tmp_path):
    """A folder with a complete adapter_config.json, as PEFT writes it."""
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank_pattern", [1], r"rank_pattern must be an object, not \[1\]"),
        ("rank_pattern", {"q_proj": 1.5}, r"rank_pattern\.q_proj must be a positive number"),
        ("alpha_pattern", {"q_proj": True}, r"alpha_pattern\.q_proj must be a positive number"),
        ("alpha_pattern", {"q_proj(": 1}, r"alpha_pattern holds 'q_proj\(', which is no regular expression"),
        ("target_modules", {"q_proj": 1}, "target_modules must be a list of names"),
        ("layers_to_transform", ["0"], "layers_to_transform must be the number of a layer"),
        ("modules_to_save", "norm", "modules_to_save must be a list of names"),
    ],
)
def test_a_malformed_key_is_named(key, value, message, adapter):
    hf_folders.edit_json(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(ConversionError, match=rf"adapter_config\.json: {message}"):
        read_settings(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lora_alpha", value) for value in ("16", float("nan"), float("inf"), True, None, -1, 0, [16], 10**400)),
        *(("use_rslora", value) for value in ("false", 1, 0, [])),
        *(("r", value) for value in ("4", 4.0, True, 0, None, -4)),
        *(("lora_dropout", value) for value in ("0.1", float("nan"), 1, -0.1, True)),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(key, value, adapter):
    hf_folders.edit_json(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(ConversionError, match=rf"adapter_config\.json: {key} must be .*, not "):
        read_settings(adapter)


def test_missing_keys_have_pefts_defaults(adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    ours, theirs = read_settings(adapter), peft.LoraConfig()
    assert (ours.rank, ours.alpha, ours.dropout, ours.rslora) == (
        *(theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.use_rslora),
    )


def test_every_key_of_peft_is_known(adapter):
    """Keys that a later PEFT adds must be reviewed; until then they are refused unless they are disabled."""
    assert {field.name for field in fields(peft.LoraConfig)} - KNOWN_KEYS - INERT_KEYS.keys() == set()
    hf_folders.edit_json(adapter / "adapter_config.json", new_method=False)
    read_settings(adapter)
    hf_folders.edit_json(adapter / "adapter_config.json", new_method={"scale": 2})
    with pytest.raises(ConversionError, match=r"new_method=\{'scale': 2\} is not supported: the key is unknown"):
        read_settings(adapter)


@pytest.mark.parametrize("content", ["{broken", "[]", "[" * 100_000])
def test_a_broken_adapter_config(content, adapter):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ConversionError, match=r"adapter_config\.json (is not valid JSON|must be an object)"):
        read_settings(adapter)
