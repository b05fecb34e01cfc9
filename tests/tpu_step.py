"""Compiles the SFT step for a TPU that is not there, and says what it needs. `tpu_programs.py` imports it."""

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from converters.families import qwen3_5_moe
from jaxtrain.config import MeshSection, OptimizerSection
from jaxtrain.nn.block import Execution
from jaxtrain.nn.config import LayerKind, ModelConfig, Rope
from jaxtrain.nn.model import Model
from jaxtrain.nn.remat import Remat
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state, state_shardings
from jaxtrain.train.step import jit_step, make_step
from jaxtrain.types import Batch


def qwen3(vocab: int, width: int, hidden: int, layers: int, heads: int, head_dim: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        norm_eps=1e-6,
        activation="silu",
        tied=tied,
        qk_norm="head",
        init_std=0.02,
        pattern=(LayerKind(None, Rope(theta=1e6)),) * layers,
        vocab_multiple=256,
    )


SHAPES = {
    "tiny": qwen3(1000, 256, 512, layers=2, heads=16, head_dim=64, tied=True),
    "8b-wide": qwen3(151936, 4096, 12288, layers=2, heads=32, head_dim=128, tied=False),
    "8b": qwen3(151936, 4096, 12288, layers=36, heads=32, head_dim=128, tied=False),  # Qwen/Qwen3-8B's config.json
    "35b-a3b": qwen3_5_moe.from_hf({}, vocab_multiple=256),  # its defaults are Qwen3.5-35B-A3B
}


def step(
    shape: str, topology: str, tensor: int, rows: int, length: int, remat: str | dict[str, str] = "full"
) -> dict[str, int]:
    places = remat if isinstance(remat, str) else tuple(remat.items())
    return report(compile_step(shape, topology, tensor, rows, length, places))


def compile_step(shape: str, topology: str, tensor: int, rows: int, length: int, remat: Remat) -> jax.stages.Compiled:
    """The step of a run: bf16 compute, fp32 parameters and AdamW moments, donated state."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    section = MeshSection(preset="fsdp_tensor" if tensor > 1 else "fsdp", tensor=tensor)
    mesh = make_mesh(section, devices)
    model = Model(SHAPES[shape], run=Execution(jnp.dtype("bfloat16"), remat, "auto", mesh))
    schedule = make_schedule(OptimizerSection(), 10)
    tx = make_optimizer(OptimizerSection(), schedule, model.axes())

    shardings = param_specs(model.axes(), model.abstract(), RULES[section.preset], mesh)
    params = jax.tree.map(placed, model.abstract(), shardings)
    state = jax.eval_shape(lambda p: new_state(p, tx, jax.random.key(0)), params)._replace(params=params)
    shardings = state_shardings(state, mesh)
    state = jax.tree.map(placed, state, shardings)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding))
    step = make_step(model, tx, schedule, SFT(), max_grad_norm=1.0)
    return jit_step(step, state, mesh).lower(state, {}, batch).compile()


def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def report(compiled: jax.stages.Compiled) -> dict[str, int]:
    memory = compiled.memory_analysis()
    assert memory is not None
    text = compiled.as_text()
    assert text is not None
    lines = text.splitlines()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "not_donated": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "splash_calls": len([line for line in lines if "splash_mha" in line and "custom-call(" in line]),
        # XLA:TPU compiles matrix products as convolutions.
        "products": len([line for line in lines if " convolution(" in line or " dot(" in line]),
    }
