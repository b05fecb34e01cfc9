"""Counts of compilations are those of a thread, and seconds of nested ones count once."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.observe.compilations import COMPILATIONS, Compilations, compilations


def test_a_program_is_counted_when_its_shapes_are_new():
    double = jax.jit(lambda x: 2 * x)
    few, many = jnp.zeros(3), jnp.zeros(4)
    counts = []
    for array in (few, few, many, few):
        before = compilations()
        double(array)
        counts.append(compilations() - before)
    assert counts == [1, 0, 1, 0]


def test_compiling_takes_no_longer_than_the_call_that_does_it():
    inner = jax.jit(lambda x: jnp.sin(x) @ x)

    def outer(x):
        for _ in range(20):  # each is traced within the trace of the whole
            x = inner(x) + jax.vmap(jnp.sort)(x)
        return x

    x = jnp.eye(5)
    before, start = COMPILATIONS.seconds, time.perf_counter()
    jax.jit(outer)(x)
    taken, compiling = time.perf_counter() - start, COMPILATIONS.seconds - before
    assert 0.3 * taken < compiling <= taken + 0.01


def test_other_threads_have_their_own_counts():
    before = compilations(), COMPILATIONS.seconds
    thread = threading.Thread(target=lambda: jax.jit(lambda x: x + 1.25)(jnp.zeros(3)))
    thread.start()
    thread.join()
    assert (compilations(), COMPILATIONS.seconds) == before


def test_spans_within_others_count_once():
    counted = Compilations()
    for start, end in [(1, 2), (3, 4), (5, 6), (2.5, 7), (0, 8), (9, 10)]:  # in the order of their ends
        counted.add("", start, end)
    assert counted.seconds == pytest.approx(9)
