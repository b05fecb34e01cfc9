"""FP8 matrices are read as the products of their numbers and scales, whole and by rectangles."""

import json

import hf_folders
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.errors import ConversionError
from converters.import_hf import read_config
from converters.safetensors_io import open_checkpoint

NAME = "model.layers.0.mlp.gate_proj.weight"
SHAPE = (20, 12)
WEIGHT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def write(folder, scales, suffix="_scale_inv", weight=WEIGHT, **section):
    tensors = {NAME: weight, NAME + suffix: scales, "norm": torch.ones(3)}
    if suffix == "_scale":
        tensors[NAME.replace(".weight", ".input_scale")] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", **section}}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_scale_for_each_tile(tmp_path):
    scales = torch.rand(3, 3) + 0.5
    write(tmp_path, scales, weight_block_size=[8, 5])
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.entries) == {NAME, "norm"} and checkpoint.dtype(NAME) == ml_dtypes.bfloat16
        whole = checkpoint.read(NAME)
        rectangle = checkpoint.read(NAME, (slice(3, 19), slice(4, 11)))
    repeated = scales.repeat_interleave(8, 0)[:20].repeat_interleave(5, 1)[:, :12]
    np.testing.assert_array_equal(whole.astype(np.float32), (WEIGHT.float() * repeated).bfloat16().float().numpy())
    np.testing.assert_array_equal(rectangle, whole[3:19, 4:11])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (20,), (20, 1)])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_a_scale_for_the_matrix_or_for_each_row(shape, suffix, tmp_path):
    scales = torch.rand(shape) + 0.5
    write(tmp_path, scales, suffix)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.entries) == {NAME, "norm"}
        ours = checkpoint.read(NAME, (slice(5, 20), slice(0, 12))).astype(np.float32)
    by_row = scales.reshape(-1, 1) if scales.numel() > 1 else scales.reshape(1, 1)
    np.testing.assert_array_equal(ours, (WEIGHT.float() * by_row).bfloat16().float().numpy()[5:])


def test_scales_that_do_not_fit_and_missing_ones(tmp_path):
    write(tmp_path, torch.ones(3, 2), weight_block_size=[8, 5])
    with pytest.raises(ConversionError, match=rf"{NAME} \[20, 12\] .* scales \[3, 2\] .*weight_block_size=\[8, 5\]"):
        open_checkpoint(tmp_path)
    save_file({NAME: WEIGHT}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"{NAME} is F8_E4M3 and has no {NAME}_scale_inv"):
        open_checkpoint(tmp_path)


def test_a_model_in_fp8_is_the_model_of_its_dequantised_weights(tmp_path):
    """Norms, embedding and head stay in the checkpoint's dtype; the export's config names no quantisation."""
    (tmp_path / "fp8").mkdir()
    hf_folders.save(tmp_path / "plain", "qwen3", torch.bfloat16)
    stored = {name: torch.from_numpy(array.astype(np.float32)) for name, array in _arrays(tmp_path / "plain").items()}
    quantised, dense = {}, {}
    for name, tensor in stored.items():
        dense[name] = quantised[name] = tensor.bfloat16()
        if "_proj" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 448
            numbers = (tensor / scale).to(torch.float8_e4m3fn)
            quantised[name], quantised[f"{name}_scale_inv"] = numbers, scale
            dense[name] = (numbers.float() * scale).bfloat16()
    save_file(quantised, tmp_path / "fp8" / "model.safetensors")
    save_file(dense, tmp_path / "plain" / "model.safetensors")
    config = hf_folders.read_json(tmp_path / "plain" / "config.json")
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "fp8")[0] == read_config(tmp_path / "plain")[0]
    ours, expected = hf_folders.load(tmp_path / "fp8")[0], hf_folders.load(tmp_path / "plain")[0]
    for name in ("gate_proj", "down_proj"):
        np.testing.assert_array_equal(ours["layers"]["mlp"][name]["kernel"], expected["layers"]["mlp"][name]["kernel"])
    np.testing.assert_array_equal(ours["embed"]["weight"], expected["embed"]["weight"])


def _arrays(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}
