"""A trained language model is written under the names of the folder it was read from, beside its other models."""

import hf_folders
import hf_towers
import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file

from converters.errors import ConversionError
from converters.export_hf import export_hf
from converters.export_towers import export_towers, has_towers
from converters.towers import text_names


def export(folder, config):
    target = hf_folders.target(config)
    return export_towers(folder / "text", folder / "in", folder / "out", target, max_shard_bytes=10**9)


@pytest.mark.parametrize("case", ["mistral3", "qwen3.5-moe"])
def test_trained_parameters_and_dtype_are_written_under_the_folders_names(case, tmp_path):
    hf_towers.save(tmp_path / "in", case)
    params, config, hf = hf_folders.load(tmp_path / "in")
    params["norm"]["scale"] = params["norm"]["scale"] + 1
    export_hf(params, config, hf, tmp_path / "text", dtype="bfloat16")
    export(tmp_path, config)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    norm = text_names(before).stored("model.norm.weight")
    for name, tensor in before.items():
        expected = (tensor + 1 if name == norm else tensor).to(after[name].dtype)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=0)
    assert {after[name].dtype for name in after if "vision" in name or "visual" in name} == {torch.float32}
    assert jnp.dtype(hf_folders.read_json(tmp_path / "out/config.json")["dtype"]) == jnp.bfloat16
    assert after[norm].dtype == torch.bfloat16
    assert has_towers(tmp_path / "in") and has_towers(tmp_path / "out") and not has_towers(tmp_path / "text")
    with pytest.raises(ConversionError, match="already exists and is not an empty folder"):
        export(tmp_path, config)
