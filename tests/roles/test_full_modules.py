"""Modules that are trained in full beside adapters: `model.lora.modules_to_save`."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from converters.weight_rows import flatten
from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.config.model import LoraSection
from jaxtrain.ops.quantize import Quantized
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import FSDP
from jaxtrain.roles.declare import declare
from jaxtrain.roles.initial import full_params, initial_params

MIXTURE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def section_of(names, hf=None, lora=None, **changes):
    lora = LoraSection(**{"rank": 2, "modules_to_save": names, **(lora or {})})
    config = tiny.HF_CONFIG | {"num_key_value_heads": 2, **(hf or {})}
    return ModelSection(config=config, lora=lora, **changes)


def declared(names, mesh=None, **options):
    mesh = mesh or MeshSection()
    return declare(section_of(names, **options), make_mesh(mesh), mesh.preset)


@pytest.mark.parametrize(
    ("names", "hf", "paths"),
    [
        (["embed_tokens"], {}, {"embed.weight"}),
        (["embed"], {}, {"embed.weight"}),
        (["embed_tokens", "lm_head"], {}, {"embed.weight"}),  # tied: one tensor
        (["lm_head"], {"tie_word_embeddings": False}, {"lm_head.kernel"}),
        (["model.embed_tokens", "*head"], {"tie_word_embeddings": False}, {"embed.weight", "lm_head.kernel"}),
        (["norm"], {}, {"norm.scale"}),  # whole names, not what ends so
        (["*_layernorm"], {}, {"layers.input_norm.scale", "layers.mlp_norm.scale"}),
        (["model.layers.*.input_layernorm"], {}, {"layers.input_norm.scale"}),
        (["self_attn.q_norm", "attn.k_norm"], {}, {"layers.attn.q_norm.scale", "layers.attn.k_norm.scale"}),
        (["mlp.gate"], MIXTURE, {"layers.mlp.router.kernel"}),
        ([], {}, set()),
    ],
)
def test_names_are_those_of_transformers_or_ours(names, hf, paths):
    lora = {"targets": ["attn.*"]}
    made = declared(names, hf=hf, lora=lora)
    assert set(made.model.lora.full_paths) == paths
    trained = flatten(made.trained).keys()
    assert trained == paths | flatten(declared(None, hf=hf, lora=lora).trained).keys()
    assert not trained & flatten(made.frozen).keys()
    assert trained | flatten(made.frozen).keys() == flatten(made.target).keys()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["embed_token"], {}, r"no module 'embed_token'; did you mean embed_tokens\? \(it has .*embed_tokens, "),
        (["layers.0.input_layernorm"], {}, r"layers are stacked.*write layers\.\*"),
        (["lm_head"], {}, r"lm_head is tied to the embedding, both are one tensor"),
        (["q_proj"], {}, r"names layers\.attn\.q_proj, which has an adapter"),
        (["mlp"], {}, r"names layers\.mlp\.\w+_proj, which has an adapter"),
        (["mlp"], {"lora": {"targets": ["q_proj"]}, "quantize": "nf4"}, r"kernel model\.quantize=nf4 stores in blocks"),
        (["lm_head"], {"hf": {"tie_word_embeddings": False}, "head": "scalar"}, r"no module 'lm_head'"),
        (["value_head"], {"head": "scalar"}, r"value_head is trained anyway"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused(names, options, message):
    with pytest.raises(ValueError, match=rf"model\.lora\.modules_to_save.*{message}"):
        declared(names, **options)


def test_what_is_trained_in_full_has_the_adapters_dtype_and_the_presets_sharding():
    made = declared(["embed_tokens", "norm"], param_dtype="bfloat16")
    embed = made.trained["embed"]["weight"]
    assert (embed.dtype, embed.sharding.spec) == ("float32", PartitionSpec(None, FSDP))
    assert made.trained["norm"]["scale"].dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made.frozen)} == {"bfloat16"}
    assert made.trained_axes["embed"]["weight"] == ("vocab", "embed")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_initial_values_are_the_bases(quantize):
    plain = section_of(None, quantize=quantize)
    base = initial_params(plain, declare(plain, make_mesh(MeshSection()), "fsdp"), 3)[1]
    section = section_of(["embed_tokens", "*_layernorm"], quantize=quantize)
    made = declare(section, make_mesh(MeshSection()), "fsdp")
    trained, frozen = initial_params(section, made, 3)
    assert jax.tree.structure(frozen) == jax.tree.structure(made.frozen)
    assert isinstance(frozen["layers"]["attn"]["q_proj"]["kernel"], Quantized) == (quantize is not None)
    assert "embed" not in frozen and frozen["norm"]["scale"].sharding == base["norm"]["scale"].sharding
    np.testing.assert_array_equal(trained["embed"]["weight"], base["embed"]["weight"])
    copy = flatten(full_params(section, made, 3))
    assert copy.keys() == set(made.model.lora.full_paths)
    for path, leaf in copy.items():
        np.testing.assert_array_equal(leaf, flatten(trained)[path])
