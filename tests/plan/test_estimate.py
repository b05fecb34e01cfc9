"""The estimate is what a derivation by hand says of a known model, and needs no compiler."""

import pytest

from jaxtrain.config import RunConfig
from jaxtrain.plan.estimate import estimate
from jaxtrain.plan.target import parse_target

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB = 36, 4096, 12288, 32, 8, 128, 151936
QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
ROWS, LENGTH = 16, 8192


def config(**sections):
    tree = {
        "recipe": "sft",
        "model": {"config": QWEN3_8B},
        "data": {"train": {"path": "data.jsonl"}, "max_length": LENGTH},
        "train": {"steps": 10, "batch_size": ROWS},
    }
    return RunConfig.model_validate(tree | sections)


def test_flops_are_within_two_percent_of_a_derivation_by_hand():
    projections = WIDTH * HEADS * HEAD + 2 * WIDTH * KV_HEADS * HEAD + HEADS * HEAD * WIDTH  # q, k and v, o
    layer = projections + 3 * WIDTH * HIDDEN  # gate, up, down
    # Forward 2 FLOPs per number of a matrix, backward 4; scores and values are each a product [T, H] x [H, T] per
    # head, of which causality leaves half.
    matrices = 6 * (LAYERS * layer + WIDTH * VOCAB) * ROWS * LENGTH
    attention = 3 * 2 * 2 * LAYERS * HEADS * HEAD * LENGTH * LENGTH / 2 * ROWS
    found = estimate(config(), parse_target("v5p:2x2x2"))
    assert found.flops == pytest.approx(matrices + attention, rel=0.02)
    assert found.seconds == pytest.approx(found.flops / 8 / 459e12)
    assert found.tokens == ROWS * LENGTH


def test_parameters_and_their_bytes_are_those_of_the_model():
    found = estimate(config(), parse_target("v5p:2x2x2"))
    assert found.parameters == found.trained == pytest.approx(8.19e9, rel=0.001)  # of the model's card
    assert found.parameter_bytes == found.gradient_bytes == pytest.approx(4 * 8.19e9 / 8, rel=0.001)
    assert found.optimizer_bytes == pytest.approx(2 * found.parameter_bytes, rel=0.001)
    assert found.mesh == {"fsdp": 8}


def test_under_lora_only_adapters_have_gradients_and_moments():
    lora = config(model={"config": QWEN3_8B, "lora": {"rank": 16}, "param_dtype": "bfloat16"})
    found = estimate(lora, parse_target("v5p:2x2x2"))
    per_layer = 16 * ((WIDTH + HEADS * HEAD) * 2 + (WIDTH + KV_HEADS * HEAD) * 2 + (WIDTH + HIDDEN) * 3)
    assert found.trained == LAYERS * per_layer
    assert found.optimizer_bytes == pytest.approx(2 * found.gradient_bytes, rel=0.01)
    assert found.parameter_bytes == pytest.approx(2 * 8.19e9 / 8 + found.gradient_bytes, rel=0.01)


def test_axes_of_the_mesh_share_what_they_split():
    halves = config(mesh={"preset": "fsdp_tensor", "tensor": 2})
    one, two = (estimate(each, parse_target("v5p:2x2x2")) for each in (config(), halves))
    assert two.mesh == {"fsdp": 4, "tensor": 2}
    assert two.parameter_bytes == pytest.approx(one.parameter_bytes, rel=0.01)
    replicas = estimate(config(mesh={"data": 2}), parse_target("v5p:2x2x2"))
    assert replicas.parameter_bytes == pytest.approx(2 * one.parameter_bytes, rel=0.001)  # norms are whole anywhere


def test_a_mesh_that_does_not_divide_is_an_error_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"mesh.data=3 = 3 does not divide the 8 devices; nearest: .*mesh.data=2"):
        estimate(config(mesh={"data": 3}), parse_target("v5p:2x2x2"))
