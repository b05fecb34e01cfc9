"""Latent attention: its tensors and keys of config.json, as DeepSeek-V3 has them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import HEADS_IN, MATRIX
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from converters.weight_rows import PairsToHalves, SideBySide, Split, Transpose, Weight
from jaxtrain.nn.config import Latent, ModelConfig, Rope, YarnScaling

_ATTENTION = "model.layers.{layer}.self_attn"
_EPSILON = 1e-6  # of the norms of latent vectors, whatever rms_norm_eps is


def latent_sizes(config: ModelConfig) -> Latent:
    assert config.latent is not None
    return config.latent


def _turned(axis: int, after_plain: bool) -> Callable[[ModelConfig], PairsToHalves]:
    """Reorders the channels with rope on `axis`, which may come after those without."""

    def op(config: ModelConfig) -> PairsToHalves:
        sizes = latent_sizes(config)
        return PairsToHalves(axis, sizes.rope_width if sizes.neighbours else 0, sizes.plain_width if after_plain else 0)

    return op


def _down(place: int) -> SideBySide:
    return SideBySide(0, place, lambda config: (latent_sizes(config).rank, latent_sizes(config).rope_width))


def _up(place: int) -> SideBySide:
    return SideBySide(
        0,
        place,
        lambda config: (latent_sizes(config).plain_width, latent_sizes(config).value_width),
        lambda config: config.num_heads,
    )


_QUERIES = (Split(0), _turned(1, after_plain=True), Transpose((2, 0, 1)))
_OUT = (Split(0), Transpose((2, 0, 1)))
LATENT_ATTENTION = (
    Weight("layers.attn.q_proj.kernel", f"{_ATTENTION}.q_proj.weight", _QUERIES),
    Weight("layers.attn.q_down.kernel", f"{_ATTENTION}.q_a_proj.weight", MATRIX),
    Weight("layers.attn.q_down.bias", f"{_ATTENTION}.q_a_proj.bias"),
    Weight("layers.attn.q_norm.scale", f"{_ATTENTION}.q_a_layernorm.weight"),
    Weight("layers.attn.q_up.kernel", f"{_ATTENTION}.q_b_proj.weight", _QUERIES),
    Weight("layers.attn.kv_down.kernel", f"{_ATTENTION}.kv_a_proj_with_mqa.weight", MATRIX, part=_down(0)),
    Weight("layers.attn.kv_down.bias", f"{_ATTENTION}.kv_a_proj_with_mqa.bias", part=_down(0)),
    Weight(
        "layers.attn.k_rope.kernel",
        f"{_ATTENTION}.kv_a_proj_with_mqa.weight",
        (_turned(0, after_plain=False), *MATRIX),
        part=_down(1),
    ),
    Weight(
        "layers.attn.k_rope.bias",
        f"{_ATTENTION}.kv_a_proj_with_mqa.bias",
        (_turned(0, after_plain=False),),
        part=_down(1),
    ),
    Weight("layers.attn.kv_norm.scale", f"{_ATTENTION}.kv_a_layernorm.weight"),
    Weight("layers.attn.k_up.kernel", f"{_ATTENTION}.kv_b_proj.weight", _OUT, part=_up(0)),
    Weight("layers.attn.v_up.kernel", f"{_ATTENTION}.kv_b_proj.weight", _OUT, part=_up(1)),
    Weight("layers.attn.o_proj.kernel", f"{_ATTENTION}.o_proj.weight", HEADS_IN),
    Weight("layers.attn.o_proj.bias", f"{_ATTENTION}.o_proj.bias"),
)


def read_latent(keys: ConfigKeys) -> dict[str, Any]:
    """The fields of ModelConfig that describe latent attention, in the place of those that `read_sizes` returns."""
    heads, rope_width = keys.size("num_attention_heads"), keys.size("qk_rope_head_dim")
    for key, expected in (("num_key_value_heads", heads), ("head_dim", rope_width)):
        if keys.get(key) not in (None, expected):
            raise ConversionError(
                f"config.json: {key}={keys.get(key)!r} is not supported by this family; {expected} is"
            )
    sizes = Latent(
        query_rank=None if keys.get("q_lora_rank") is None else keys.size("q_lora_rank"),
        rank=keys.size("kv_lora_rank"),
        plain_width=keys.size("qk_nope_head_dim"),
        rope_width=rope_width,
        value_width=keys.size("v_head_dim"),
        norm_eps=_EPSILON,
        neighbours=keys.flag("rope_interleave"),
    )
    return {
        "latent": sizes,
        "num_kv_heads": heads,
        "head_dim": sizes.plain_width + rope_width,
        "qkv_bias": keys.flag("attention_bias"),
        "o_bias": keys.flag("attention_bias"),
    }


def read_latent_rope(keys: ConfigKeys) -> Rope:
    """The rope, with the factor of the scores that `mscale_all_dim` determines."""
    rope = read_rope(keys)
    if not isinstance(rope.scaling, YarnScaling):
        return rope
    section = {**keys.section("rope_parameters"), **keys.section("rope_scaling")}
    mscale = ConfigKeys({"mscale_all_dim": section.get("mscale_all_dim") or 0.0}, {})
    return replace(
        rope,
        scaling=replace(
            rope.scaling, score_mscale=mscale.number("mscale_all_dim") if mscale.get("mscale_all_dim") else 0.0
        ),
    )


def write_latent(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_latent`."""
    sizes = latent_sizes(config)
    return {
        "num_key_value_heads": config.num_heads,
        "head_dim": sizes.rope_width,
        "q_lora_rank": sizes.query_rank,
        "kv_lora_rank": sizes.rank,
        "qk_nope_head_dim": sizes.plain_width,
        "qk_rope_head_dim": sizes.rope_width,
        "v_head_dim": sizes.value_width,
        "rope_interleave": sizes.neighbours,
        "attention_bias": config.qkv_bias,
    }
