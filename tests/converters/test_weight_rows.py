"""Ops are invertible, and work on rectangles as on full tensors."""

from functools import partial

import hf_folders
import numpy as np
import pytest

from converters.errors import ConversionError
from converters.families.registry import FAMILIES
from converters.import_hf import read_config
from converters.weight_rows import Tensor, Transpose, Weight, bind, by_name, flatten, fuse, unflatten
from jaxtrain.nn.config import ModelConfig

CASES = ["llama-biases", "qwen2-tied", "qwen3", "gpt-oss", "glm4"]
CASES += [case for case in hf_folders.CASES if case.startswith("phi3")]


def config_of(case: str) -> ModelConfig:
    return read_config(hf_folders.hf_config(case, architectures=None).to_dict())[0]


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(hf_folders.target(config)).items()}


def whole(shape):
    return tuple(slice(0, size) for size in shape)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_as_it_was(case):
    """Fused, if several of our parameters come from it."""
    config = config_of(case)
    rng = np.random.default_rng(0)
    for tensors in by_name(bind(FAMILIES[config.family].WEIGHTS, shapes_of(config), config)).values():
        stored = rng.standard_normal(tensors[0].shape)
        assert all(tensor.to_ours_in_full(stored).shape == tensor.shapes[-1] for tensor in tensors)
        np.testing.assert_array_equal(fuse(tensors, partial(Tensor.to_ours_in_full, stored=stored)), stored)


@pytest.mark.parametrize("case", CASES)
def test_a_rectangle_of_ours_needs_only_its_rectangle_of_theirs(case):
    config = config_of(case)
    rng = np.random.default_rng(0)
    for tensor in bind(FAMILIES[config.family].WEIGHTS, shapes_of(config), config):
        stored = rng.standard_normal(tensor.shape)
        shape = tensor.shapes[-1]
        ours = tensor.to_ours_in_full(stored)
        for _ in range(20):
            starts = [int(rng.integers(0, size)) for size in shape]
            index = tuple(slice(a, int(rng.integers(a + 1, size + 1))) for a, size in zip(starts, shape, strict=True))
            if "_proj" in tensor.ours:  # the width of a head is never split
                index = tuple(slice(0, 16) if size == 16 else s for s, size in zip(index, shape, strict=True))
            block = stored[tensor.hf_index(index)]
            np.testing.assert_array_equal(tensor.to_ours(block, index), ours[index])


def test_of_tensors_side_by_side_only_the_own_rows_are_read():
    config = config_of("phi3")  # 4 heads of q, 2 of k, 2 of v, of 16 channels
    tensors = {t.ours: t for t in bind(FAMILIES["phi3"].WEIGHTS, shapes_of(config), config) if t.stack == (1,)}
    q, k, v, up = (tensors[f"layers.{name}_proj.kernel"] for name in ("attn.q", "attn.k", "attn.v", "mlp.up"))
    assert q.shape == k.shape == v.shape == (128, 56)
    second_head = (slice(8, 20), slice(1, 2), slice(0, 16))
    assert q.hf_index(second_head) == (slice(16, 32), slice(8, 20))
    assert k.hf_index(second_head) == (slice(80, 96), slice(8, 20))
    assert v.hf_index(second_head) == (slice(112, 128), slice(8, 20))
    assert up.hf_index((slice(0, 56), slice(3, 5))) == (slice(75, 77), slice(0, 56))


def test_padded_vocabulary_rows_are_zero():
    config = config_of("qwen3")
    (embed,) = (t for t in bind(FAMILIES["qwen3"].WEIGHTS, shapes_of(config), config) if t.ours == "embed.weight")
    ours = embed.to_ours(np.ones(embed.shape), whole(embed.shapes[-1]))
    assert ours.shape == (128, 56)
    assert ours[:101].all()
    assert not ours[101:].any()


def test_a_name_can_stack_two_axes():
    """As for experts: `layers.{layer}.experts.{expert}` fills [L, E, ...]."""
    row = Weight("layers.moe.up.kernel", "model.layers.{layer}.experts.{expert}.up.weight", (Transpose((1, 0)),))
    tensors = bind([row], {"layers.moe.up.kernel": (2, 3, 5, 7)}, config_of("qwen3"))
    assert [t.stack for t in tensors] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert tensors[4].name == "model.layers.1.experts.1.up.weight"
    assert tensors[4].shape == (7, 5)


def test_a_parameter_without_a_row_is_an_error():
    config = config_of("qwen3")
    shapes = {**shapes_of(config), "layers.attn.q_proj.lora_a": (3, 56, 4)}
    with pytest.raises(ConversionError, match=r"layers\.attn\.q_proj\.lora_a; adapters must be merged"):
        bind(FAMILIES["qwen3"].WEIGHTS, shapes, config)


def test_flatten_round_trip():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
