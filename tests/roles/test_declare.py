import jax
import pytest
import tiny
from jax.sharding import PartitionSpec

from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.config.model import LoraSection, RematSection
from jaxtrain.ops.quantize import Quantized
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import FSDP
from jaxtrain.roles.declare import LORA_TARGETS, declare


def declared(mesh=None, **section):
    mesh = mesh or MeshSection()
    config = tiny.HF_CONFIG | {"num_key_value_heads": 2}
    return declare(ModelSection(config=config, **section), make_mesh(mesh), mesh.preset)


def test_every_parameter_has_a_shape_a_dtype_and_the_sharding_of_the_preset():
    made = declared(MeshSection(fsdp=4, tensor=2, preset="fsdp_tensor"), param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made.target)} == {"bfloat16"}
    kernel = made.target["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (1, 16, 16) and kernel.sharding.spec == PartitionSpec(None, FSDP, "tensor")
    assert made.mesh.shape["tensor"] == 2 and made.model.config.padded_vocab == 128
    assert made.trained == made.target and made.frozen == {}


def test_under_lora_the_adapters_are_trained_and_the_base_is_frozen():
    made = declared(lora=LoraSection(rank=2))
    lora = made.model.lora
    assert (lora.rank, lora.alpha, lora.targets) == (2, 32.0, LORA_TARGETS)
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(made.trained)} == {"lora_a", "lora_b"}
    assert len(jax.tree.leaves(made.trained)) == 2 * len(LORA_TARGETS)
    assert len(jax.tree.leaves(made.trained)) + len(jax.tree.leaves(made.frozen)) == len(jax.tree.leaves(made.target))
    assert jax.tree.structure(made.trained) == jax.tree.structure(
        made.trained_axes, is_leaf=lambda node: isinstance(node, tuple)
    )


def test_quantised_kernels_are_declared_as_they_are_stored():
    frozen = declared(lora=LoraSection(rank=2), quantize="int8").frozen
    kernel = frozen["layers"]["attn"]["q_proj"]["kernel"]
    assert isinstance(kernel, Quantized) and kernel.codes.dtype == "int8" and kernel.shape == (1, 16, 2, 8)
    assert not isinstance(frozen["embed"]["weight"], Quantized)


def test_layers_are_unrolled_where_the_backward_pass_saves_all():
    assert declared(remat="none").model.run.unroll and not declared(remat="full").model.run.unroll


def test_named_activations_are_the_policy_of_the_layers():
    places = dict(declared(remat=RematSection(gate="offload")).model.run.remat)
    assert places.pop("gate") == "offload" and set(places.values()) == {"recompute"}


def test_the_chunk_of_the_head_is_that_of_the_platform_or_the_section():
    assert declared().model.run.head_chunk == 512
    assert declared(head_chunk=64).model.run.head_chunk == 64


def test_compiler_options_are_those_of_the_run():
    options = {"xla_cpu_enable_fast_math": True}
    assert declared(compiler_options=options).model.run.compiler_options == (("xla_cpu_enable_fast_math", True),)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lora": LoraSection(targets=["qproj"])}, "no linear 'qproj'; did you mean q_proj"),
        ({"compiler_options": {"xla_no_such": True}}, "model.compiler_options.xla_no_such=True is refused .* for cpu"),
        ({"router_z_loss_coef": 0.1}, "router_z_loss_coef need a mixture of experts"),
    ],
)
def test_a_section_that_does_not_fit_the_model_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        declared(**section)


def test_rows_of_recurrent_layers_are_not_split():
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 8, "layer_types": ["linear_attention"]}
    section = ModelSection(config=tiny.HF_CONFIG | {"model_type": "qwen3_5_text", **sizes})
    with pytest.raises(ValueError, match=r"mesh.context=2 splits the tokens of a row, .* qwen3_5_text"):
        declare(section, make_mesh(MeshSection(context=2)), "fsdp")
