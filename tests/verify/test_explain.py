"""Causes are named from values alone: of attention, of the gate, and of experts and their weights."""

from dataclasses import replace

import numpy as np
import pytest

from jaxtrain.nn.config import ClampedSwiGLU
from jaxtrain.verify import explain

RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=(12, heads, 8)) for heads in (4, 2, 2))
ANGLES = np.arange(12)[:, None] * np.array([1.0, 0.3, 0.1, 0.03])
TABLE = np.cos(ANGLES), np.sin(ANGLES)
SETTING = explain.AttentionSetting(window=5, scale=0.3, softcap=2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grouped": False}, "every K-th query head"),
        ({"scale": 1.0}, "scale 1"),
        ({"softcap": None}, "no softcap"),
        ({"window": 4}, "a window of 4"),
        ({"window": None}, "no window"),
        ({"rotation": "neighbours"}, "neighbouring channels"),
        ({"rotation": "none"}, "no rope"),
        ({"causal": False}, "no causal mask"),
    ],
)
def test_what_either_side_attends_with(change, words):
    config, other = (
        explain._attend(Q, K, V, TABLE, each).reshape(12, -1) for each in (SETTING, replace(SETTING, **change))
    )
    explanation = explain.explain_attention(Q, K, V, TABLE, SETTING, other, config)
    assert (
        explanation.startswith("transformers computes with the settings of the config, ours with")
        and words in explanation
    )
    explanation = explain.explain_attention(Q, K, V, TABLE, SETTING, config, other)
    assert explanation.endswith("ours with the settings of the config") and words in explanation


def test_values_that_no_variant_gives_are_not_explained():
    outputs = RNG.normal(size=(12, 32))
    assert explain.explain_attention(Q, K, V, TABLE, SETTING, outputs, outputs + 1) == ""


def test_an_activation_is_named_by_its_outputs():
    gate, up = RNG.normal(size=(2, 6, 5))
    silu, relu = (explain._activate(gate, name) * up for name in ("silu", "relu"))
    words = explain.explain_gate(gate, up, "silu", relu, silu)
    assert words == "transformers computes with the activation silu, ours with the activation relu"


class Config:
    """The two attributes that experts depend on."""

    activation = "silu"

    class moe:
        swiglu = ClampedSwiGLU(1.702, 0.5)


EXPERTS = explain.ExpertWeights(*(RNG.normal(size=(4, *shape)) for shape in ((16, 6), (16, 6), (6, 16))))
X = RNG.normal(size=(8, 16))
WEIGHTS = np.where(np.arange(4) < 2, RNG.uniform(0.2, 0.6, (8, 4)), 0)


def mixed(weights, limit=0.5, swapped=False):
    outputs = explain._expert_outputs(X, EXPERTS, ClampedSwiGLU(1.702, limit), "silu", swapped)
    return np.einsum("te,ted->td", weights, outputs)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (mixed(WEIGHTS[:, ::-1]), "the order of the experts"),
        (mixed(WEIGHTS / WEIGHTS.sum(-1, keepdims=True)), "renormalisation"),
        (mixed(WEIGHTS * (np.arange(4) < 1)), "2 in transformers, 1 in ours"),
        (mixed(WEIGHTS**2), "the weights of the chosen experts"),
        (mixed(WEIGHTS, limit=np.inf), "with the clamp of the config, ours with no clamp"),
        (mixed(WEIGHTS, swapped=True), "ours with the clamp of the config, gate and up swapped"),
        (RNG.normal(size=X.shape), "with the clamp of the config, ours with none of the known variants"),
    ],
)
def test_what_experts_compute_and_how_they_are_weighted(ours, words):
    assert words in explain.explain_experts(X, EXPERTS, Config, ours, mixed(WEIGHTS))
