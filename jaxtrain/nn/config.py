"""`ModelConfig`: the architecture of a decoder, in terms that all model families share."""

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

FLOAT32 = np.dtype("float32")
Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]
QKNorm = Literal["head", "all"]
Mixer = Literal["attention", "global", "delta"]
RouterScores = Literal["softmax", "sigmoid"]


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
    """YaRN (`yarn`, https://arxiv.org/abs/2309.00071): low frequencies are interpolated and high ones kept, with a
    linear ramp between the channels that rotate `beta_slow` and `beta_fast` times over the original positions."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # multiplies cosines and sines
    truncate: bool  # the ends of the ramp are rounded to channel indices
    score_mscale: float = 0.0  # scores of latent attention are multiplied by (0.1 score_mscale ln(factor) + 1)^2


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (`longrope`, https://arxiv.org/abs/2402.13753): each frequency is divided by its factor in
    `long` for sequences of more than `original_max_positions` tokens, in `short` for others."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float  # multiplies cosines and sines, also of short sequences


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent rope scaling (`llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ProportionalScaling:
    """A partial rope with the frequencies of a full one (`proportional`): the other channels are not rotated."""

    factor: float


Scaling = LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling | ProportionalScaling


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: Scaling | None = None
    partial: float = 1.0  # the share of a head's channels that are rotated

    @property
    def score_factor(self) -> float:
        """What the scores of latent attention are multiplied by."""
        if not isinstance(self.scaling, YarnScaling) or self.scaling.factor <= 1:
            return 1.0
        return (0.1 * self.scaling.score_mscale * math.log(self.scaling.factor) + 1) ** 2


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers: the window and the rope, which need no parameters, and the parts of a layer."""

    window: int | None  # a token attends to itself and the `window - 1` tokens before it; None: to all tokens before it
    rope: Rope | None  # None: no position embedding
    dense: bool = False  # a dense feed-forward layer in a model whose other layers are mixtures of experts
    # "delta": `ModelConfig.delta` in the place of attention; window and rope are None. "global": attention with the
    # sizes of `ModelConfig.global_attention`.
    mixer: Mixer = "attention"
    reuses: bool = False  # attends to the keys and values of the last layer of its mixer that has its own
    beside: bool = False  # a dense feed-forward layer beside the mixture of experts
    wide: bool = False  # a dense feed-forward layer of twice the width

    @property
    def mixer_part(self) -> str:
        """The part of `nn.block.Block` that mixes tokens."""
        return f"{'reusing_' if self.reuses else ''}{_MIXERS[self.mixer]}"

    @property
    def absent(self) -> frozenset[str]:
        """The parts of `nn.block.Block` that a layer of this kind does not have, though others may."""
        if self.beside:
            own = {"mlp", "dense_mlp"}
        else:
            own = {"dense_mlp" if self.dense else "wide_mlp" if self.wide else "mlp"}
        return _OPTIONAL - own - {self.mixer_part}

    def mixing(self) -> "LayerKind":
        """What of the kind the mixer depends on."""
        return replace(self, dense=False, beside=False, wide=False)


_MIXERS: dict[Mixer, str] = {"attention": "attn", "global": "global_attn", "delta": "delta"}
_OPTIONAL = frozenset(
    {"attn", "global_attn", "reusing_attn", "reusing_global_attn", "delta", "mlp", "dense_mlp", "wide_mlp"}
)


@dataclass(frozen=True)
class GlobalAttention:
    """Sizes of the attention of some layers, where they differ from those of the others."""

    num_kv_heads: int  # K
    head_dim: int  # H
    values_are_keys: bool  # values are the projection of keys, before the norm of these


@dataclass(frozen=True)
class ClampedSwiGLU:
    """GPT-OSS's gate: `(up + 1) * gate * sigmoid(alpha * gate)`, with `gate` clipped to at most `limit` and `up` to
    [-limit, limit]."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of a gated delta net: see `nn.delta_net`. Several heads of values share one of queries and keys."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    conv_width: int  # tokens that the convolution before it covers

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ValueError(f"value_heads={self.value_heads} is not a multiple of key_heads={self.key_heads}")

    @property
    def groups(self) -> int:
        """Heads of values for each head of queries and keys."""
        return self.value_heads // self.key_heads


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: see `nn.latent_attention`. `ModelConfig.head_dim` is that of queries: both parts."""

    query_rank: int | None  # of the vector that queries are projected from; None: from the token itself
    rank: int  # R of the vector that keys and values are projected from
    plain_width: int  # P of queries and keys without rope
    rope_width: int  # Q of queries and of the shared key, with rope
    value_width: int  # V
    norm_eps: float  # of the norms of the vectors
    neighbours: bool  # rope turns neighbouring channels in the checkpoint, whose channels the weight rows reorder


@dataclass(frozen=True)
class MoE:
    """A mixture of experts in place of the feed-forward layer: a router selects a few experts for each token."""

    num_experts: int  # E
    experts_per_token: int
    intermediate_size: int  # F of one expert
    renormalise: bool  # softmax over the logits of the selected experts, so that their weights sum to 1; else over all
    bias: bool = False  # biases of the router and of the experts' matrices
    swiglu: ClampedSwiGLU | None = None  # None: a gated MLP with the model's activation
    shared_size: int = 0  # F of an expert that every token passes through; 0: there is none
    shared_gate: bool = False  # its output is multiplied by the sigmoid of a projection of the token
    scores: RouterScores = "softmax"  # "sigmoid": each expert's own, and a bias that is not trained: see `nn.router`
    weight_scale: float = 1.0  # of the weights, with sigmoid scores
    groups: int = 1  # experts are in so many groups of equal size, with sigmoid scores
    groups_per_token: int = 1  # and those of a token in so many of them
    # The input is that of the layer: experts read it through a norm and their output has another, and the router reads
    # it through a norm without a scale. Inputs of the router and weights of experts are multiplied by parameters.
    normed: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}")
        if self.scores == "softmax":
            assert (self.weight_scale, self.groups, self.groups_per_token) == (1, 1, 1), "for sigmoid scores only"
        if not 0 < self.groups_per_token <= self.groups or self.num_experts % self.groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} of groups={self.groups} of num_experts={self.num_experts}: "
                "groups must be of equal size, and the first must not be larger than the second"
            )
        of_group = self.num_experts // self.groups
        if self.groups > 1 and (of_group < 2 or self.experts_per_token > of_group * self.groups_per_token):
            raise ValueError(
                f"experts_per_token={self.experts_per_token} from {self.groups_per_token} groups of {of_group}: a "
                "group must have two experts or more, and those of a token must have as many as it takes"
            )


@dataclass(frozen=True)
class Modules:
    """Import paths (`package.module:Class`) of classes that replace modules of every layer: see `nn.modules`."""

    attention: str | None = None
    mlp: str | None = None
    norm: str | None = None  # also of the final norm and the norms of queries and keys


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and features of a decoder. Sizes have no default; features are off by default."""

    family: str  # the file under converters/families that reads and writes its checkpoints
    vocab_size: int  # V of the checkpoint, without padding
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
    mlp_gate: bool = True  # feed-forward layers multiply by a gate; else down(act(up(x)))
    pre_norms: bool = True  # a norm before attention and one before the feed-forward layer
    post_norms: bool = False  # a norm of the output of each, before it is added to the residual stream
    norm_offset: bool = False  # norms multiply by 1 + scale
    norm_in_float32: bool = False  # norms multiply by the scale before rounding to the compute dtype; else after
    qk_norm: QKNorm | None = None  # RMS norm of q and k before rope: over each "head", or over "all" heads together
    v_norm: bool = False  # RMS norm of the values of each head, without a scale
    attention_scale: float | None = None  # of q . k; None: 1 / sqrt(H)
    attention_softcap: float | None = None  # attention scores are cap * tanh(score / cap)
    logit_softcap: float | None = None  # logits are cap * tanh(logit / cap)
    attention_gate: bool = False  # attention's output is multiplied by the sigmoid of another projection of its input
    sinks: bool = False  # every head has a learned attention score of a key without a value (attention sink)
    embedding_scale: float = 1.0  # factor of the embeddings, rounded to the compute dtype
    residual_scale: float = 1.0  # factor of what attention and feed-forward layers add to the residual stream
    logit_scale: float = 1.0  # factor of the logits, before their softcap
    moe: MoE | None = None  # in every layer that is not `dense`
    delta: DeltaNet | None = None  # of the layers whose mixer it is
    latent: Latent | None = None  # attention is latent attention
    global_attention: GlobalAttention | None = None  # of the layers whose mixer it is
    per_layer_width: int | None = None  # every layer has an input of this width made of the tokens: see `nn.per_layer`
    layer_scale: bool = False  # the output of a layer is multiplied by a scalar that is not trained
    vocab_multiple: int = 64  # the stored vocabulary is padded to a multiple of this
    modules: Modules = Modules()  # user-defined classes

    def __post_init__(self) -> None:
        assert len(self.pattern) == self.num_layers, (len(self.pattern), self.num_layers)
        assert self.pre_norms or self.post_norms, "pre_norms and post_norms are both off"
        assert self.moe or not any(kind.dense for kind in self.pattern), "all layers are dense without a mixture"
        sizes = {"attention": True, "global": self.global_attention, "delta": self.delta}
        assert all(sizes[kind.mixer] for kind in self.pattern), "sizes of a mixer are missing"
        self._check_reuse()
        if self.global_attention and self.modules.attention:
            raise ValueError(
                f"model.modules.attention={self.modules.attention}: layers of family {self.family} have attention of "
                "several sizes, which one class does not replace; remove it"
            )
        if self.latent:
            assert self.head_dim == self.latent.plain_width + self.latent.rope_width, self
            plain = (self.qk_norm, self.attention_softcap, self.attention_gate, self.sinks, self.global_attention)
            assert plain == (None, None, False, False, None) and not self.v_norm, "latent attention has none of these"
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    def _check_reuse(self) -> None:
        """Raise ValueError if a layer reuses keys and values that no layer before it has."""
        own = set[Mixer]()
        for layer, kind in enumerate(self.pattern):
            if kind.reuses and kind.mixer not in own:
                raise ValueError(f"layer {layer} reuses keys and values, and no layer of its kind before it has any")
            own |= set() if kind.reuses else {kind.mixer}

    def rope_dim(self, kind: LayerKind) -> int:
        """Channels of a head that a rope of share 1 turns in a layer of this kind."""
        return self.heads_of(kind)[1] if self.latent is None else self.latent.rope_width

    def heads_of(self, kind: LayerKind) -> tuple[int, int]:
        """The number of heads of keys and values, and the width of a head, in a layer of this kind."""
        if kind.mixer == "global":
            assert self.global_attention is not None
            return self.global_attention.num_kv_heads, self.global_attention.head_dim
        return self.num_kv_heads, self.head_dim

    @property
    def padded_vocab(self) -> int:
        """V as stored: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layers_of(self, part: str) -> tuple[int, ...]:
        """The layers that have a part of `nn.block.Block`: its parameters are stacked over these, in order."""
        return tuple(layer for layer, kind in enumerate(self.pattern) if part not in kind.absent)

    @property
    def attention_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers with attention, each once, in order of their first layers."""
        kinds = (kind.mixing() for kind in self.pattern if kind.mixer != "delta")
        return tuple(dict.fromkeys(kinds))

    def with_plain_norms(self) -> "ModelConfig":
        """The same model with norms that multiply by the scale, after rounding to the compute dtype."""
        return replace(self, norm_offset=False, norm_in_float32=False)


@dataclass(frozen=True)
class RouterLoss:
    """Weights of the auxiliary losses of a mixture's routers: see `objectives.router`."""

    balance: float = 0.0
    z: float = 0.0


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linears that `targets` name (https://arxiv.org/abs/2106.09685)."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # see `names_linear`
    rslora: bool = False  # scale by alpha / sqrt(rank): https://arxiv.org/abs/2312.03732
    dtype: np.dtype = FLOAT32  # of the adapters and of the parameters that are trained in full
    full_paths: tuple[str, ...] = ()  # dotted paths of parameters that are trained in full beside the adapters

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, path: str) -> bool:
        """Whether the linear at `path` within a layer (`attn.q_proj`) has an adapter."""
        return any(names_linear(target, path) for target in self.targets)


@dataclass(frozen=True)
class NewTokens:
    """New tokens: their rows of embedding and head are separate parameters, trained while the tables are frozen."""

    first: int  # id of the first one
    count: int


def names_linear(target: str, path: str) -> bool:
    """Whether `target` names the linear at `path` within a layer: `all-linear`, a name (`q_proj`), or a glob over
    dotted names (`attn.*`, `layers.*.mlp.up_proj`). Layers are stacked, so an adapter is on all of them or on none."""
    parts = f"layers.*.{path}".split(".")
    return target == "all-linear" or any(fnmatchcase(".".join(parts[i:]), target) for i in range(len(parts)))
