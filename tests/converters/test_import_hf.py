"""Import: correct shards on every device, no repeated reads, and errors that name the tensor."""

import json
import os
import subprocess
import sys

import hf_folders
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from converters.errors import ConversionError
from converters.families import qwen3
from converters.import_hf import import_params, read_config
from converters.safetensors_io import TensorSpec, plan_files, write_checkpoint
from converters.weight_rows import bind, flatten


def rewrite(folder, change):
    """Save the folder's tensors again after `change` edited the dict of them."""
    tensors = hf_folders.tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PHI = "phi3"  # tensors of which several of ours are made


@pytest.mark.parametrize("case", ["llama-biases", "qwen2-tied", "qwen3", PHI])
@pytest.mark.parametrize("preset", ["fsdp", "fsdp_tensor"])
def test_sharded_equals_whole(case, preset, tmp_path):
    folder = hf_folders.save(tmp_path, case, shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole, sharded = (flatten(hf_folders.load(folder, preset=p)[0]) for p in (None, preset))
    assert whole.keys() == sharded.keys()
    for path, array in sharded.items():
        np.testing.assert_array_equal(array, whole[path], err_msg=path)
    kernel = sharded["layers.mlp.up_proj.kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(stored, wanted, tmp_path):
    params, *_ = hf_folders.load(hf_folders.save(tmp_path, dtype=stored), dtype=jnp.dtype(wanted))
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == wanted
    theirs = hf_folders.tensors(tmp_path)["model.layers.2.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(kernel[2], theirs.astype(wanted))


def test_mixed_dtypes_in_one_file(tmp_path):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16 if "proj" in name else np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float16)

    folder = rewrite(hf_folders.save(tmp_path), change)
    params, theirs = hf_folders.load(folder)[0], hf_folders.tensors(folder)
    for layer in range(3):
        expected = theirs[f"model.layers.{layer}.mlp.up_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(params["layers"]["mlp"]["up_proj"]["kernel"][layer], expected)
    np.testing.assert_array_equal(params["norm"]["scale"], theirs["model.norm.weight"])


@pytest.mark.parametrize("case", ["qwen3", PHI])
@pytest.mark.parametrize("preset", [None, "fsdp", "fsdp_tensor"])
def test_every_byte_is_read_once(case, preset, tmp_path, monkeypatch):
    """Norms are replicated on eight devices, and `fsdp` splits rows into short runs: neither is read eight times."""
    folder = hf_folders.save(tmp_path, case)
    config, _ = read_config(folder)
    target = hf_folders.target(config, preset=preset)
    read = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(real(*args)) or read[-1])
    import_params(folder, config, target)
    assert sum(read) == sum(array.nbytes for array in hf_folders.tensors(folder).values())


def test_padded_vocabulary_is_zero(tmp_path):
    params, *_ = hf_folders.load(hf_folders.save(tmp_path), preset="fsdp_tensor")
    assert params["embed"]["weight"].shape == (128, 56)
    assert params["lm_head"]["kernel"].shape == (56, 128)
    assert not np.asarray(params["embed"]["weight"])[101:].any()
    assert not np.asarray(params["lm_head"]["kernel"])[:, 101:].any()


def test_missing_tensor(tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.wieght"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    folder = rewrite(hf_folders.save(tmp_path), change)
    message = (
        r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight; did you mean model\.layers\.1\.mlp\.up_proj\.wieght"
    )
    with pytest.raises(ConversionError, match=message):
        hf_folders.load(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.input_layernorm.weight"])
def test_extra_tensor(name, tmp_path):
    folder = rewrite(hf_folders.save(tmp_path), lambda tensors: tensors.update({name: np.zeros(64, np.float32)}))
    with pytest.raises(ConversionError, match=f"holds tensor {name}, which the model of config.json lacks"):
        hf_folders.load(folder)


def test_misshapen_tensor(tmp_path):
    name = "model.layers.2.self_attn.k_proj.weight"
    folder = rewrite(hf_folders.save(tmp_path), lambda tensors: tensors.update({name: np.zeros((56, 32), np.float32)}))
    message = r"holds tensor .*2\.self_attn\.k_proj\.weight as \[56, 32\], config\.json says \[32, 56\]"
    with pytest.raises(ConversionError, match=message):
        hf_folders.load(folder)


def test_a_wrong_head_count_does_not_pass_as_a_reshape(tmp_path):
    """8 heads of width 8 have the same weight shapes as 4 of width 16; q_norm distinguishes them in Qwen3."""
    folder = hf_folders.edit_config(hf_folders.save(tmp_path), num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ConversionError, match=r"_norm\.weight as \[16\], config\.json says \[8\]"):
        hf_folders.load(folder)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2-tied"])
def test_old_rotary_buffers_are_skipped(case, tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32) for i in range(3)}
    hf_folders.load(rewrite(hf_folders.save(tmp_path, case), lambda tensors: tensors.update(buffers)))


def test_tied_checkpoint_that_stores_its_head_only(tmp_path):
    folder = hf_folders.save(tmp_path, "qwen3-tied")
    expected = flatten(hf_folders.load(folder)[0])
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    params = flatten(hf_folders.load(folder)[0])
    assert params.keys() == expected.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_tied_checkpoint_that_stores_its_head(tmp_path):
    folder = hf_folders.save(tmp_path, "qwen3-tied")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    params, *_ = hf_folders.load(folder)
    assert "lm_head" not in params
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(
        ConversionError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but their values differ"
    ):
        hf_folders.load(folder)


MEASURE = """
import threading, time, sys
import jax, jax.numpy as jnp, psutil
import hf_folders
from converters.import_hf import import_params, read_config
config, _ = read_config(sys.argv[1])
target = hf_folders.target(config, jnp.dtype(sys.argv[2]), "fsdp")
jax.block_until_ready(jax.device_put(jnp.ones(8), jax.devices()[7]))
process, peak, done = psutil.Process(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.0005)
before = process.memory_info().rss
watcher = threading.Thread(target=watch); watcher.start()
params = jax.block_until_ready(import_params(sys.argv[1], config, target))
done = True; watcher.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(size, peak - before)
"""
SHAPE = {
    "vocab_size": 20_000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_on_eight_devices_peaks_under_1_3_times_the_checkpoint(dtype, tmp_path):
    hf = {"architectures": ["Qwen3ForCausalLM"], **SHAPE, "num_hidden_layers": 16 if dtype == "float32" else 32}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config, _ = read_config(tmp_path)
    shapes = {path: leaf.shape for path, leaf in flatten(hf_folders.target(config)).items()}
    specs = [TensorSpec(t.name, np.dtype(dtype), t.shape) for t in bind(qwen3.WEIGHTS, shapes, config) if not t.alias]
    stored = {spec.name: np.full(spec.shape, 0.5, spec.dtype) for spec in specs}
    write_checkpoint(tmp_path, plan_files(specs, 10**9), stored.__getitem__)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        env={**os.environ, "PYTHONPATH": os.path.dirname(hf_folders.__file__)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    size, peak = map(int, run.stdout.split())
    assert size > 200e6
    assert peak > 0.9 * size  # the measurement sees the parameters at all
    assert peak < 1.3 * size, f"{peak / size:.2f} times the checkpoint"
