"""`Model`: the decoder as pure functions of a nested dict of arrays.

NNX modules create parameters and define the forward pass; they are split once, here. All other code (steps, converters,
checkpoints, adapters) uses plain trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Integer

from jaxtrain.lora import merge_adapters, merge_tokens, split_adapters
from jaxtrain.nn.block import Execution
from jaxtrain.nn.cache import LayerState, ModelCache, empty_cache, order_on
from jaxtrain.nn.config import FLOAT32, DynamicScaling, LongRopeScaling, Lora, ModelConfig, NewTokens, RouterLoss
from jaxtrain.nn.decoder import Decoder
from jaxtrain.nn.heads import LANGUAGE
from jaxtrain.nn.watch import Observer, watched
from jaxtrain.ops.head_chunks import Head
from jaxtrain.parallel.mesh import platform_of
from jaxtrain.parallel.sharding import context_shards
from jaxtrain.types import Array, Batch, Params, Routing


@dataclass(frozen=True)
class Model:
    """A decoder as pure functions of its parameters. Hashable, so jitted functions take it as a static argument."""

    config: ModelConfig
    lora: Lora | None = None
    run: Execution = field(default_factory=Execution)
    param_dtype: np.dtype = FLOAT32
    output: str = LANGUAGE  # the name of the head: see `nn.heads`
    router_loss: RouterLoss = field(default_factory=RouterLoss)  # weights of the losses of a mixture's routers
    new_tokens: NewTokens | None = None  # tokens whose rows are separate parameters

    @cached_property
    def _split(self) -> tuple[Any, nnx.State]:
        """The module's graph, and its abstract state."""
        with nnx.use_eager_sharding(False):
            return nnx.split(nnx.eval_shape(self._build(jax.random.key(0))))

    def _build(self, key: jax.Array) -> Callable[[], Decoder]:
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
        """Whether only a part of the parameters is trained, which `split` separates."""
        return self.lora is not None or self.new_tokens is not None

    def split(self, params: Params) -> tuple[Params, Params]:
        """(trained, frozen) under adapters or new rows: adapters, new rows, new heads and what is trained in full."""
        return split_adapters(params, self.lora.full_paths if self.lora else ())

    def merged(self, params: Params) -> tuple[Model, Params]:
        """The same model with adapters merged into the kernels and new rows into the table. Best jitted."""
        if self.lora is not None:
            params = merge_adapters(params, self.lora)
        if self.new_tokens is not None:
            params = merge_tokens(params, self.new_tokens)
        return replace(self, lora=None, new_tokens=None), params

    def init(self, key: jax.Array) -> Params:
        """Random parameters. Jit it with `out_shardings`, so that no device holds more than its shard."""
        with nnx.use_eager_sharding(False):
            return self._in_dtypes(nnx.to_pure_dict(nnx.state(self._build(key)())))

    def abstract(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(self._in_dtypes, nnx.to_pure_dict(self._split[1]))

    def _in_dtypes(self, params: Params) -> Params:
        """The tree with the parameters that are trained in full in the dtype of the adapters."""
        lora = self.lora
        if lora is None or not lora.full_paths:
            return params

        def cast(path: tuple[Any, ...], leaf: Array) -> Array:
            dotted = jax.tree_util.keystr(path, simple=True, separator=".")
            return leaf.astype(lora.dtype) if dotted in lora.full_paths else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    def axes(self) -> Params:
        """The parameter tree with each leaf's tuple of logical axis names."""
        names = jax.tree.map(
            lambda variable: variable.get_metadata()["out_sharding"],
            self._split[1],
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        return nnx.to_pure_dict(names)

    def hidden(self, params: Params, batch: Batch, dropout_key: Array | None = None) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows."""
        return self.forward(params, batch, dropout_key)[0]

    def forward(
        self, params: Params, batch: Batch, dropout_key: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """`hidden`, and the statistics of the routers of a mixture of experts."""
        assert batch.prefix_ids is None or self.shares_prefixes
        decoder = self._merge(params)
        rows = batch.tokens, batch.positions, batch.segment_ids
        return decoder.hidden(*rows, self.run, dropout_key, batch.prefix_ids)

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows may have segments that continue others (`Batch.prefix_ids`), with equal states.

        Not with recurrent layers, nor with a custom attention, nor with ropes that depend on the length of a sequence,
        nor with a mixture of experts, whose routers' statistics count tokens, nor on sharded rows, nor with cuDNN's
        attention; with splash attention only without windows.
        """
        config, mesh, attention = self.config, self.run.mesh, self.run.attention
        kinds = config.pattern
        recurrent = any(kind.mixer != "attention" for kind in kinds)
        by_length = any(kind.rope and isinstance(kind.rope.scaling, DynamicScaling | LongRopeScaling) for kind in kinds)
        if recurrent or by_length or config.moe is not None or config.modules.attention is not None:
            return False
        if attention == "cudnn" or context_shards(mesh) > 1:
            return False
        by_place = attention != "xla" and not (attention == "auto" and platform_of(mesh) != "tpu")
        return not (by_place and any(kind.window is not None for kind in kinds))

    def prefill(
        self,
        params: Params,
        tokens: Integer[Array, "B T"],
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"],
    ) -> tuple[LayerState, ...]:
        """The state of every layer after packed rows. `unstack` the parameters once, to save copies at every call."""
        params = self.unstack(params)
        return self._merge(params).prefill(params["layers"], tokens, positions, segment_ids, self.run)

    def extend(
        self,
        params: Params,
        tokens: Integer[Array, "B T"],
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"],
        cache: ModelCache,
    ) -> tuple[Float[Array, "B T D"], ModelCache]:
        """Hidden states of tokens that continue the rows of `cache`, and the cache with these tokens in it.

        The segment of tokens is 1, that of the padding after them 0. `unstack` the parameters once, to save copies at
        every call.
        """
        params = self.unstack(params)
        return self._merge(params).extend(params["layers"], tokens, positions, segment_ids, cache, self.run)

    def empty_cache(self, rows: int, length: int) -> ModelCache:
        """A cache for `rows` sequences of up to `length` tokens."""
        return empty_cache(self.config, rows, length, self.run.dtype, order_on(self.run.mesh))

    def head(self, params: Params) -> Head:
        """The projection onto the vocabulary: the embedding if `tied`."""
        return Head(self._merge(params).head(), self.config.vocab_size, self.tied, self.config.logit_softcap)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.tied and self.output == LANGUAGE

    def logits(self, params: Params, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Logits in float32. `ops.token_scores` computes scores without them."""
        return self._merge(params).logits(hidden, self.run.mesh)

    def values(self, params: Params, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens"]:
        """The outputs of a scalar head, float32."""
        return self._merge(params).values(hidden)

    def watch(self, params: Params, batch: Batch, observer: Observer) -> Float[Array, "B T D"]:
        """`hidden`, one operation at a time, with `observer` called on the inputs and outputs of all submodules."""
        decoder = self._merge(params)
        with watched(decoder, observer), jax.disable_jit():
            return decoder.hidden(batch.tokens, batch.positions, batch.segment_ids, self.run)[0]

    def modules(self, params: Params) -> Iterator[tuple[str, nnx.Module]]:
        """All submodules with their paths, those of layers one layer after the other (`layers.3.attn.q_proj`)."""
        decoder = self._merge(params)
        for path, module in nnx.iter_modules(decoder):
            if path and path[0] != "layers":
                yield ".".join(map(str, path)), module
        for layer, block in enumerate(decoder.blocks()):
            for path, module in nnx.iter_modules(block):
                yield ".".join(map(str, ("layers", layer, *path))), module

    def _merge(self, params: Params) -> Any:
        layers = params["layers"]
        if isinstance(layers, tuple):
            # The graph has one module for all layers; each part of it is merged with the parameters of any layer.
            params = {**params, "layers": {part: node for layer in layers for part, node in layer.items()}}
        return nnx.merge(self._split[0], params)

    def unstack(self, params: Params) -> Params:
        """The tree with `layers` as a tuple of trees, one per layer, so that decode steps do not slice them."""
        stacked = params["layers"]
        if isinstance(stacked, tuple):
            return params
        assert isinstance(stacked, dict)
        rows = {part: self.config.layers_of(part) for part in stacked}

        def row(node: Any, number: int) -> Any:
            return jax.tree.map(lambda leaf: leaf[number], node)

        layers = tuple(
            {part: row(node, rows[part].index(layer)) for part, node in stacked.items() if layer in rows[part]}
            for layer in range(self.config.num_layers)
        )
        return {**params, "layers": layers}
