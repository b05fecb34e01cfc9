"""PEFT folders: `peft` loads ours, and we load those of `peft`."""

import json
from dataclasses import replace

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from converters.adapters import export_adapter, import_adapter, read_lora
from converters.errors import ConversionError
from converters.export_hf import export_hf
from converters.families.registry import weight_rows
from converters.import_hf import read_config
from converters.weight_rows import bind, by_name, flatten, fuse
from jaxtrain.config import MeshSection, parse_config
from jaxtrain.lora import check_targets, join, merge_adapters, split_adapters
from jaxtrain.nn.config import Lora
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.initial import adapter_params, initial_params
from jaxtrain.types import Batch

peft = pytest.importorskip("peft")
TOKENS = np.arange(3, 27)[None]
LORA = Lora(5, 7.0, 0.0, ("attn.*", "down_proj"))


def logits(model, params):
    ones = np.ones_like(TOKENS)
    return model.logits(params, model.hidden(params, Batch(TOKENS, np.arange(24)[None], ones, ones)))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def with_adapters(folder, lora):
    """Our model on the checkpoint in `folder`, its base parameters, and random adapters."""
    base, config, _ = hf_folders.load(folder)
    model = Model(config, lora)
    return model, base, split_adapters(tiny.random_params(model))[0]


@pytest.mark.parametrize("case", ["llama-biases", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_with_our_adapters(case, rslora, tmp_path):
    model, base, adapters = with_adapters(hf_folders.save(tmp_path / "base", case), replace(LORA, rslora=rslora))
    out = export_adapter(adapters, model.config, model.lora, tmp_path / "adapter", str(tmp_path / "base"))
    assert hf_folders.read_json(out / "adapter_config.json")["target_modules"] == [
        *("down_proj", "k_proj", "o_proj", "q_proj", "v_proj")
    ]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    ours = logits(model, join(adapters, base))
    np.testing.assert_allclose(ours, torch_logits(loaded), atol=1e-4)
    merged = logits(Model(model.config), merge_adapters(join(adapters, base), model.lora))
    np.testing.assert_allclose(ours, merged, atol=1e-4)
    assert np.abs(ours - logits(Model(model.config), base)).max() > 0.1


FULL = ("embed.weight", "norm.scale", "layers.attn.q_norm.scale")


@pytest.mark.parametrize(
    ("case", "paths", "names"),
    [
        ("qwen3", (*FULL, "lm_head.kernel"), ["embed_tokens", "lm_head", "model.norm", "q_norm"]),
        ("qwen3-tied", ("embed.weight",), ["embed_tokens", "lm_head"]),
        ("llama", ("layers.input_norm.scale", "norm.scale"), ["input_layernorm", "model.norm"]),
    ],
)
def test_peft_computes_with_modules_that_were_trained_in_full(case, paths, names, tmp_path):
    base, config, _ = hf_folders.load(hf_folders.save(tmp_path / "base", case))
    model = Model(config, replace(LORA, full_paths=paths))
    trained, _ = model.split(tiny.random_params(model))
    out = export_adapter(trained, config, model.lora, tmp_path / "adapter", str(tmp_path / "base"))
    assert hf_folders.read_json(out / "adapter_config.json")["modules_to_save"] == names
    params = join(trained, model.split(base)[1])
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    np.testing.assert_allclose(logits(model, params), torch_logits(loaded), atol=1e-4)
    lora = read_lora(out, config)
    assert set(lora.full_paths) == set(paths)
    again = import_adapter(
        out, config, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)
    )
    jax.tree.map(np.testing.assert_array_equal, again, trained)

    tensors = load_file(out / "adapter_model.safetensors")
    name = max(name for name in tensors if ".lora_" not in name)
    save_file({key: leaf for key, leaf in tensors.items() if key != name}, out / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=rf"lacks adapter tensor {name}|names \S+, of which the folder holds no"):
        import_adapter(out, config, trained) if read_lora(out, config) else None


def test_training_continues_from_pefts_modules_to_save(tmp_path):
    """Also where PEFT keeps a head tied to its embedding."""
    names = ["embed_tokens", "norm"]  # PEFT compares ends: of the norms within layers as well
    folder, expected = save_peft(tmp_path, "qwen3-tied", modules_to_save=names, ensure_weight_tying=True, change=True)
    section = {"path": str(tmp_path / "base"), "lora": {"path": str(folder)}}
    config = parse_config({"recipe": "sft", "model": section, "data": {"train": {"path": "x"}}}, "test").model
    policy = declare(config, make_mesh(MeshSection()), "fsdp")
    norms = {f"layers.{name}.scale" for name in ("input_norm", "mlp_norm", "attn.q_norm", "attn.k_norm")}
    assert set(policy.model.lora.full_paths) == {"embed.weight", "norm.scale", *norms}
    params = jax.tree.map(jnp.asarray, jax.device_get(join(*initial_params(config, policy, 0))))  # off the mesh
    np.testing.assert_allclose(logits(Model(policy.model.config, policy.model.lora), params), expected, atol=1e-4)
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"modules_to_save": ["embed_tokens"]})})
    with pytest.raises(ValueError, match=r"modules_to_save=\['embed_tokens'\], but the adapter in .* has"):
        declare(other, make_mesh(MeshSection()), "fsdp")


def test_modules_to_save_that_untie_the_head_are_refused(tmp_path):
    folder, _ = save_peft(tmp_path, "qwen3-tied", modules_to_save=["embed_tokens", "lm_head"], change=True)
    config = hf_folders.load(tmp_path / "base")[1]
    model = Model(config, read_lora(folder, config))
    assert model.lora is not None and model.lora.full_paths == ("embed.weight",)
    with pytest.raises(
        ConversionError, match=r"ties .*lm_head\.weight to .*embed_tokens\.weight, but their values differ"
    ):
        import_adapter(folder, config, model.split(model.abstract())[0])


def test_adapters_of_experts_are_merged_into_what_transformers_computes(tmp_path):
    """PEFT cannot represent them, so the merged weights of both sides are compared."""
    base, config, hf = hf_folders.load(hf_folders.save(tmp_path / "base", "qwen3-moe"))
    model = Model(config, replace(LORA, targets=("experts.*", "q_proj")))
    adapters = split_adapters(tiny.random_params(model))[0]
    assert len(jax.tree.leaves(adapters["layers"]["mlp"]["experts"])) == 2 * 3  # factors, linears
    ours = logits(model, join(adapters, base))
    merged = merge_adapters(join(adapters, base), model.lora)
    np.testing.assert_allclose(ours, logits(Model(config), merged), atol=1e-4)
    assert np.abs(ours - logits(Model(config), base)).max() > 0.1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export_hf(merged, config, hf, tmp_path / "merged"))
    np.testing.assert_allclose(ours, torch_logits(loaded), atol=1e-4)


def save_peft(tmp_path, case="qwen3-biases", change=False, **options):
    """A random adapter saved by `peft`: the folder, and the logits of the model with it. `change` trains what else is
    in it: the modules to save."""
    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 9, "target_modules": "all-linear", "init_lora_weights": False} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(hf_folders.hf_model(case), config)
    hf_folders.save(tmp_path / "base", case)
    for name, parameter in model.named_parameters():
        if change and "modules_to_save" in name:
            torch.nn.init.normal_(parameter, 1, 0.1) if "norm" in name else torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", torch_logits(model)


def test_training_continues_from_a_peft_adapter_on_eight_devices(tmp_path):
    folder, expected = save_peft(tmp_path, use_rslora=True)
    section = {"path": str(tmp_path / "base"), "param_dtype": "bfloat16", "lora": {"path": str(folder)}}
    config = parse_config({"recipe": "sft", "model": section, "data": {"train": {"path": "x"}}}, "test")
    policy = declare(config.model, make_mesh(config.mesh), config.mesh.preset)
    lora = policy.model.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.rslora) == (3, 9.0, True) and len(lora.targets) == 7
    adapters = adapter_params(config.model, policy, 0, {})
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(adapters)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(policy.frozen)} == {"bfloat16"}
    base, model_config, _ = hf_folders.load(tmp_path / "base")
    ours = logits(Model(model_config, lora), join(jax.device_get(adapters), base))
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    again = export_adapter(adapters, model_config, lora, tmp_path / "again", None)  # and back, bit for bit
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)

    for key, value in (("rank", 4), ("alpha", 3.0), ("rslora", False), ("targets", ["q_proj"])):
        asked = section | {"lora": {"path": str(folder), key: value}}
        wrong = parse_config({"recipe": "sft", "model": asked, "data": {"train": {"path": "x"}}}, "test")
        with pytest.raises(ValueError, match=rf"model\.lora\.{key}=.* but the adapter in"):
            declare(wrong.model, make_mesh(wrong.mesh), wrong.mesh.preset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .*save it with path_initial_model_for_weight_conv"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.* belongs to no linear module of the model"),
        ({"case": "qwen3-moe", "target_modules": [], "target_parameters": ["experts.down_proj"]}, "target_parameters="),
    ],
    ids=str,
)
def test_an_adapter_with_lora_extensions_is_refused_with_what_to_do(options, message, tmp_path):
    folder, _ = save_peft(tmp_path, **options)
    with pytest.raises(ConversionError, match=f"{message}.*merge_and_unload"):
        read_lora(folder, hf_folders.load(tmp_path / "base")[1])


def imported(tmp_path, folder):
    """Our model with the adapter in a folder: the model, all parameters, and the adapters."""
    base, config, _ = hf_folders.load(tmp_path / "base")
    model = Model(config, read_lora(folder, config))
    adapters = import_adapter(folder, config, model.split(model.abstract())[0])
    return model, join(adapters, base), adapters


PATTERNS = {"target_modules": ["q_proj", "down_proj", "o_proj"], "rank_pattern": {r"layers\.0\.self_attn.q_proj": 2}}


@pytest.mark.parametrize(
    "options",
    [
        PATTERNS | {"alpha_pattern": {"q_proj": 5, "down_proj": 1}},
        PATTERNS | {"rank_pattern": {"q_proj": 7, "o_proj": 4}},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "use_rslora": True},
        {"target_modules": r"model\.layers\.1\..*\.(v|k)_proj"},
        {"case": "phi3", "target_modules": "all-linear"},
        {"case": "qwen3.5", "target_modules": ["q_proj", "in_proj_qkv", "in_proj_z", "down_proj"]},
        {"case": "glm4", "target_modules": ["q_proj", "gate_up_proj"], "rank_pattern": {"gate_up_proj": 6}},
    ],
    ids=str,
)
def test_peft_adapters_of_unlike_modules(options, tmp_path):
    """Ranks, scales, single layers and fused matrices compute what they do in PEFT, and survive an export."""
    folder, expected = save_peft(tmp_path, **options)
    model, params, adapters = imported(tmp_path, folder)
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
    again = export_adapter(adapters, model.config, model.lora, tmp_path / "again", str(tmp_path / "base"))
    np.testing.assert_allclose(torch_logits(peft.AutoPeftModelForCausalLM.from_pretrained(again)), expected, atol=1e-4)
    _, params, _ = imported(tmp_path, again)
    np.testing.assert_allclose(logits(Model(model.config, read_lora(again, model.config)), params), expected, atol=1e-4)


def test_ranks_that_a_module_lacks_are_not_trained(tmp_path):
    folder, _ = save_peft(tmp_path, **PATTERNS, layers_to_transform=[0, 1])
    model, params, _ = imported(tmp_path, folder)
    grads = jax.grad(lambda params: jax.nn.logsumexp(logits(model, params), -1).sum())(params)
    a, b = (grads["layers"]["attn"]["q_proj"][name] for name in ("lora_a", "lora_b"))
    assert np.abs(a[0, :, :2]).min() > 0 and np.abs(a[1]).min() > 0 and np.abs(b[1]).min() > 0
    assert not a[0, :, 2:].any() and not b[0, 2:].any() and not a[2].any() and not b[2].any()


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    model, _, adapters = with_adapters(hf_folders.save(tmp_path / "base", "qwen3"), LORA)
    out = export_adapter(adapters, model.config, model.lora, tmp_path / "adapter", None)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), adapters)
    tensors = load_file(out / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, rf"lacks adapter tensor {name}"),
        (tensors | {name: tensors[name][:2]}, rf"{name} is \[2, 56\], the model needs \[5, 56\]"),
    ):
        save_file(changed, out / "adapter_model.safetensors")
        with pytest.raises(ConversionError, match=message):
            import_adapter(out, model.config, target)
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ConversionError, match="peft_type=IA3"):
        read_lora(out, model.config)


@pytest.mark.parametrize("case", hf_folders.CASES)
def test_factors_are_laid_out_as_their_kernel_in_every_family(case, tmp_path):
    """B @ A in PEFT's layout equals a @ b after the ops of the kernel's row; what PEFT cannot represent is refused."""
    config, _ = read_config(hf_folders.hf_config(case).to_dict())
    params = Model(config, Lora(3, 3.0, 0.0, ("attn.*", "mlp.*_proj"))).abstract()
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), split_adapters(params)[0])
    lora = Lora(3, 3.0, 0.0, ("all-linear",))
    try:
        out = export_adapter(jax.tree.map(jnp.asarray, adapters), config, lora, tmp_path / "out", None)
    except ConversionError as error:
        assert "PEFT cannot represent" in str(error) and (config.moe is not None or "3.5" in case)
        return
    factors = load_file(out / "adapter_model.safetensors")
    kernels = flatten(jax.tree.map(np.asarray, _products(adapters)))
    tensors = by_name(bind(weight_rows(config), {path: kernel.shape for path, kernel in kernels.items()}, config))
    assert len(factors) == 2 * len(tensors)
    for name, parts in tensors.items():
        module = name.removesuffix(".weight")
        a, b = (factors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        expected = fuse(parts, lambda tensor: kernels[tensor.ours][tensor.stack])
        np.testing.assert_allclose(expected, b @ a, atol=1e-5)


def _products(node):
    if "lora_a" not in node:
        return {name: _products(inner) for name, inner in node.items()}
    return {"kernel": np.stack([np.tensordot(a, b, 1) for a, b in zip(node["lora_a"], node["lora_b"], strict=True)])}


@pytest.mark.parametrize(
    ("target", "count"),
    [("q_proj", 1), ("attn.*", 4), ("layers.*.attn.q_proj", 1), ("all-linear", 7), ("*.mlp.*", 3), ("mlp.[gu]*", 2)],
)
def test_targets_are_names_or_globs(target, count):
    shapes = tiny.model(lora=replace(tiny.LORA, targets=(target,))).abstract()
    check_targets([target], shapes)
    assert len(jax.tree.leaves(split_adapters(shapes)[0])) == 2 * count


def test_a_target_in_one_layer_is_refused():
    with pytest.raises(ValueError, match=r"layers are stacked.*write layers\.\*"):
        check_targets(["layers.2.attn.q_proj"], tiny.model().abstract())
