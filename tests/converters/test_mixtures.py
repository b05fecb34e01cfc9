"""Mixtures of experts equal those of transformers: logits, gradients, cached decoding, round trips, MXFP4."""

import json

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from converters.export_hf import export_hf
from converters.families.registry import weight_rows
from converters.import_hf import read_config
from converters.weight_rows import bind, flatten
from jaxtrain.nn.model import Model
from jaxtrain.types import Batch

LENGTH = 600  # short prompts hide mistakes in rope


def batch_of(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    return Batch(tokens, positions, ones, ones.astype(np.float32))


@pytest.mark.parametrize("case", hf_folders.MIXTURES)
def test_logits_gradients_and_decoding_equal_those_of_transformers(case, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 101, (1, LENGTH)).astype(np.int32)
    reference = hf_folders.hf_model(case)
    reference.save_pretrained(tmp_path)
    params, config, _ = hf_folders.load(tmp_path)
    model = Model(config)

    logits = reference(torch.from_numpy(tokens).long()).logits
    logits.logsumexp(-1).sum().backward()

    def loss(params):
        logits = model.logits(params, model.hidden(params, batch_of(tokens)))
        return jax.nn.logsumexp(logits, -1).sum(), logits

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = logits.detach().numpy()
    assert np.abs(expected).max() > 1  # a difference of 1e-4 would be none between logits of 1e-4
    assert np.abs(ours - expected).max() < 1e-4

    theirs = gradients(reference, case)
    grads = flatten(jax.tree.map(np.asarray, grads))
    for tensor in bind(weight_rows(config), {path: leaf.shape for path, leaf in grads.items()}, config):
        if not tensor.alias:
            expected = tensor.to_ours_in_full(theirs[tensor.name])
            difference = np.linalg.norm(grads[tensor.ours][tensor.stack] - expected)
            assert difference < 1e-3 * np.linalg.norm(expected) + 1e-5, tensor.name

    extend = jax.jit(model.extend)
    cache = model.empty_cache(1, LENGTH)
    parts = []
    for start, stop in ((0, LENGTH - 2), (LENGTH - 2, LENGTH - 1), (LENGTH - 1, LENGTH)):
        whole = batch_of(tokens)
        hidden, cache = extend(params, *(leaf[:, start:stop] for leaf in whole[:3]), cache)
        parts.append(hidden)
    assert np.abs(model.logits(params, jnp.concatenate(parts, 1)) - ours).max() < 1e-4


def gradients(reference, case):
    """Gradients by the checkpoint's tensor names: transformers fuses experts when it loads them."""
    found = {name: np.zeros(buffer.shape) for name, buffer in reference.named_buffers()}  # routers' biases have none
    for name, parameter in reference.named_parameters():
        grad = parameter.grad.numpy()
        if case in ("gpt-oss", "gemma4-moe") or ".experts." not in name:
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if case.startswith("mixtral") else name
            found[name] = grad
            continue
        layer = name.split(".mlp.")[0]
        for expert, matrix in enumerate(grad):
            if case.startswith("mixtral"):
                prefix, names = f"{layer}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")
            else:
                prefix, names = f"{layer}.mlp.experts.{expert}", ("gate_proj", "up_proj", "down_proj")
            parts = np.split(matrix, 2) if "gate_up" in name else [matrix]
            own = names[:2] if "gate_up" in name else names[2:]
            found |= {f"{prefix}.{one}.weight": part for one, part in zip(own, parts, strict=True)}
    return found


@pytest.mark.parametrize(
    "case", ["qwen3-moe", "mixtral", "gpt-oss", "qwen3-next", "qwen3.5-moe", "glm4-moe", "deepseek-v3", "gemma4-moe"]
)
@pytest.mark.parametrize("preset", [None, "fsdp_expert"])
def test_an_export_is_bit_identical_and_transformers_loads_it(case, preset, tmp_path):
    hf_folders.save(tmp_path / "in", case)
    params, config, hf = hf_folders.load(tmp_path / "in", preset=preset)
    export_hf(params, config, hf, tmp_path / "out")
    stored, written = hf_folders.tensors(tmp_path / "in"), hf_folders.tensors(tmp_path / "out")
    assert stored.keys() == written.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(array, written[name], err_msg=name)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading


def test_mxfp4_is_read_as_transformers_dequantises_it(tmp_path):
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    hf_folders.save(tmp_path / "a", "gpt-oss", torch.bfloat16, **changes)
    tensors, generator = load_file(tmp_path / "a" / "model.safetensors"), torch.Generator().manual_seed(0)
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape
        shape = (experts, outside, inside // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(110, 125, shape, dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales).view(torch.int16).numpy()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    hf_folders.edit_config(tmp_path / "a", **quantised)

    params, config, hf = hf_folders.load(tmp_path / "a", jnp.bfloat16, "fsdp_expert")
    export_hf(params, config, hf, tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    written = load_file(tmp_path / "b" / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name].view(torch.int16).numpy(), array)
    assert read_config(tmp_path / "b")[0] == config
