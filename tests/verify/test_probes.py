"""Bugs that no natural input shows in the logits: of norms, and of ropes that change at one length."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from planted import code, config, rope

from converters.reference import Reference
from jaxtrain.nn.config import Rope
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.verify.probes import norm_check, rope_check


def in_its_own_dtype(call):
    def norm(self, x):
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, self.over, keepdims=True) + self.eps)
        return (self.scale[...] * normed).astype(x.dtype)

    return norm


NORMS = {
    "epsilon": (config(norm_eps=1e-5), "float32", "norm, in transformers .*: epsilon"),
    "norms in bfloat16": (code(RMSNorm, "__call__", in_its_own_dtype), "bfloat16", "computed in another precision"),
    "norm_in_float32": (
        config(norm_in_float32=True),
        "bfloat16",
        "norm_in_float32, since transformers rounds .* before",
    ),
}


@pytest.mark.parametrize("bug", NORMS)
def test_of_norms_that_logits_do_not_show(bug, loaded, monkeypatch):
    plant, dtype, words = NORMS[bug]
    subject = loaded("qwen3")[0]
    reference = Reference(subject.folder, dtype)
    assert norm_check(subject, reference, dtype).passed
    check = norm_check(plant(subject, monkeypatch), reference, dtype)
    assert not check.passed and re.search(words, check.summary), check


@pytest.mark.parametrize("off", [-1, 1])
def test_longrope_changes_at_exactly_its_length(off, loaded):
    subject, reference = loaded("phi3")
    change = rope(
        lambda r: Rope(
            r.theta,
            dataclasses.replace(r.scaling, original_max_positions=r.scaling.original_max_positions + off),
            r.partial,
        )
    )
    check = rope_check(change(subject, None), reference, 600)
    assert not check.passed and "LongRope" in check.summary and "layers.0.attn" in check.summary, check
