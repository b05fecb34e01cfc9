import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import FSDP, RULES, batch_sharding, constrain_rows, param_specs

AXES = {
    "embed": {"weight": ("vocab", "embed")},
    "layers": {
        "attn": {"q_proj": {"kernel": ("layers", "embed", "heads", "head_dim")}},
        "mlp": {"down_proj": {"kernel": ("layers", "mlp", "embed")}},
        "mlp_norm": {"scale": ("layers", "norm")},
    },
}


def shapes(vocab=64, embed=16, heads=4, mlp=24):
    tree = {
        "embed": {"weight": (vocab, embed)},
        "layers": {
            "attn": {"q_proj": {"kernel": (3, embed, heads, 8)}},
            "mlp": {"down_proj": {"kernel": (3, mlp, embed)}},
            "mlp_norm": {"scale": (3, embed)},
        },
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda s: isinstance(s, tuple))


def mesh(**sizes):
    return make_mesh(MeshSection(preset="fsdp_tensor", **sizes))


def specs(preset, on, **sizes):
    tree = param_specs(AXES, shapes(**sizes), RULES[preset], on)
    return jax.tree.map(lambda sharding: sharding.spec, tree)


def test_presets_place_every_parameter():
    assert specs("fsdp", mesh()) == {
        "embed": {"weight": P(None, FSDP)},
        "layers": {
            "attn": {"q_proj": {"kernel": P(None, FSDP, None, None)}},
            "mlp": {"down_proj": {"kernel": P(None, None, FSDP)}},
            "mlp_norm": {"scale": P(None, None)},
        },
    }
    assert specs("fsdp_tensor", mesh(tensor=2)) == {
        "embed": {"weight": P("tensor", FSDP)},
        "layers": {
            "attn": {"q_proj": {"kernel": P(None, FSDP, "tensor", None)}},
            "mlp": {"down_proj": {"kernel": P(None, "tensor", FSDP)}},
            "mlp_norm": {"scale": P(None, None)},
        },
    }


def test_a_device_holds_its_part_and_no_more():
    placed = param_specs(AXES, shapes(), RULES["fsdp_tensor"], mesh(tensor=2))
    kernel = placed["layers"]["attn"]["q_proj"]["kernel"]
    assert kernel.shard_shape((3, 16, 4, 8)) == (3, 4, 2, 8)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"embed": 20}, ["embed.weight (64, 20)", "'embed' of size 20", "'fsdp' of size 8", "1, 2, 4"]),
        ({"heads": 3}, ["layers.attn.q_proj.kernel (3, 16, 3, 8)", "'heads' of size 3", "'tensor' of size 2"]),
    ],
)
def test_an_axis_that_does_not_divide_names_the_parameter(sizes, words):
    on = mesh(tensor=2) if "heads" in sizes else mesh()
    with pytest.raises(ValueError) as error:
        specs("fsdp_tensor", on, **sizes)
    for word in words:
        assert word in str(error.value)


def test_a_mesh_axis_that_would_split_a_parameter_twice_is_an_error():
    rules = {**RULES["fsdp"], "vocab": ("fsdp", "tensor")}
    with pytest.raises(ValueError, match=r"embed.weight .*'fsdp' would shard both 'vocab' and 'embed'"):
        param_specs(AXES, shapes(), rules, mesh())


def test_a_logical_axis_without_a_rule_is_an_error():
    axes = {"a": {"kernel": ("embed", "head")}}
    with pytest.raises(ValueError, match=r"a.kernel: logical axis 'head' has no rule; did you mean 'heads'"):
        param_specs(axes, {"a": {"kernel": np.zeros((8, 8))}}, RULES["fsdp"], mesh())


def test_rows_lie_over_data_and_fsdp_and_every_tensor_shard_sees_them():
    on = mesh(data=2, tensor=2)
    assert batch_sharding(on).shard_shape((8, 5)) == (2, 5)
    x = jax.jit(lambda x: constrain_rows(x, on))(jnp.zeros((8, 5, 16)))
    assert x.sharding.shard_shape(x.shape) == (2, 5, 16)
    assert constrain_rows(x, None) is x
