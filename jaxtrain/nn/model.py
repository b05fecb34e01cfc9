"""`Model`: the decoder as pure functions of a nested dict of arrays.

NNX modules build parameters and hold the forward maths; they are split once, here. Everything else (steps, converters,
checkpoints, adapters) sees plain trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtrain.lora import merge_adapters, merge_tokens
from jaxtrain.nn.cache import KVCache, LayerCache, empty_cache, order_on
from jaxtrain.nn.config import FLOAT32, Lora, ModelConfig, NewTokens, RouterLoss
from jaxtrain.nn.decoder import Decoder, Execution
from jaxtrain.nn.heads import LANGUAGE
from jaxtrain.nn.watch import See, watched
from jaxtrain.types import Array, Batch, Params, Routing


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    lora: Lora | None = None
    run: Execution = field(default_factory=Execution)
    param_dtype: np.dtype = FLOAT32
    output: str = LANGUAGE  # the head, by name: see `nn.heads`
    router_loss: RouterLoss = field(
        default_factory=RouterLoss
    )  # what training asks of the routers of a mixture of experts
    new_tokens: NewTokens | None = None  # those that have parameters of their own

    @cached_property
    def _split(self) -> tuple[Any, nnx.State]:
        """The module's graph, and its abstract state."""
        with nnx.use_eager_sharding(False):
            return nnx.split(nnx.eval_shape(self._build(jax.random.key(0))))

    def _build(self, key: Array) -> Callable[[], Decoder]:
        return lambda: Decoder(
            self.config,
            rngs=nnx.Rngs(key),
            dtype=self.param_dtype,
            lora=self.lora,
            output=self.output,
            new=self.new_tokens,
        )

    @property
    def base_frozen(self) -> bool:
        """Whether only adapters, new rows and new heads are trained: `lora.split_adapters` tells them apart."""
        return self.lora is not None or self.new_tokens is not None

    def merged(self, params: Params) -> tuple[Model, Params]:
        """The same function with adapters in the kernels and new rows in the table. Jit it, or it is slow."""
        if self.lora is not None:
            params = merge_adapters(params, self.lora)
        if self.new_tokens is not None:
            params = merge_tokens(params, self.new_tokens)
        return replace(self, lora=None, new_tokens=None), params

    def init(self, key: Array) -> Params:
        """Random parameters. Jit it with `out_shardings` so that no device ever holds more than its part."""
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(self._build(key)()))

    def abstract(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        return nnx.to_pure_dict(self._split[1])

    def axes(self) -> Params:
        """The parameter tree with each leaf's tuple of logical axis names."""
        names = jax.tree.map(
            lambda variable: variable.get_metadata()["out_sharding"],
            self._split[1],
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        return nnx.to_pure_dict(names)

    def hidden(self, params: Params, batch: Batch, dropout_key: Array | None = None) -> Array:
        """Final hidden states [B, T, D] of packed rows."""
        return self.forward(params, batch, dropout_key)[0]

    def forward(self, params: Params, batch: Batch, dropout_key: Array | None = None) -> tuple[Array, Routing | None]:
        """`hidden`, and what the routers did with the batch where the model is a mixture of experts."""
        return self._merge(params).hidden(batch.tokens, batch.positions, batch.segment_ids, self.run, dropout_key)

    def prefill(self, params: Params, tokens: Array, positions: Array, segment_ids: Array) -> tuple[LayerCache, ...]:
        """Keys and values of every layer for packed rows [B, T]; `params` best as of `unstack`."""
        params = unstack(params)
        return self._merge(params).prefill(params["layers"], tokens, positions, segment_ids, self.run)

    def extend(
        self, params: Params, tokens: Array, positions: Array, segment_ids: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        """Hidden states [B, T, D] of tokens that continue `cache`, and the cache with them in it.

        Segment 1 for a row's tokens, 0 for padding after them. `params` best as of `unstack`.
        """
        params = unstack(params)
        return self._merge(params).extend(params["layers"], tokens, positions, segment_ids, cache, self.run)

    def empty_cache(self, rows: int, length: int) -> KVCache:
        return empty_cache(self.config, rows, length, self.run.dtype, order_on(self.run.mesh))

    def head(self, params: Params) -> Array:
        """The head's kernel: [Vp, D] if `tied`, else [D, Vp]."""
        return self._merge(params).head()

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.tied and self.output == LANGUAGE

    def logits(self, params: Params, hidden: Array) -> Array:
        """float32 logits [..., V]; the chunked head is `ops.token_scores`."""
        return self._merge(params).logits(hidden)

    def values(self, params: Params, hidden: Array) -> Array:
        """float32 [B, T]: what a scalar head says of hidden states [B, T, D]."""
        return self._merge(params).values(hidden)

    def watch(self, params: Params, batch: Batch, see: See) -> Array:
        """`hidden`, one operation at a time, telling `see` what every sub-module is given and gives."""
        decoder = self._merge(params)
        with watched(decoder, see), jax.disable_jit():
            return decoder.hidden(batch.tokens, batch.positions, batch.segment_ids, self.run)[0]

    def _merge(self, params: Params) -> Any:
        layers = params["layers"]
        # Unstacked, the decoder's own layers are only the shape of one.
        return nnx.merge(self._split[0], {**params, "layers": layers[0]} if isinstance(layers, tuple) else params)


def unstack(params: Params) -> Params:
    """The tree with `layers` as a tuple of trees, one per layer. Done once, a decode step need not slice them."""
    stacked = params["layers"]
    if isinstance(stacked, tuple):
        return params
    count = len(jax.tree.leaves(stacked)[0])
    return {**params, "layers": tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))}
