"""`quantization_config`: what is read, what is refused with the tool that dequantises it."""

import json

import pytest

from converters.errors import ConversionError
from converters.import_hf import read_config
from converters.quantization import tile_of_folder, weight_block_size

LLAMA = {"architectures": ["LlamaForCausalLM"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    "section",
    [None, {}, FP8, {"quant_method": "fp8"}, {"quant_method": "compressed-tensors", "format": "float-quantized"}],
)
def test_dequantised_while_it_is_read(section):
    config, hf = read_config({**LLAMA, "quantization_config": section})
    assert config == read_config(LLAMA)[0] and hf["quantization_config"] == section


@pytest.mark.parametrize(
    ("method", "tool"),
    [
        ("gptq", "GPTQModel"),
        ("awq", "GPTQModel"),
        ("compressed-tensors", "GPTQModel"),
        ("bitsandbytes", r"dequantize\(\)\.save_pretrained"),
    ],
)
def test_other_formats_are_refused_with_a_tool(method, tool):
    with pytest.raises(
        ConversionError, match=rf"config\.json: quantization_config='{method}' is not supported; .*{tool}"
    ):
        read_config({**LLAMA, "quantization_config": {"quant_method": method, "bits": 4, "format": "pack-quantized"}})


@pytest.mark.parametrize("size", [128, [128], [128, 0], ["a", 1], [1.5, 2], {}, True])
def test_a_block_size_that_is_none_is_named(size):
    section = {"quantization_config": {**FP8, "weight_block_size": size}}
    with pytest.raises(ConversionError, match=r"config\.json: quantization_config\.weight_block_size must be two"):
        read_config({**LLAMA, **section})


def test_the_tile_of_a_folder(tmp_path):
    assert tile_of_folder(tmp_path) is None
    for text in ("{", "[]", "{}", '{"quantization_config": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert tile_of_folder(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    assert tile_of_folder(tmp_path) == (128, 128)


def test_the_tile_of_compressed_tensors_is_its_block_structure():
    group = {"weights": {"strategy": "block", "block_structure": [128, 64]}}
    assert weight_block_size({"config_groups": {"group_0": {"weights": None}, "group_1": group}}) == (128, 64)
    assert weight_block_size({"config_groups": [group]}) is None
