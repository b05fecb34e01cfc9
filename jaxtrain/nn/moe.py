"""Mixture of experts: a router picks a few feed-forward layers for every token (https://arxiv.org/abs/1701.06538).

No token is ever dropped and nothing is padded to a capacity: the pairs of a token and an expert it chose are sorted by
expert, and every expert multiplies its own run of rows (`ops.ragged`).

On a mesh each device sorts its own tokens and holds its own share of the experts (axis "expert") and of their hidden
width ("tensor"); what "fsdp" splits it gathers first. The tokens of an "expert" group are gathered too and walked
device by device: so every buffer has the size of one device's pairs, even if all of them choose the same expert.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.linear import Linear
from jaxtrain.nn.mlp import ACTIVATIONS
from jaxtrain.ops.ragged import grouped_matmul, sort_pairs, unsort_pairs
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array, Params, Routing

# Where the experts' logical axes lie under every preset: a mesh axis that a preset does not use has size 1.
_MESH_AXES = {"expert": "expert", "embed": "fsdp", "mlp": "tensor"}


class SparseMLP(nnx.Module):
    """`sum of weight_e * expert_e(x)` over the experts e that the router chooses for x."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.moe is not None
        self.moe = config.moe
        self.router = Linear(
            *((config.hidden_size,), (self.moe.num_experts,), ("embed",), ("router",)),
            rngs=rngs,
            dtype=dtype,
            std=config.init_std,
            bias=self.moe.bias,
            lora=lora if lora and lora.covers("mlp.router") else None,
        )
        self.experts = Experts(config, rngs=rngs, dtype=dtype, lora=lora)

    def __call__(
        self, x: Array, segment_ids: Array, mesh: Mesh | None, key: Array | None = None
    ) -> tuple[Array, Routing]:
        """x [B, T, D] -> [B, T, D], and what the router did with the tokens that are no padding (segment 0).

        `key` switches the dropout of the router's adapter on; the experts' have none.
        """
        logits = self.router(x, key).astype(jnp.float32)
        scores, chosen = lax.top_k(logits, self.moe.experts_per_token)
        weights = jnp.exp(scores - jax.nn.logsumexp(scores if self.moe.renormalise else logits, -1, keepdims=True))
        mix = partial(_mix, self.experts) if mesh is None else partial(_mix_on_mesh, self.experts, mesh)
        return mix(x, chosen, weights), routing_of(logits, logits >= scores[..., -1:], segment_ids > 0)


def routing_of(logits: Array, chosen: Array, real: Array) -> Routing:
    """One layer's, of router logits [B, T, E], where `chosen` [B, T, E], over the tokens that are `real` [B, T]."""

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(real[..., None], x, 0), (0, 1), dtype=jnp.float32)

    z = jax.nn.logsumexp(logits, -1, keepdims=True) ** 2
    return Routing(total(chosen), total(jax.nn.softmax(logits)), total(z)[0], total(real[..., None])[0])


class Pairs(NamedTuple):
    """Which rows of a sorted [M, ...] belong to which expert."""

    sizes: Array  # [E] rows of each expert
    expert: Array  # [M] the expert of each row; E for rows at the end that are none's


class Experts(nnx.Module):
    """The feed-forward layers of all experts, or of the share that a device holds."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.moe is not None
        self.activation, self.swiglu = config.activation, config.moe.swiglu
        stream, hidden = (config.hidden_size, "embed"), (config.moe.intermediate_size, "mlp")
        linear = partial(ExpertLinear, config, rngs=rngs, dtype=dtype, lora=lora)
        self.gate_proj = linear("gate_proj", stream, hidden)
        self.up_proj = linear("up_proj", stream, hidden)
        self.down_proj = linear("down_proj", hidden, stream)

    def __call__(self, x: Array, pairs: Pairs) -> Array:
        """x [M, D], sorted by expert -> [M, D]."""
        gate, up = self.gate_proj(x, pairs), self.up_proj(x, pairs)
        if self.swiglu is None:
            return self.down_proj(ACTIVATIONS[self.activation](gate) * up, pairs)
        gate, up = jnp.minimum(gate, self.swiglu.limit), jnp.clip(up, -self.swiglu.limit, self.swiglu.limit)
        return self.down_proj((up + 1) * gate * jax.nn.sigmoid(self.swiglu.alpha * gate), pairs)

    @property
    def count(self) -> int:
        return self.gate_proj.kernel.shape[0]


class ExpertLinear(nnx.Module):
    """A `Linear` for every expert, each with its bias and its adapter, stacked over experts."""

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        inside: tuple[int, str],
        outside: tuple[int, str],
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        lora: Lora | None,
    ):
        assert config.moe is not None
        (i, in_axis), (o, out_axis), experts = inside, outside, config.moe.num_experts
        kernel = nnx.initializers.normal(config.init_std)(rngs.params(), (experts, i, o), dtype)
        self.kernel = nnx.Param(kernel, out_sharding=("expert", in_axis, out_axis))
        self.bias = nnx.data(None)
        if config.moe.bias:
            bias_axis = "norm" if out_axis == "embed" else out_axis
            self.bias = nnx.Param(jnp.zeros((experts, o), dtype), out_sharding=("expert", bias_axis))
        self.lora_a = self.lora_b = nnx.data(None)
        self.lora = lora if lora and lora.covers(f"mlp.experts.{name}") else None
        if self.lora:
            if self.lora.dropout:
                raise ValueError(
                    f"model.lora.dropout={self.lora.dropout}: adapters of experts ({name}) have no dropout, as in "
                    "PEFT; set it to 0 or take experts out of model.lora.targets"
                )
            bound = 1 / math.sqrt(i)
            a = jax.random.uniform(rngs.params(), (experts, i, self.lora.rank), self.lora.dtype, -bound, bound)
            self.lora_a = nnx.Param(a, out_sharding=("expert", in_axis, "rank"))
            b = jnp.zeros((experts, self.lora.rank, o), self.lora.dtype)
            self.lora_b = nnx.Param(b, out_sharding=("expert", "rank", out_axis))

    def __call__(self, x: Array, pairs: Pairs) -> Array:
        """x [M, I], sorted by expert -> [M, O]."""

        def product(x: Array, kernels: nnx.Param) -> Array:
            return grouped_matmul(x, kernels[...].astype(x.dtype), pairs.sizes)

        y = product(x, self.kernel)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype).at[pairs.expert].get(mode="fill", fill_value=0)
        if self.lora is not None:
            assert self.lora_a is not None and self.lora_b is not None
            y += self.lora.scale * product(product(x, self.lora_a), self.lora_b)
        return y


def _mix(experts: Experts, x: Array, chosen: Array, weights: Array) -> Array:
    """x [..., D], chosen and weights [..., k] -> [..., D]. An expert that is not one of `experts` adds nothing."""
    k, tokens, chosen = chosen.shape[-1], x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    mine = (chosen >= 0) & (chosen < experts.count)
    expert = jnp.where(mine, chosen, experts.count)
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    starts = jnp.searchsorted(expert[order], jnp.arange(experts.count + 1))
    pairs = Pairs(jnp.diff(starts).astype(jnp.int32), expert[order])
    out = unsort_pairs(experts(sort_pairs(tokens, order, inverse, k), pairs), order, inverse)
    weights = jnp.where(mine, weights.reshape(-1), 0).astype(x.dtype).reshape(-1, k)
    out = jnp.einsum("nkd,nk->nd", out.reshape(-1, k, x.shape[-1]), weights)
    return out.reshape(x.shape)


def _mix_on_mesh(experts: Experts, mesh: Mesh, x: Array, chosen: Array, weights: Array) -> Array:
    """The same of x [B, T, D] whose rows are split over `ROWS`, with experts that lie as every preset lays them."""
    graphdef, params = nnx.split(experts)
    specs = nnx.to_pure_dict(jax.tree.map(_spec, params, is_leaf=lambda node: isinstance(node, nnx.Variable)))

    def on_device(params: Params, *tokens: Array) -> Array:
        params = jax.tree.map(partial(_whole, x.dtype), params, specs)
        if "bias" in params["down_proj"]:
            # Every part of the hidden width adds to a token's output, the bias once.
            params["down_proj"]["bias"] *= lax.axis_index("tensor") == 0
        mine: Experts = nnx.merge(graphdef, params)
        first = lax.axis_index("expert") * mine.count

        def mix(tokens: tuple[Array, ...]) -> Array:
            x, chosen, weights = tokens
            return _mix(mine, x, chosen - first, weights)

        tokens = tuple(map(_varying, tokens))
        if mesh.shape["expert"] == 1:
            return lax.psum(mix(tokens), "tensor")
        of_group = lax.map(jax.checkpoint(mix), tuple(lax.all_gather(leaf, "expert") for leaf in tokens))
        return lax.psum(lax.psum_scatter(of_group, "expert"), "tensor")

    rows = PartitionSpec(ROWS)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(specs, rows, rows, rows), out_specs=rows)(
        nnx.to_pure_dict(params), x, chosen, weights
    )


def _spec(param: nnx.Param) -> PartitionSpec:
    names = param.get_metadata()["out_sharding"][-param.ndim :]  # without "layers", along which it was cut
    return PartitionSpec(*map(_MESH_AXES.get, names))


def _whole(dtype: jnp.dtype, leaf: Array, spec: PartitionSpec) -> Array:
    """A parameter in the compute dtype, its "fsdp" parts joined."""
    leaf, axes = leaf.astype(dtype), tuple(spec)
    return _varying(lax.all_gather(leaf, "fsdp", axis=axes.index("fsdp"), tiled=True) if "fsdp" in axes else leaf)


def _varying(x: Array) -> Array:
    """Mark `x` as differing between all devices: the transpose sums its gradient over them."""
    missing = tuple(axis for axis in (*ROWS, "tensor") if axis not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x
