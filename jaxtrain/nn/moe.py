"""Mixture of experts: a router selects a few feed-forward layers for every token (https://arxiv.org/abs/1701.06538).

No token is dropped and nothing is padded to a capacity: the pairs of a token and one of its experts are sorted by
expert, and each expert multiplies its group of rows (`ops.ragged`).

On a mesh each device sorts its own tokens and holds a shard of the experts (axis "expert") and of their hidden width
("tensor"); parameters that `FSDP` shards are gathered first. Over "expert" only the chosen pairs travel, to the device
that holds their expert and back (`ops.exchange`), in buffers that do not grow if all choose the same expert.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Integer

from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.mlp import ACTIVATIONS, GatedMLP
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm, rms_norm
from jaxtrain.nn.router import by_sigmoid, by_softmax, routing_of
from jaxtrain.ops.exchange import Slots, at_owners, block_rows, plan_route, sort_into_slots
from jaxtrain.ops.ragged import copies_of_tokens, grouped_matmul, sums_of_slots
from jaxtrain.ops.varying import varying_over
from jaxtrain.parallel.sharding import CONTEXT, FSDP, ROWS
from jaxtrain.types import Array, Params, Routing, get_leaf

# The mesh axes of the experts' logical axes under all presets: a mesh axis that a preset does not use has size 1.
_MESH_AXES = {"expert": "expert", "embed": FSDP, "mlp": "tensor"}

_ALL_AXES = (*ROWS, CONTEXT, "tensor")


class SparseMLP(nnx.Module):
    """`sum of weight_e * expert_e(x)` over the experts e that the router chooses for x, plus that of a shared one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.moe is not None
        self.moe = config.moe
        self.router = Linear(
            Axes((config.hidden_size,), ("embed",)),
            Axes((self.moe.num_experts,), ("router",)),
            rngs=rngs,
            dtype=dtype,
            std=config.init_std,
            bias=self.moe.bias,
            lora=lora if lora and lora.covers("mlp.router") else None,
        )
        self.balance = nnx.data(None)
        if self.moe.scores == "sigmoid":
            # In float32 whatever the dtype of parameters: rounding it would change which experts are chosen.
            self.balance = nnx.Param(jnp.zeros(self.moe.num_experts, jnp.float32), out_sharding=("router",))
        self.experts = Experts(config, rngs=rngs, dtype=dtype, lora=lora)
        self.norm = self.post_norm = self.scales = nnx.data(None)
        if self.moe.normed:
            norm_class = module_class(config, "norm", RMSNorm)
            self.norm, self.post_norm = (
                norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype) for _ in range(2)
            )
            self.scales = RouterScales(config, dtype=dtype)
        self.shared = self.shared_gate = nnx.data(None)
        if self.moe.shared_size:
            sizes = replace(config, intermediate_size=self.moe.shared_size, mlp_bias=self.moe.bias)
            self.shared = GatedMLP(sizes, rngs=rngs, dtype=dtype, lora=lora, at="mlp.shared")
        if self.moe.shared_gate:
            self.shared_gate = Linear(
                Axes((config.hidden_size,), ("embed",)),
                Axes((1,), ("router",)),
                rngs=rngs,
                dtype=dtype,
                std=config.init_std,
                lora=lora if lora and lora.covers("mlp.shared_gate") else None,
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Integer[Array, "B T"],
        mesh: Mesh | None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The output, and the statistics of the router over the tokens that are not padding (segment 0).

        `key` turns on the dropout of the adapters of the router and the shared expert; those of experts have none.
        """
        read = x if self.scales is None else self.scales.scaled(x)
        if self.balance is None:
            logits = self.router(read, key).astype(jnp.float32)
            choice = by_softmax(logits, self.moe)
        else:
            logits = self.router(x.astype(jnp.float32), key)
            choice = by_sigmoid(logits, self.balance[...], self.moe)
        if self.scales is not None:
            choice = choice._replace(weights=choice.weights * self.scales.of_experts(choice.experts))
        x = x if self.norm is None else self.norm(x)
        mix = partial(_mix_locally, self.experts) if mesh is None else partial(_mix_on_mesh, self.experts, mesh)
        out = mix(x, choice.experts, choice.weights)
        if self.shared is not None:
            out += self._of_shared(self.shared, x, key)
        out = out if self.post_norm is None else self.post_norm(out)
        return out, routing_of(logits, choice, segment_ids > 0)

    def _of_shared(self, shared: GatedMLP, x: Array, key: Array | None) -> Array:
        keys: list[Array | None] = [None] * 4
        if key is not None:
            keys = list(jax.random.split(jax.random.fold_in(key, 1), 4))
        out = shared(x, keys[:3])
        return out if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x, keys[3])) * out


class RouterScales(nnx.Module):
    """Factors of the input of a router, and of the weights of the experts that it chooses."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype):
        assert config.moe is not None
        self.eps, self.root = config.norm_eps, config.hidden_size**-0.5
        self.input = nnx.Param(jnp.ones(config.hidden_size, dtype), out_sharding=("norm",))
        self.experts = nnx.Param(jnp.ones(config.moe.num_experts, dtype), out_sharding=("norm",))

    def scaled(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The input of the router: a norm of `x`, times the factors and 1 / sqrt(D)."""
        return rms_norm(x, self.eps) * self.input[...].astype(x.dtype) * jnp.asarray(self.root, x.dtype)

    def of_experts(self, experts: Integer[Array, "B T k"]) -> Float[Array, "B T k"]:
        """In float32."""
        return self.experts[...].astype(jnp.float32)[experts]


class ExpertRows(NamedTuple):
    """Copies of tokens, sorted by expert. Rows at the end may belong to no expert and hold any bits."""

    x: Array  # [M, D]
    weights: Array  # [M] the router's, in float32
    sizes: Array  # [E] rows of each expert


class Experts(nnx.Module):
    """The feed-forward layers of all experts, or of the shard that a device holds."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.moe is not None
        self.activation, self.swiglu = config.activation, config.moe.swiglu
        stream, hidden = (config.hidden_size, "embed"), (config.moe.intermediate_size, "mlp")
        linear = partial(ExpertLinear, config, rngs=rngs, dtype=dtype, lora=lora)
        self.gate_proj = linear("gate_proj", stream, hidden)
        self.up_proj = linear("up_proj", stream, hidden)
        self.down_proj = linear("down_proj", hidden, stream)

    def __call__(self, rows: ExpertRows) -> Float[Array, "M D"]:
        """The output of the expert of each row, times the weight of the row.

        The hidden activations are multiplied by the weights: thus the gradient of a weight needs no output.
        """
        member = _members(rows.sizes, len(rows.x))
        gate, up = self.gate_proj(rows.x, rows.sizes, member), self.up_proj(rows.x, rows.sizes, member)
        if self.swiglu is None:
            hidden = ACTIVATIONS[self.activation](gate) * up
        else:
            gate, up = jnp.minimum(gate, self.swiglu.limit), jnp.clip(up, -self.swiglu.limit, self.swiglu.limit)
            hidden = (up + 1) * gate * jax.nn.sigmoid(self.swiglu.alpha * gate)
        weights = rows.weights[:, None]
        shares = jnp.where(member > 0, weights, 0)  # a weight of no expert may be NaN
        return self.down_proj((hidden * weights).astype(hidden.dtype), rows.sizes, shares)

    @property
    def count(self) -> int:
        """The number of experts, of a shard those of the shard."""
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

    def __call__(
        self, x: Float[Array, "M I"], sizes: Integer[Array, " E"], bias_scales: Float[Array, "M E"]
    ) -> Float[Array, "M O"]:
        """Multiply rows that are sorted by expert, and add the bias of each expert times `bias_scales`."""

        def product(x: Array, kernels: nnx.Param) -> Array:
            return grouped_matmul(x, kernels[...].astype(x.dtype), sizes)

        y = product(x, self.kernel)
        if self.bias is not None:
            y += _sums_of_biases(bias_scales.astype(x.dtype), self.bias[...].astype(x.dtype))
        if self.lora is not None:
            assert self.lora_a is not None and self.lora_b is not None
            y += self.lora.scale * product(product(x, self.lora_a), self.lora_b)
        return y


@jax.custom_vjp
def _sums_of_biases(scales: Array, biases: Array) -> Array:
    """`scales @ biases` of [M, E] and [E, O]: a matmul, since the gradient of a lookup would be a scatter.

    The gradient by the biases ignores rows whose scales are 0, which may hold any bits.
    """
    return scales @ biases


def _sums_fwd(scales: Array, biases: Array) -> tuple[Array, tuple[Array, Array]]:
    return _sums_of_biases(scales, biases), (scales, biases)


def _sums_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    scales, biases = saved
    return g @ biases.T, scales.T @ jnp.where((scales != 0).any(1, keepdims=True), g, 0)


_sums_of_biases.defvjp(_sums_fwd, _sums_bwd)


def _members(sizes: Array, rows: int) -> Array:
    """[M, E] in float32: 1 where a row belongs to the expert."""
    ends, row = jnp.cumsum(sizes), jnp.arange(rows)[:, None]
    return ((row >= ends - sizes) & (row < ends)).astype(jnp.float32)


def _mix(apply: Callable[[Array, Array, Slots], Array], block: int, experts: int, *tokens: Array) -> Array:
    """x [..., D], chosen [..., k] of `experts`, and weights [..., k] -> [..., D].

    `apply` gives the weighted outputs of rows and weights in slots.
    """
    x, chosen, weights = (leaf.reshape(-1, leaf.shape[-1]) for leaf in tokens)
    k = chosen.shape[1]
    slots = sort_into_slots(chosen.reshape(-1), experts, block)
    of_token = slots.pairs // k, slots.places.reshape(-1, k)
    weights = copies_of_tokens(weights.reshape(-1, 1), slots.pairs, slots.places[:, None])[:, 0]
    out = apply(copies_of_tokens(x, *of_token), jnp.where(slots.real, weights, 0), slots)
    return sums_of_slots(out, *of_token).reshape(tokens[0].shape)


def _mix_locally(experts: Experts, *tokens: Array) -> Array:
    """`_mix` by experts that this device holds, all of them."""
    return _mix(lambda x, weights, slots: experts(ExpertRows(x, weights, slots.sizes)), 1, experts.count, *tokens)


def _mix_on_mesh(experts: Experts, mesh: Mesh, x: Array, chosen: Array, weights: Array) -> Array:
    """`_mix` for x [B, T, D] with its rows sharded over `ROWS`, its tokens over `CONTEXT`, and experts sharded by
    `_MESH_AXES`."""
    graphdef, params = nnx.split(experts)
    specs = nnx.to_pure_dict(jax.tree.map(_spec, params, is_leaf=lambda node: isinstance(node, nnx.Variable)))

    def compute(params: Params, rows: tuple[Array, Array], sizes: Array) -> Array:
        local: Experts = nnx.merge(graphdef, params)
        return local(ExpertRows(*rows, sizes))

    def on_device(params: Params, *tokens: Array) -> Array:
        params = jax.tree.map(partial(_gathered, x.dtype), params, specs)
        down_proj = params["down_proj"]
        if isinstance(down_proj, dict) and "bias" in down_proj:
            # The outputs of all shards of the hidden width are summed: one shard adds the bias.
            down_proj["bias"] = get_leaf(down_proj, "bias") * (lax.axis_index("tensor") == 0)

        def by_owners(x: Array, weights: Array, slots: Slots) -> Array:
            route = plan_route(slots, block, "expert", _ALL_AXES)
            return at_owners(compute, "expert", block, params, (x, weights), route)

        block = block_rows(tokens[1].size, experts.count)
        tokens = tuple(map(_varying, tokens))
        if mesh.shape["expert"] == 1:
            out = _mix_locally(nnx.merge(graphdef, params), *tokens)
        else:
            out = _mix(by_owners, block, experts.count, *tokens)
        return lax.psum(out, "tensor")

    tokens = PartitionSpec(ROWS, CONTEXT)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(specs, tokens, tokens, tokens), out_specs=tokens)(
        nnx.to_pure_dict(params), x, chosen, weights
    )


def _spec(param: nnx.Param) -> PartitionSpec:
    names = param.get_metadata()["out_sharding"][-param.ndim :]  # without "layers": of one layer
    return PartitionSpec(*map(_MESH_AXES.get, names))


def _gathered(dtype: jnp.dtype, leaf: Array, spec: PartitionSpec) -> Array:
    """A parameter in the compute dtype, gathered over `FSDP`."""
    leaf, axes = leaf.astype(dtype), tuple(spec)
    return _varying(lax.all_gather(leaf, FSDP, axis=axes.index(FSDP), tiled=True) if FSDP in axes else leaf)


def _varying(x: Array) -> Array:
    """`x` as differing between all devices."""
    return varying_over(x, _ALL_AXES)
