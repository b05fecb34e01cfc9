"""`ModelConfig`: what a decoder is, without saying whose it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

FLOAT32 = np.dtype("float32")
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
QKNorm = Literal["head", "all"]


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (transformers' `rope_type: linear`): positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling by the sequence's length (`dynamic`): no change up to `max_positions`, a larger base beyond."""

    factor: float
    max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (`yarn`, https://arxiv.org/abs/2309.00071): slow channels are interpolated, fast ones kept, with a ramp
    between those that turn `beta_slow` and `beta_fast` times over the original positions."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # multiplies cosines and sines
    truncate: bool  # the ramp starts and ends at whole channels


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (`longrope`, https://arxiv.org/abs/2402.13753): each channel is divided by a factor of its own, `long`
    for sequences of more than `original_max_positions` tokens, `short` for others."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float  # multiplies cosines and sines, of short sequences too


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent rope scaling (`llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ProportionalScaling:
    """A partial rope with the frequencies of a whole one (`proportional`): the channels beyond the part do not turn."""

    factor: float


Scaling = LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling | ProportionalScaling


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: Scaling | None = None
    partial: float = 1.0  # the share of a head's channels that turn


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers whose parameters are stacked together."""

    window: int | None  # a token attends to itself and the `window - 1` tokens before it; None: to all before
    rope: Rope | None  # None: the layer does not know positions


@dataclass(frozen=True)
class ClampedSwiGLU:
    """GPT-OSS's gate: `(up + 1) * gate * sigmoid(alpha * gate)`, gate at most `limit`, up within plus and minus it."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class MoE:
    """Experts in place of one feed-forward layer: a router gives each token to a few of them."""

    num_experts: int  # E
    experts_per_token: int
    intermediate_size: int  # F of one expert
    renormalise: bool  # the weights of a token's experts sum to 1: a softmax over them alone, not over all experts
    bias: bool = False  # of the router and of the experts' matrices
    swiglu: ClampedSwiGLU | None = None  # None: the model's activation gates

    def __post_init__(self) -> None:
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. Sizes have no default; a switch is off unless a family turns it on."""

    family: str  # names the file under converters/families that reads and writes it
    vocab_size: int  # V as the tokenizer and the checkpoint know it
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    norm_eps: float
    activation: Activation
    tied: bool  # the head is the embedding, transposed
    init_std: float  # standard deviation of random weights
    pattern: tuple[LayerKind, ...]  # one per layer
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    pre_norms: bool = True  # a norm before attention and one before the feed-forward layer
    post_norms: bool = False  # a norm after each, before it joins the residual stream
    norm_offset: bool = False  # norms multiply by 1 + scale
    norm_in_float32: bool = False  # norms multiply by the scale before they round to the compute dtype, not after
    qk_norm: QKNorm | None = None  # RMS norm of q and k before rope: over each "head", or over "all" heads together
    attention_scale: float | None = None  # of q . k; None: 1 / sqrt(H)
    attention_softcap: float | None = None  # scores are bent as cap * tanh(score / cap)
    logit_softcap: float | None = None  # and so are logits
    sinks: bool = False  # every head has a learned score of a key without value, which all its queries see
    embedding_scale: float = 1.0  # rounded to the compute dtype before it multiplies
    residual_scale: float = 1.0  # of what attention and feed-forward layers add to the residual stream
    logit_scale: float = 1.0  # of the logits, before their softcap
    moe: MoE | None = None  # in every layer
    vocab_multiple: int = 64  # the stored vocabulary is rounded up to this; the rest is inert

    def __post_init__(self) -> None:
        assert len(self.pattern) == self.num_layers, (len(self.pattern), self.num_layers)
        assert self.pre_norms or self.post_norms, "a residual stream without norms"
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def padded_vocab(self) -> int:
        """V as stored: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class RouterLoss:
    """Weights of the losses of a mixture's routers, beside the task's: see `objectives.router`."""

    balance: float = 0.0
    z: float = 0.0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linears that `targets` name (https://arxiv.org/abs/2106.09685)."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # see `names_linear`
    rslora: bool = False  # scale by alpha / sqrt(rank), so that high ranks learn too (https://arxiv.org/abs/2312.03732)
    dtype: np.dtype = FLOAT32  # of the adapters; the base has the model's

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, path: str) -> bool:
        """Whether the linear at `path` within a layer (`attn.q_proj`) has an adapter."""
        return any(names_linear(target, path) for target in self.targets)


@dataclass(frozen=True)
class NewTokens:
    """Tokens whose rows of embedding and head are parameters of their own, trained while the table is frozen."""

    first: int  # id of the first one
    count: int


def names_linear(target: str, path: str) -> bool:
    """Whether `target` names the linear at `path` within a layer: `all-linear`, a name (`q_proj`), or a glob over
    dotted names (`attn.*`, `layers.*.mlp.up_proj`). Layers are stacked, so an adapter is on all of them or on none."""
    parts = f"layers.*.{path}".split(".")
    return target == "all-linear" or any(fnmatchcase(".".join(parts[i:]), target) for i in range(len(parts)))
