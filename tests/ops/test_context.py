import jax
import numpy as np
import pytest
from attention_problem import VARIANTS, assert_close, attending, only_real, packed, tensors, value_and_gradients

from jaxtrain.config import MeshSection
from jaxtrain.ops.blockwise import SplashBlocks
from jaxtrain.ops.context import query_order
from jaxtrain.parallel.mesh import make_mesh


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_device_computes_as_many_pairs_of_queries_and_keys(devices):
    order = query_order(48 * devices, devices)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
    pairs = (order + 1).reshape(devices, -1).sum(1)  # a query attends to the keys up to its own
    assert (pairs == pairs[0]).all()


@pytest.mark.parametrize(
    ("impl", "length", "sizes", "variant"),
    [
        ("xla", 300, {"context": 2, "tensor": 2, "fsdp": 2}, "everything"),
        ("splash", 512, {"context": 2, "tensor": 2, "fsdp": 2}, "everything"),
        ("splash", 512, {"context": 2, "fsdp": 1}, "causal"),
    ],
)
def test_rows_in_parts_equal_whole_rows(impl, length, sizes, variant):
    """Outputs and gradients, of rows with segments that end within parts and at their ends, and with padding. Keys of
    several blocks, some of which the mask leaves out for all queries of a part."""
    impl = SplashBlocks(128, 128, 128) if impl == "splash" else impl
    section = MeshSection(preset="fsdp_tensor", **sizes)
    mesh = make_mesh(section, jax.devices()[: section.fsdp * section.context * section.tensor])
    rows = [packed([90, 1, length // 2 - 91, 60], length), packed([length], length)]
    q_pos, q_seg = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    whole, parts = (
        value_and_gradients(
            only_real(attending(impl=impl, mesh=mesh), q_seg),
            tensors(length=length),
            VARIANTS[variant],
            q_pos=q_pos,
            q_seg=q_seg,
        )
        for impl, mesh in (("xla", None), (impl, mesh))
    )
    assert_close(whole, parts)


def test_parts_that_a_kernel_cannot_take_are_named():
    mesh = make_mesh(MeshSection(context=4, fsdp=1), jax.devices()[:4])
    q_pos, q_seg = (np.repeat(x, 2, 0) for x in packed([640], 640))
    with pytest.raises(ValueError, match=r"rows of 640 tokens over mesh.context=4: .* multiples of 1024 tokens"):
        attending(impl="splash", mesh=mesh)(*tensors(length=640), q_pos=q_pos, q_seg=q_seg)
