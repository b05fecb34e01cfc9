"""A trained language model is written under the names of the folder it was read from, beside its other models."""

import hf_folders
import hf_towers
import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import ConversionError
from converters.export_hf import export_hf
from converters.export_towers import export_towers, has_others, has_towers
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


def test_layers_of_multi_token_prediction_are_carried_through(tmp_path):
    """Of a folder that declares them; of others they are refused, as all tensors that the model does not have."""
    source = hf_folders.save(tmp_path / "in", "glm4-moe", num_hidden_layers=2)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3, 5), "model.layers.2.embed_tokens.weight": torch.ones(2)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", {"format": "pt"})
    hf_folders.edit_config(source, "num_mtp_layers", num_nextn_predict_layers=0)
    assert not has_others(source)
    with pytest.raises(ConversionError, match=r"holds tensor model\.layers\.2\.eh_proj\.weight"):
        hf_folders.load(source)
    hf_folders.edit_config(source, num_nextn_predict_layers=1)
    assert has_others(source) and not has_towers(source)
    params, config, hf = hf_folders.load(source)
    export_hf(params, config, hf, tmp_path / "text")
    export(tmp_path, config)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() > extra.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    assert hf_folders.read_json(tmp_path / "out/config.json") == hf_folders.read_json(source / "config.json")


def test_keys_and_values_of_layers_that_reuse_others_are_carried_through(tmp_path):
    """Published folders hold them, and transformers does not use them."""
    source = hf_folders.save(tmp_path / "in", "gemma4")
    unused = {f"model.layers.3.self_attn.{name}.weight": torch.ones(2) for name in ("k_proj", "v_proj", "k_norm")}
    save_file(load_file(source / "model.safetensors") | unused, source / "model.safetensors", {"format": "pt"})
    params, config, hf = hf_folders.load(source)
    export_hf(params, config, hf, tmp_path / "text")
    export(tmp_path, config)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() > unused.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
