"""Every malformed JSON file of a folder is one line that names the file and the key, never a traceback."""

import json

import hf_folders
import pytest

from converters.adapters import read_lora
from converters.errors import ConversionError
from converters.export_hf import declared_dtype
from converters.import_hf import read_config
from converters.json_files import read_json_object
from converters.safetensors_io import open_checkpoint
from converters.tokenizer import end_token_ids, load_tokenizer, write_byte_tokenizer

STRANGE = ("x", "", -1, 0, 0.5, True, [], [3], ["x"], [[3]], {}, {"a": 1}, {"content": 3}, 10**400)
BROKEN = ("", "{", "[]", "null", "3", '"a"', '{"a": NaN', "[" * 100_000, "{" + '"a":' * 3)


@pytest.mark.parametrize("text", BROKEN)
def test_files_that_hold_no_object(text, tmp_path):
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(ConversionError) as error:
        read_json_object(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConversionError, match="not valid JSON"):
        read_json_object(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folders.save(tmp_path_factory.mktemp("sharded"), "llama", shard="20KB")


def named(error, *words):
    return isinstance(error, ValueError) and "\n" not in str(error) and all(word in str(error) for word in words)


@pytest.mark.parametrize("value", STRANGE)
def test_an_index(value, folder):
    file = folder / "model.safetensors.index.json"
    kept = file.read_text()
    try:
        for content in ({}, {"weight_map": value}, {"weight_map": {"a": value}}):
            file.write_text(json.dumps(content))
            with pytest.raises(ConversionError) as error:
                open_checkpoint(folder)
            assert named(error.value, file.name)
        file.write_text("[" * 100_000)
        with pytest.raises(ConversionError, match=file.name):
            open_checkpoint(folder)
    finally:
        file.write_text(kept)


ADAPTER_KEYS = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "rank_pattern", "bias"),
    *("use_dora", "alpha_pattern", "target_parameters", "layers_to_transform", "init_lora_weights", "unknown"),
)


@pytest.mark.parametrize("key", ADAPTER_KEYS)
def test_an_adapter_config(key, tmp_path):
    config = read_config({"architectures": ["LlamaForCausalLM"]})[0]
    for value in STRANGE:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: value}))
        with pytest.raises(ConversionError) as error:  # no weights, if nothing else
            read_lora(tmp_path, config)
        assert named(error.value, "adapter_model.safetensors") or named(error.value, "adapter_config.json", key)


@pytest.mark.parametrize("value", [*STRANGE, None, 2, [2, 3]])
def test_end_tokens_of_generation_config(value):
    try:
        ids = end_token_ids({"eos_token_id": value}, "generation_config.json")
    except ConversionError as error:
        assert named(error, "generation_config.json: eos_token_id must be a token id or a list of them")
    else:
        assert ids == ([] if value is None else value if isinstance(value, list) else [value])
        assert all(type(token) is int and token >= 0 for token in ids)


TOKENIZER_KEYS = (
    "eos_token",
    "pad_token",
    "chat_template",
    "added_tokens_decoder",
    "model_max_length",
    "tokenizer_class",
)


@pytest.mark.parametrize("key", TOKENIZER_KEYS)
def test_a_tokenizer_config(key, tmp_path):
    write_byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    content = hf_folders.read_json(file)
    for value in STRANGE:
        file.write_text(json.dumps({**content, key: value}))
        if key in ("eos_token", "pad_token", "added_tokens_decoder") and isinstance(value, float):
            with pytest.raises(ConversionError, match=key):
                load_tokenizer(tmp_path)
        try:
            load_tokenizer(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            assert key in ("model_max_length", "tokenizer_class") or named(error, file.name, key)
    file.write_text("[]")
    with pytest.raises(ConversionError, match=r"tokenizer_config\.json must be an object"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_its_library_refuses(tmp_path):
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_config(key):
    assert declared_dtype({}) is declared_dtype({key: None}) is declared_dtype({key: "auto"}) is None
    assert declared_dtype({key: "torch.bfloat16"}) == declared_dtype({key: "bfloat16"}) == "bfloat16"
    for value in STRANGE:
        with pytest.raises(ConversionError, match=rf"config\.json: {key}=.* is not supported; known: float32, float16"):
            declared_dtype({key: value})
