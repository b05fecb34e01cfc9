"""Compiles the engine's decode for a TPU that is not there, like `tpu_step`."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import tpu_step
from jax.experimental import topologies

from jaxtrain.config import MeshSection
from jaxtrain.nn.block import Execution
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import replicated
from jaxtrain.sample import decode as programs
from jaxtrain.sample.capacity import serving_shardings
from jaxtrain.sample.constraints import join_tries
from jaxtrain.sample.requests import EngineLimits
from jaxtrain.sample.samples import default_settings

SLOTS, COLUMNS, STEPS = 64, 4096, 32


def compile_decode(topology: str, tensor: int, vocab: int) -> jax.stages.Compiled:
    """Two layers as wide as Qwen3-8B's, bf16, heads and vocabulary over "tensor"."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=tensor), devices)
    wide = tpu_step.SHAPES["8b"]
    config = replace(wide, num_layers=2, pattern=wide.pattern[:2], vocab_size=vocab)
    model = Model(config, run=Execution(jnp.dtype("bfloat16"), "none", "auto", mesh, rope_length=COLUMNS))

    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.run.dtype), model.abstract())
    placed = jax.tree.map(tpu_step.placed, half, serving_shardings(model))
    shardings = jax.jit(model.unstack).lower(placed).compile().output_shardings
    params = jax.tree.map(tpu_step.placed, jax.eval_shape(model.unstack, placed), shardings)
    cache = jax.eval_shape(lambda: model.empty_cache(SLOTS, COLUMNS).layers)
    cache = jax.tree.map(tpu_step.placed, cache, programs.cache_shardings(model, cache))
    marks = np.zeros((SLOTS, config.vocab_size), np.uint16)
    state = programs.SlotState(*(np.zeros(SLOTS, kind) for kind in (np.int32, np.int32, np.int32, np.bool_, np.int32)))
    tries, _ = join_tries(())
    rest = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=replicated(mesh)),
        (marks, default_settings(SLOTS), tries, state, (np.int32(STEPS), np.int32(1))),
    )
    marks, *others = rest
    return programs.decode.lower(model, EngineLimits(STEPS), params, (cache, marks), *others).compile()


def decode(topology: str, tensor: int, vocab: int) -> dict[str, int]:
    compiled = compile_decode(topology, tensor, vocab)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    wide = tpu_step.SHAPES["8b"]
    buffer = SLOTS * COLUMNS * wide.num_kv_heads // tensor * wide.head_dim * 2
    gathered = [_bytes(line) for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    return {
        "buffer": buffer,
        "temporaries": memory.temp_size_in_bytes,
        "logits": SLOTS * -(-vocab // wide.vocab_multiple) * wide.vocab_multiple * 4,
        "largest_gather": max(gathered),
    }


def _bytes(instruction: str) -> int:
    """The size of the largest array that an instruction of HLO results in."""
    result = instruction.split(" all-gather")[0].split(" = ")[1]
    sizes = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u16": 2, "pred": 1}
    shapes = re.findall(rf"({'|'.join(sizes)})\[([\d,]*)\]", result)
    return max(sizes[dtype] * math.prod(int(size) for size in shape.split(",") if size) for dtype, shape in shapes)
