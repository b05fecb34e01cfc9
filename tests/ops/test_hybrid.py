"""GOLD's distance in chunks; its formula is compared in tests/objectives/test_gold.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import GroupStarts, MatchedHead, hybrid_distances, match_vocabularies

LENGTH, WIDTH, SIZES = 9, 5, (13, 17)


def test_tokens_of_the_same_text_are_matched():
    student, teacher = {"a": 0, "b": 1, "c": 2, "z": 9}, {"b": 0, "x": 1, "a": 2, "z": 3}
    ids = match_vocabularies(student, teacher, 5, 5)  # z is beyond the student's model
    assert dict(zip(ids.student.tolist(), ids.teacher.tolist(), strict=True)) == {0: 2, 1: 0}
    assert ids.student_rest.tolist() == [2, 3, 4] and ids.teacher_rest.tolist() == [1, 3, 4]
    assert MatchedHead(Head(np.zeros((2, 5)), 5), ids).share == 0.4


def value_and_gradient(chunk, softcap=None):
    rng = np.random.default_rng(0)
    hidden, theirs = rng.normal(size=(2, 2, LENGTH, WIDTH)).astype(np.float32)
    heads = [Head(jnp.asarray(rng.normal(size=(WIDTH, size)), jnp.float32), size, softcap=softcap) for size in SIZES]
    ids = match_vocabularies(*({str(n + at): n for n in range(size)} for at, size in enumerate(SIZES)), *SIZES)
    first = rng.random((2, LENGTH)) < 0.5
    further = -rng.exponential(size=(2, 2, LENGTH)).astype(np.float32)
    groups = GroupStarts(jnp.asarray(first), jnp.asarray(further[0]), jnp.asarray(theirs), jnp.asarray(further[1]))

    def total(hidden, head):
        parts = hybrid_distances(hidden, head, groups, MatchedHead(heads[1], ids), beta=0.3, chunk=chunk)
        return (parts.matched + 0.5 * parts.unmatched).sum()

    return jax.value_and_grad(total, argnums=(0, 1))(jnp.asarray(hidden), heads[0])


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_neither_value_nor_gradient(chunk):
    for one, other in zip(*map(jax.tree.leaves, map(value_and_gradient, (chunk, LENGTH))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_no_logits_of_a_whole_row_are_ever_held():
    """Neither model's, forward and backward."""
    rows, length, size = 1, 512, 300
    ids = match_vocabularies({str(n): n for n in range(size)}, {str(2 * n): n for n in range(size)}, size, size)
    head = Head(jnp.zeros((WIDTH, size)), size)
    zeros = jnp.zeros((rows, length))
    groups = GroupStarts(zeros == 0, zeros, jnp.zeros((rows, length, WIDTH)), zeros)

    def total(hidden):
        return hybrid_distances(hidden, head, groups, MatchedHead(head, ids), beta=0.5, chunk=16).matched.sum()

    compiled = jax.jit(jax.grad(total)).lower(jnp.zeros((rows, length, WIDTH))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * size * 4 / 2
