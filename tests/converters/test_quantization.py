"""`quantization_config`: what is read, what is refused with the tool that dequantises it."""

import json

import pytest

from converters.errors import ConversionError
from converters.import_hf import read_config
from converters.quantization import integer_format, section_of_folder, weight_block_size

LLAMA = {"architectures": ["LlamaForCausalLM"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    "section",
    [None, {}, FP8, {"quant_method": "fp8"}, {"quant_method": "compressed-tensors", "format": "float-quantized"}],
)
def test_dequantised_while_it_is_read(section):
    config, hf = read_config({**LLAMA, "quantization_config": section})
    assert config == read_config(LLAMA)[0] and hf["quantization_config"] == section


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("section", "form"),
    [
        (GPTQ, ("gptq", 4, 128, True)),
        (GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}, ("gptq", 8, -1, False)),
        (AWQ, ("awq", 4, 128, False)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", 4, -1, False)),
    ],
)
def test_formats_of_integers(section, form):
    assert integer_format(section) == form
    assert read_config({**LLAMA, "quantization_config": section})[0] == read_config(LLAMA)[0]


@pytest.mark.parametrize(
    "section",
    [
        GPTQ | {"bits": 3},
        GPTQ | {"checkpoint_format": "marlin"},
        GPTQ | {"pack_dtype": "int8"},
        AWQ | {"version": "gemv"},
        AWQ | {"zero_point": False},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
    ids=str,
)
def test_other_formats_are_refused_with_a_tool(section):
    method = section["quant_method"]
    match = rf"config\.json: {method} with these settings of quantization_config is not supported; .*GPTQModel"
    with pytest.raises(ConversionError, match=match):
        read_config({**LLAMA, "quantization_config": section})


@pytest.mark.parametrize(("key", "value"), [("bits", "4"), ("bits", None), ("group_size", 0), ("group_size", 1.5)])
def test_sizes_that_are_none_are_refused(key, value):
    with pytest.raises(ConversionError, match=r"quantization_config needs integers bits and group_size"):
        read_config({**LLAMA, "quantization_config": GPTQ | {key: value}})


@pytest.mark.parametrize("size", [128, [128], [128, 0], ["a", 1], [1.5, 2], {}, True])
def test_a_block_size_that_is_none_is_named(size):
    section = {"quantization_config": {**FP8, "weight_block_size": size}}
    with pytest.raises(ConversionError, match=r"config\.json: quantization_config\.weight_block_size must be two"):
        read_config({**LLAMA, **section})


def test_the_section_of_a_folder(tmp_path):
    assert section_of_folder(tmp_path) == {}
    for text in ("{", "[]", "{}", '{"quantization_config": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert section_of_folder(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    assert weight_block_size(section_of_folder(tmp_path)) == (128, 128)


def test_the_tile_of_compressed_tensors_is_its_block_structure():
    group = {"weights": {"strategy": "block", "block_structure": [128, 64]}}
    assert weight_block_size({"config_groups": {"group_0": {"weights": None}, "group_1": group}}) == (128, 64)
    assert weight_block_size({"config_groups": [group]}) is None
