"""Documents of a packed row that depend on each other are named."""

import re

import jax.numpy as jnp
import pytest
from planted import code, ids

import jaxtrain.nn.attention as attention
from jaxtrain.nn.block import Block
from jaxtrain.verify.checks import LOGIT_TOLERANCE
from jaxtrain.verify.packed import packed_check


def across_documents(attend):
    def attend_to_all(q, k, v, tokens, *args, **options):
        return attend(q, k, v, tokens._replace(q_seg=jnp.ones_like(tokens.q_seg)), *args, **options)

    return attend_to_all


def state_across_documents(call):
    def layer(self, x, inputs, *args, **options):
        starts = (inputs.positions == 0) & (jnp.arange(x.shape[1]) > 0)
        return call(self, x + jnp.where(starts[..., None], 0.1 * jnp.roll(x, 1, 1), 0), inputs, *args, **options)

    return layer


PACKED = {
    "attention": (code(attention, "attend", across_documents), "layers.0.attn"),
    "a state": (code(Block, "__call__", state_across_documents), "layers.0"),
}


@pytest.mark.parametrize("bug", PACKED)
def test_a_document_that_depends_on_another_is_named(bug, loaded, monkeypatch):
    plant, where = PACKED[bug]
    subject, reference = loaded("granite")
    check = packed_check(plant(subject, monkeypatch), reference, ids(subject)[0], "float32", LOGIT_TOLERANCE)
    assert not check.passed and re.search(rf"document \d depends on document \d, first at {where}", check.summary), (
        check
    )
