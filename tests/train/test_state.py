import jax
import optax
import tiny
from jax.sharding import PartitionSpec

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import FSDP, RULES, param_specs
from jaxtrain.train.state import new_state, state_shardings


def test_a_moment_has_the_sharding_of_its_parameter_and_the_rest_is_replicated():
    model, mesh = tiny.model(), make_mesh(MeshSection(fsdp=2, tensor=2, data=2, preset="fsdp_tensor"))
    specs = param_specs(model.axes(), model.abstract(), RULES["fsdp_tensor"], mesh)
    params = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec), model.abstract(), specs
    )
    state = jax.eval_shape(lambda: new_state(params_like(params), optax.adamw(1e-3), jax.random.key(0)))
    shardings = state_shardings(state._replace(params=params), mesh)
    assert shardings.params == specs
    adam = shardings.opt_state[0]
    assert adam.mu == adam.nu == specs
    assert specs["layers"]["attn"]["q_proj"]["kernel"].spec == PartitionSpec(None, FSDP, "tensor", None)
    for leaf in (adam.count, shardings.step, shardings.key, shardings.skipped):
        assert leaf.spec == PartitionSpec()


def params_like(shapes):
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)


def test_the_first_state_is_of_step_0():
    params = {"kernel": jax.numpy.ones((2, 3))}
    state = new_state(params, optax.sgd(0.1), jax.random.key(3))
    assert (state.step, state.skipped, state.skipped_in_a_row) == (0, 0, 0)
    assert state.params is params and jax.random.key_data(state.key).tolist() == [0, 3]
