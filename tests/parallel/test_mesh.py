import jax
import pytest

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import check_compiler_options, compiler_options, default_head_chunk, make_mesh


def section(**sizes):
    return MeshSection(preset="fsdp_tensor", **sizes)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1, 1, 1)),
        ({"tensor": 2}, (1, 4, 1, 1, 2)),
        ({"data": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"data": 8}, (8, 1, 1, 1, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"context": 4}, (1, 2, 1, 4, 1)),
    ],
)
def test_fsdp_takes_the_devices_that_are_left(sizes, shape):
    mesh = make_mesh(section(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_can_take_some_of_the_devices():
    some = jax.devices()[2:6]
    assert set(make_mesh(MeshSection(), some).devices.flat) == set(some)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tensor": 3}, ["mesh.tensor=3", "8 devices", "mesh.data=1 mesh.fsdp=4 mesh.tensor=2"]),
        ({"data": 3}, ["mesh.data=3", "8 devices", "mesh.data=2 mesh.fsdp=4 mesh.tensor=1"]),
        ({"fsdp": 3}, ["mesh.fsdp=3", "8 devices", "mesh.data=1 mesh.fsdp=8 mesh.tensor=1"]),
        ({"data": 2, "fsdp": 2}, ["= 4", "8 devices", "mesh.data=2 mesh.fsdp=4 mesh.tensor=1"]),
        ({"context": 3}, ["mesh.context=3", "8 devices", "mesh.data=1 mesh.fsdp=4 mesh.context=2 mesh.tensor=1"]),
        ({"tensor": 16}, ["mesh.tensor=16", "8 devices", "mesh.data=1 mesh.fsdp=1 mesh.tensor=8"]),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_an_error_with_a_way_out(sizes, words):
    with pytest.raises(ValueError) as error:
        make_mesh(section(**sizes))
    for word in words:
        assert word in str(error.value)


def test_a_tensor_axis_that_would_split_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"mesh.tensor=2 shards no parameter .* mesh.preset=fsdp_tensor"):
        make_mesh(MeshSection(preset="fsdp", tensor=2))
    with pytest.raises(ValueError, match=r"mesh.expert=2 shards no parameter .* mesh.preset=fsdp_expert"):
        make_mesh(MeshSection(preset="fsdp_tensor", tensor=2, expert=2))


def test_rows_are_split_over_experts_too():
    mesh = make_mesh(MeshSection(preset="fsdp_expert", expert=4))
    assert mesh.devices.shape == (1, 2, 4, 1, 1)
    with pytest.raises(
        ValueError, match=r"mesh.data=1 x mesh.expert=3 = 3 does not divide .*mesh.fsdp=4 mesh.expert=2"
    ):
        make_mesh(MeshSection(preset="fsdp_expert", expert=3))


def test_compiler_options_are_those_of_the_mesh_and_not_of_the_host():
    assert compiler_options(make_mesh(MeshSection())) == {}
    assert compiler_options(make_mesh(MeshSection()), (("one", 1),)) == {"one": 1}


def test_an_option_that_the_compiler_does_not_know_is_named():
    mesh = make_mesh(MeshSection())
    check_compiler_options(mesh, (("xla_cpu_enable_fast_math", True),))
    with pytest.raises(ValueError, match=r"model.compiler_options.xla_no_such=1 is refused .* for cpu: .*No such"):
        check_compiler_options(mesh, (("xla_cpu_enable_fast_math", True), ("xla_no_such", 1)))


def test_the_default_chunk_of_the_head_on_a_cpu():
    assert default_head_chunk(make_mesh(MeshSection())) == 512
