"""Compiles the chunked head of an 8B model for a TPU that is not there, like `tpu_step`."""

import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.config import MeshSection
from jaxtrain.objectives.objective import Divergence
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.token_scores import LossDerivative, Scoring, Targets, Teacher, token_scores
from jaxtrain.parallel.mesh import compiler_options, make_mesh
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Scores

WIDTH, VOCAB, LENGTH = 4096, 128256, 4096  # Llama-3.1-8B's head, one row of 4096 tokens on each device


def head(kind: str, train_head: bool) -> dict[str, int]:
    """The compiler's cycles of a chunk."""
    text = compile_head(kind, train_head).as_text()
    assert text is not None
    return {"cycles": cycles_of_a_chunk(text)}


def compile_head(kind: str, train_head: bool) -> jax.stages.Compiled:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = make_mesh(MeshSection(), devices)
    divergence = None if kind == "sft" else Divergence(kind)

    def shape(size: tuple[int, ...], dtype: str, *spec: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def of_scores(scores: Scores, weights: jax.Array) -> jax.Array:
        return jnp.sum(weights * (-scores.logp if divergence is None else scores.divergence))

    def loss(hidden, weight, teacher_hidden, teacher_weight, tokens, weights):
        assumed = LossDerivative(lambda scores, rows, shared: jax.grad(of_scores)(scores, rows), weights, None)
        teacher = None if divergence is None else Teacher(teacher_hidden, Head(teacher_weight, VOCAB))
        targets, how = Targets(tokens, weights), Scoring(divergence=divergence)
        scores = token_scores(
            hidden, Head(weight, VOCAB), targets, how, teacher=teacher, loss_derivative=assumed, mesh=mesh
        )
        return of_scores(scores, weights)

    rows = (len(devices), LENGTH)
    hidden = shape((*rows, WIDTH), "bfloat16", ROWS)
    student, teacher = (shape((WIDTH, VOCAB), dtype, "fsdp", "tensor") for dtype in ("float32", "bfloat16"))
    tokens, weights = shape(rows, "int32", ROWS), shape(rows, "float32", ROWS)
    gradient = jax.value_and_grad(loss, (0, 1) if train_head else 0)
    jitted = jax.jit(gradient, compiler_options=compiler_options(mesh))
    return jitted.lower(hidden, student, hidden, teacher, tokens, weights).compile()


def cycles_of_a_chunk(text: str) -> int:
    """The estimated cycles of one trip of the loop over chunks, which is in the entry computation; that which
    recomputes logits is in a branch."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if found := re.match(r"^(ENTRY )?%?([\w.\-]+) (\(.*\) -> .*)?\{", line):
            lines = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        else:
            lines.append(line)
    bodies = [found[1] for line in computations[entry] if (found := re.search(r" while\(.*body=%?([\w.\-]+)", line))]
    (body,) = bodies
    cycles = (re.search(r'"estimated_cycles":"(\d+)"', line) for line in computations[body])
    return sum(int(found[1]) for found in cycles if found and int(found[1]) < 1e15)
