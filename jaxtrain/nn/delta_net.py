"""`GatedDeltaNet`: a recurrent layer in the place of attention (https://arxiv.org/abs/2412.06464)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxtrain.nn.attention import AttentionInputs
from jaxtrain.nn.cache import RecurrentState
from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.remat import ATTENTION_OUT, QKV
from jaxtrain.ops.blockwise import RESIDUALS
from jaxtrain.ops.delta_rule import gated_delta_rule
from jaxtrain.ops.short_convolution import next_tail, short_convolution
from jaxtrain.types import Array

_EPSILON = 1e-6  # of the norms of queries and keys


class GatedDeltaNet(nnx.Module):
    """Queries, keys and values by a projection, a short convolution and SiLU; the gated delta rule over them; a norm of
    each head's output times a gate; and a projection.

    Queries and keys have unit length. Every head of values keeps `exp(-exp(rate) softplus(a + bias))` of its state at a
    token, where a is a projection of the token, as is the share `beta` by which it updates the state.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.delta is not None
        self.sizes = config.delta
        stream = Axes((config.hidden_size,), ("embed",))
        keys = Axes((self.sizes.key_heads, self.sizes.key_width), ("heads", "head_dim"))
        values = Axes((self.sizes.value_heads, self.sizes.value_width), ("heads", "head_dim"))
        scalars = Axes((self.sizes.value_heads,), ("heads",))

        def linear(name: str, inside: Axes, outside: Axes) -> Linear:
            adapter = lora if lora and lora.covers(f"delta.{name}") else None
            return Linear(inside, outside, rngs=rngs, dtype=dtype, std=config.init_std, lora=adapter)

        def taps(heads: Axes) -> nnx.Param:
            shape = (*heads.sizes, self.sizes.conv_width)
            weights = nnx.initializers.normal(config.init_std)(rngs.params(), shape, dtype)
            return nnx.Param(weights, out_sharding=(*heads.names, None))

        self.q_proj, self.k_proj = linear("q_proj", stream, keys), linear("k_proj", stream, keys)
        self.v_proj, self.gate_proj = linear("v_proj", stream, values), linear("gate_proj", stream, values)
        self.beta_proj, self.decay_proj = linear("beta_proj", stream, scalars), linear("decay_proj", stream, scalars)
        self.q_conv, self.k_conv, self.v_conv = taps(keys), taps(keys), taps(values)
        rates = jax.random.uniform(rngs.params(), scalars.sizes, jnp.float32, 0.01, 16.0)
        self.rate = nnx.Param(jnp.log(rates).astype(dtype), out_sharding=scalars.names)
        self.bias = nnx.Param(jnp.ones(scalars.sizes, dtype), out_sharding=scalars.names)
        norm_class = module_class(config, "norm", RMSNorm)
        self.norm = norm_class(config.with_plain_norms(), (self.sizes.value_width,), ("norm",), dtype=dtype)
        self.o_proj = linear("o_proj", values, stream)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        cache: RecurrentState | None,
        dropout_key: Array | None,
    ) -> tuple[Float[Array, "B T D"], RecurrentState]:
        """The output, and the state after the tokens of each row that are not padding (segment 0).

        Without a cache, every segment starts from a state of zeros. With one, the tokens continue the rows of the
        cache, and a token at position 0 starts a row with zeros.
        """
        before = cache or RecurrentState.empty(self.sizes, len(x), x.dtype)
        real = inputs.segment_ids != 0
        if cache is None:
            starts = real & (inputs.segment_ids != jnp.pad(inputs.segment_ids, ((0, 0), (1, 0)), mode="edge")[:, :-1])
        else:
            starts = real & (inputs.positions == 0)
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        projected = [
            checkpoint_name(project(x, key), QKV)
            for project, key in zip((self.q_proj, self.k_proj, self.v_proj), keys[:3], strict=True)
        ]
        gate = checkpoint_name(self.gate_proj(x, keys[3]), QKV)
        q, k, v = (
            jax.nn.silu(short_convolution(each, kernel[...], starts, tail))
            for each, kernel, tail in zip(projected, (self.q_conv, self.k_conv, self.v_conv), before.tails, strict=True)
        )
        tails = [next_tail(each, starts, real.sum(1), tail) for each, tail in zip(projected, before.tails, strict=True)]
        q, k = (each * jax.lax.rsqrt(jnp.sum(each * each, -1, keepdims=True) + _EPSILON) for each in (q, k))
        rate, bias = self.rate[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        beta = jax.nn.sigmoid(self.beta_proj(x, keys[4]).astype(jnp.float32))
        decay = -jnp.exp(rate) * jax.nn.softplus(self.decay_proj(x, keys[5]).astype(jnp.float32) + bias)
        beta, decay = (jnp.where(real[..., None], each, 0) for each in (beta, decay))
        v, beta, decay = map(partial(_in_groups, groups=self.sizes.groups), (v.astype(x.dtype), beta, decay))
        out, state = gated_delta_rule(q * self.sizes.key_width**-0.5, k, v, decay, beta, starts, before.state)
        out = checkpoint_name(out.reshape(gate.shape).astype(x.dtype), RESIDUALS)
        out = (self.norm(out) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
        return checkpoint_name(self.o_proj(out, keys[6]), ATTENTION_OUT), RecurrentState(state, *tails)


def _in_groups(x: Array, groups: int) -> Array:
    """Heads of values [B, T, K * G, ...] as [B, T, K, G, ...]: G of them share a head of queries and keys."""
    return x.reshape(*x.shape[:2], -1, groups, *x.shape[3:])
