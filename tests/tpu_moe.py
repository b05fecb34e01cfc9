"""Compiles one layer of experts and its gradients for TPUs that are not there. `tpu_programs.py` imports it."""

import math
import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from tpu_step import SHAPES, placed

from jaxtrain.config import MeshSection
from jaxtrain.nn.config import ClampedSwiGLU, MoE
from jaxtrain.nn.moe import SparseMLP
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.plan.hlo import Module, array_sizes

# The widths of openai/gpt-oss-20b's config.json, and of Qwen/Qwen3-30B-A3B's.
MIXTURES = {
    "gpt-oss-20b": (
        2880,
        MoE(32, 4, 2880, renormalise=True, bias=True, swiglu=ClampedSwiGLU(alpha=1.702, limit=7.0)),
    ),
    "qwen3-30b-a3b": (2048, MoE(128, 8, 768, renormalise=True)),
}


def experts(name: str, topology: str, expert: int, length: int) -> dict[str, object]:
    """What is compiled of a layer's forward and backward pass over one row of `length` tokens for each device."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshSection(preset="fsdp_expert", expert=expert), devices)
    width, moe = MIXTURES[name]
    config = replace(SHAPES["tiny"], hidden_size=width, moe=moe)

    def make() -> SparseMLP:
        with nnx.use_eager_sharding(False):
            return SparseMLP(config, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"), lora=None)

    graphdef, state = nnx.split(nnx.eval_shape(make))
    axes = nnx.to_pure_dict(
        jax.tree.map(
            lambda p: p.get_metadata()["out_sharding"], state, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
    )
    shapes = nnx.to_pure_dict(state)
    params = jax.tree.map(placed, shapes, param_specs(axes, shapes, RULES["fsdp_expert"], mesh))
    rows = batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((len(devices), length, width), jnp.bfloat16, sharding=rows)
    segments = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32, sharding=rows)

    def loss(params, x, segments):
        return jnp.sum(nnx.merge(graphdef, params)(x, segments, mesh)[0].astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1))).lower(params, x, segments).compile()
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    assert text is not None and memory is not None
    calls = re.findall(r"%([\w-]+?)(?:\.[\d.]+)? = [^=]*? custom-call\(.*tpu_custom_call", text)
    outside_fusions = [
        (each.opcode, sizes)
        for instructions in Module(text).computations.values()
        for each in instructions
        if each.cycles is not None
        for sizes in array_sizes(each.shape)[:1]
    ]
    slots = length * moe.experts_per_token
    return {
        # Arrays that something is written to at least once for each slot before rows are, as zeros would be.
        "filled_buffers": sum(
            opcode == "broadcast" and math.prod(sizes) >= slots * width and sizes[-2:] != (width, width)
            for opcode, sizes in outside_fusions
        ),
        "sums_over_an_axis": sum(opcode == "reduce" and sizes == (length, width) for opcode, sizes in outside_fusions),
        "kernels": Counter(calls),
        "exchanges": len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)),
        "xla_flops": compiled.cost_analysis()["flops"],
        "temporaries": memory.temp_size_in_bytes,
    }
