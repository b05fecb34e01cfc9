"""The section `model`: where the model comes from, and how it is held and computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxtrain.config.marks import IN_HOME, INPUT_PATH, MAY_CHANGE
from jaxtrain.config.sections import DType, NonNegativeInt, Section


class LoraSection(Section):
    path: Annotated[str | None, INPUT_PATH, IN_HOME] = None
    """A PEFT folder to start from; it then determines the five keys below."""
    rank: PositiveInt | None = None
    """Default: 16."""
    alpha: PositiveFloat | None = None
    """Default: 32."""
    rslora: bool | None = None
    """Scale by alpha / sqrt(rank) instead of alpha / rank; default: false."""
    targets: list[str] | None = None
    """Names, globs (`attn.*`) or all-linear; default: the seven *_proj of a layer."""
    modules_to_save: list[str] | None = None
    """Modules that are trained in full beside the adapters, e.g. [embed_tokens, lm_head, norm]: names or globs, by
    transformers' names of modules or ours; default: those of `path`, or none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of inputs of adapters that are set to 0."""
    dtype: DType = "float32"
    """Of the adapters and of modules_to_save; model.param_dtype is the base's."""


class AddTokensSection(Section):
    names: list[str] = Field(default_factory=list)
    """The new tokens, or those before the numbered ones."""
    prefix: str | None = None
    """What precedes the number in each of `count` further tokens: prefix + number + suffix."""
    suffix: str = ">"
    """What follows the number."""
    count: NonNegativeInt = 0
    """How many numbered ones."""
    special: bool = False
    """Whether they are left out where text is decoded without special tokens."""
    alone: bool = False
    """Whether the new rows alone are trained."""

    @property
    def tokens(self) -> list[str]:
        return [*self.names, *(f"{self.prefix}{number}{self.suffix}" for number in range(self.count))]

    @model_validator(mode="after")
    def _some(self) -> AddTokensSection:
        if (self.prefix is None) != (self.count == 0):
            raise ValueError("`prefix` and `count` belong together")
        if not self.tokens:
            raise ValueError("give `names`, or `prefix` and `count`")
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError("a token is named twice")
        return self


class ModulesSection(Section):
    attention: str | None = None
    """package.module:Class; default: jaxtrain.nn.attention:Attention."""
    mlp: str | None = None
    """Default: jaxtrain.nn.mlp:GatedMLP, or jaxtrain.nn.moe:SparseMLP."""
    norm: str | None = None
    """Default: jaxtrain.nn.norm:RMSNorm."""


_Block = Annotated[PositiveInt, Field(multiple_of=128)]


class SplashSection(Section):
    """Blocks of splash attention on TPU, in tokens. Rows that a block does not divide have a smaller one."""

    block_q: _Block = 1024
    """Queries."""
    block_kv: _Block = 1024
    """Keys that are in the chip's vector memory."""
    block_kv_compute: _Block = 512
    """Keys that are computed at a time."""
    backward_block_kv: _Block = 2048
    """Keys, in the fused backward kernel."""
    fused_backward: bool = True
    """One kernel for all gradients, for rows of up to 16384 tokens without a window or mesh.context."""


Place = Literal["keep", "recompute", "offload"]


class RematSection(Section):
    """What becomes of the activations of a layer until its backward pass: kept, computed again, or moved to the host's
    memory. The input of a layer is always kept."""

    qkv: Place = "recompute"
    """Queries, keys and values as they are projected."""
    attention: Place = "recompute"
    """The output of the attention, and one float per head and token."""
    attention_out: Place = "recompute"
    """The output of the projection of `attention`."""
    gate: Place = "recompute"
    """Of a dense feed-forward layer, before the activation function."""
    up: Place = "recompute"
    """Of a dense feed-forward layer, beside the gate."""
    down: Place = "recompute"
    """Used only by a norm after the layer (Gemma)."""


RematSetting = Annotated[
    Annotated[Literal["none", "dots", "full"], Tag("<preset>")] | Annotated[RematSection, Tag("<names>")],
    Discriminator(lambda value: "<names>" if isinstance(value, dict | RematSection) else "<preset>"),
]


class ModelSection(Section):
    path: Annotated[str | None, INPUT_PATH, IN_HOME] = None
    """A Hugging Face folder, a URL or a name on the hub."""
    config: dict[str, Any] | None = None
    """Instead of `path`: a config.json's content, random weights."""
    tokenizer: Annotated[str | None, INPUT_PATH, IN_HOME] = None
    """A tokenizer's folder; default: `path`; none at all where all rows are input_ids."""
    add_tokens: AddTokensSection | None = None
    """New rows of the vocabulary, at the mean of the old ones."""
    chat_template: Annotated[str | None, INPUT_PATH, IN_HOME] = None
    """In place of the tokenizer's: a jinja file, or builtin:qwen3-thinking, which keeps the thoughts of all turns."""
    compute_dtype: DType = "bfloat16"
    """Of the forward and the backward pass."""
    param_dtype: DType = "float32"
    """Of the parameters and of what the optimizer updates."""
    remat: Annotated[RematSetting, MAY_CHANGE] = "full"
    """full: `attention` alone is kept; dots: all that `RematSection` names; none: nothing is computed again."""
    attention: Annotated[Literal["auto", "xla", "splash", "cudnn"], MAY_CHANGE] = "auto"
    """The implementation; auto: splash on TPU, cuDNN on NVIDIA where it equals XLA, else XLA."""
    splash: Annotated[SplashSection, MAY_CHANGE] = SplashSection()
    """How splash attention is divided into blocks."""
    head_chunk: Annotated[PositiveInt | None, MAY_CHANGE] = None
    """Tokens of a chunk of logits on each device; default: 2048 on TPU (v5e: 512) and GPU, 512 elsewhere."""
    compiler_options: Annotated[dict[str, str | int | float | bool], MAY_CHANGE] = Field(default_factory=dict)
    """Of XLA, for the training step, prefill and decode."""
    modules: ModulesSection = ModulesSection()
    """Classes that replace modules of the decoder: see docs/modules.md."""
    head: str = "lm"
    """`lm`, `scalar` (rewards, values), or package.module:function, a head of your own."""
    backend: Literal["jaxtrain", "torchax"] = "jaxtrain"
    """`torchax` runs any architecture of transformers, with fewer features."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Of the load-balancing loss of a mixture of experts."""
    router_z_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Of the router's z-loss, which keeps its logits small."""
    lora: LoraSection | None = None
    """Trains adapters and leaves the model as it is."""
    quantize: Literal["int8", "nf4"] | None = None
    """How the frozen kernels under LoRA are held."""
    vocab_multiple: PositiveInt = 64
    """Embeddings and head are padded to a multiple of so many rows."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either `path` (a checkpoint) or `config` (random weights), not both and not neither")
        alone = self.add_tokens is not None and self.add_tokens.alone
        if alone and self.lora is not None:
            raise ValueError("add_tokens.alone leaves nothing to `lora`, under which new rows are trained anyway")
        if self.quantize is not None and self.lora is None and not alone:
            raise ValueError(f"quantize={self.quantize} needs `lora` or `add_tokens.alone`: such weights are frozen")
        if self.add_tokens is not None and self.config is not None and self.tokenizer is None:
            raise ValueError("add_tokens needs `tokenizer`")
        return self
