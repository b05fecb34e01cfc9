"""Compares the chunked head with the naive one: temporary memory of value_and_grad, and time for a size that fits.

Usage: python benchmarks/token_scores.py      Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from results import machine, write_section

from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.token_scores import LossDerivative, Targets, token_scores
from jaxtrain.types import Scores

SIZES = [(4096, 512, 128 * 1024), (4096, 1024, 128 * 1024), (4096, 256, 32_000)]  # T, D, V
TIMED = SIZES[-1]
ROUNDS = 3


def derivative(scores, rows, shared):
    return Scores(logp=-rows)


def chunked(separable: bool):
    def loss(hidden, head, tokens, weights):
        assumed = LossDerivative(derivative, weights, None) if separable else None
        of = Head(head, len(head), transposed=True)
        return -jnp.sum(token_scores(hidden, of, Targets(tokens, weights), loss_derivative=assumed).logp * weights)

    return loss


def naive(hidden, head, tokens, weights):
    logp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden[:, :-1], head))
    return -jnp.sum(jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0] * weights[:, 1:])


LOSSES = {"naive": naive, "chunked, any loss": chunked(False), "chunked, separable loss": chunked(True)}


def compiled(loss, length: int, width: int, vocab: int):
    shapes = [((1, length, width), jnp.float32), ((vocab, width), jnp.float32)]
    shapes += [((1, length), jnp.int32), ((1, length), jnp.float32)]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()


def arrays(length: int, width: int, vocab: int, weighted: float) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(1, length, width)), 0.02 * rng.normal(size=(vocab, width))
    tokens, weights = rng.integers(0, vocab, (1, length)), rng.random((1, length)) < weighted
    kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    return [jnp.asarray(x, kind) for x, kind in zip((hidden, head, tokens, weights), kinds, strict=True)]


def seconds(run, inputs: list[jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    return time.perf_counter() - start


def main() -> None:
    lines = ["| T x D x V | head | temporaries MB | of the naive head's |", "|---|---|---|---|"]
    for size in SIZES:
        megabytes = {n: compiled(loss, *size).memory_analysis().temp_size_in_bytes / 1e6 for n, loss in LOSSES.items()}
        for name, used in megabytes.items():
            share = used / megabytes["naive"]
            lines.append(f"| {size[0]} x {size[1]} x {size[2]} | {name} | {used:.0f} | {share:.1%} |")

    runs = {name: compiled(loss, *TIMED) for name, loss in LOSSES.items()}
    lines += ["", "| weighted tokens | head | s | of the naive head's |", "|---|---|---|---|"]
    for weighted in (1.0, 0.3):
        inputs = arrays(*TIMED, weighted)
        for run in runs.values():
            seconds(run, inputs)
        rounds = [{name: seconds(run, inputs) for name, run in runs.items()} for _ in range(ROUNDS)]
        for name in runs:
            middle = statistics.median(each[name] for each in rounds)
            share = statistics.median(each[name] / each["naive"] for each in rounds)
            lines.append(f"| {weighted:.0%} | {name} | {middle:.2f} | {share:.0%} |")
    how = (
        f"value_and_grad, float32, tied; times of T x D x V = {' x '.join(map(str, TIMED))}, medians of {ROUNDS} turns."
        f" Load average {os.getloadavg()[2]:.1f}."
    )
    text = "\n".join([*lines, "", f"{machine('jax')}. {how}"])
    print(text)
    write_section("token_scores", "Token scores: the chunked head", text)


if __name__ == "__main__":
    main()
