"""Bugs that change logits are located with their cause: a list of them, each in a model that shows it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import MODELS, TOKENS, WINDOW, code, config, ids, kinds, moe, params, reverse, rope, scaled, swap

import jaxtrain.nn.attention as attention
from jaxtrain.nn.config import Rope
from jaxtrain.nn.rope import RopeTable
from jaxtrain.verify.checks import LOGIT_TOLERANCE, names_check
from jaxtrain.verify.locate import locate
from jaxtrain.verify.packed import packed_check
from jaxtrain.verify.probes import norm_check, rope_check


def reversed_rows_of_layers(subject, patch):
    """A table of rows that numbers the layers from the end."""
    last = subject.config.num_layers - 1
    tensors = [
        dataclasses.replace(t, stack=(last - t.stack[0], *t.stack[1:])) if t.stack else t for t in subject.tensors
    ]
    layers = jax.tree.map(lambda leaf: leaf[::-1], subject.params["layers"])
    return dataclasses.replace(subject, tensors=tensors, params={**subject.params, "layers": layers})


def other_kv_heads(attend):
    def attend_every_kth(q, k, v, *args, **options):
        heads, kv_heads = q.shape[2], k.shape[2]
        order = np.arange(heads).reshape(-1, kv_heads).T.reshape(-1)  # neighbours now share what every K-th shared
        return attend(q[:, :, order], k, v, *args, **options)[:, :, np.argsort(order)]

    return attend_every_kth


def neighbours(apply_rope):
    def rotate(x, table):
        pairs = jnp.concatenate([x[..., ::2], x[..., 1::2]], -1)
        turned = apply_rope(pairs, table)
        return jnp.stack(jnp.split(turned, 2, -1), -1).reshape(x.shape)

    return rotate


def backwards(apply_rope):
    return lambda x, table: apply_rope(x, RopeTable(table.cos, -table.sin))


# bug: (model, how it is planted, the module of ours, words of the cause)
LOCATED = {
    "rope base": ("qwen3", rope(lambda r: Rope(r.theta * 1.5, r.scaling)), "layers.0.attn", "rope .base"),
    "rope without its scaling": ("qwen3", rope(lambda r: Rope(r.theta)), "layers.0.attn", "rope .base"),
    "rope on neighbours": ("qwen3", code(attention, "apply_rope", neighbours), "layers.0.attn", "neighbouring"),
    "rope backwards": ("qwen3", code(attention, "apply_rope", backwards), "layers.0.attn", "other direction"),
    "no rope": ("granite", kinds(lambda kind, layer: {"rope": None}), "layers.0.attn", "ours with the settings"),
    "yarn's factor": (
        "gpt-oss",
        rope(lambda r: Rope(r.theta, dataclasses.replace(r.scaling, attention_factor=1.0))),
        "layers.0.attn",
        "rope .base",
    ),
    "window off by one": (
        "qwen3",
        kinds(lambda kind, layer: {"window": kind.window and kind.window - 1}),
        "layers.1.attn",
        f"window: the last of {TOKENS} tokens attends to {WINDOW}, ours to {WINDOW - 1}",
    ),
    "no window": ("qwen3", kinds(lambda kind, layer: {"window": None}), "layers.1.attn", "window"),
    "window on another layer": (
        "qwen3",
        config(pattern=lambda pattern: pattern[::-1]),
        "layers.0.attn",
        f"window: .* {TOKENS}, ours to {WINDOW}",
    ),
    "attention scale": ("granite", config(attention_scale=None), "layers.0.attn", "ours with the settings|scale"),
    "attention softcap": ("gemma2", config(attention_softcap=None), "layers.0.attn", "scale|softcap"),
    "sinks ignored": (
        "gpt-oss",
        code(attention, "attend", lambda attend: lambda *a, sinks, **o: attend(*a, sinks=None, **o)),
        "layers.0.attn",
        "ours with no sinks",
    ),
    "kv heads by code": (
        "qwen3",
        code(attention, "attend", other_kv_heads),
        "layers.0.attn",
        "ours with key/value heads",
    ),
    "kv heads by weights": (
        "qwen3",
        reverse(2, "layers", "attn", "k_proj", "kernel"),
        "layers.0.attn.k_proj",
        "heads in",
    ),
    "query heads by weights": (
        "qwen3",
        reverse(2, "layers", "attn", "q_proj", "kernel"),
        "layers.0.attn.q_proj",
        "heads in",
    ),
    "norms of q and k swapped": (
        "qwen3",
        params(lambda p: swap(p["layers"]["attn"], "q_norm", "k_norm")),
        "layers.0.attn.q_norm",
        "the values of model.layers.0.self_attn.k_norm.weight",
    ),
    "layers swapped by weights": (
        "qwen3",
        params(lambda p: p.update(layers=jax.tree.map(lambda leaf: leaf[::-1].copy(), p["layers"]))),
        "layers.0.input_norm",
        "the values of model.layers.1.input_layernorm.weight",
    ),
    "layers swapped by rows": ("granite", reversed_rows_of_layers, "layers.0", "order of the layers"),
    "values of v changed": (
        "qwen3",
        scaled(1.1, "layers", "attn", "v_proj", "kernel", at=1),
        "layers.1.attn.v_proj",
        "values of model.layers.1.self_attn.v_proj.weight were changed",
    ),
    "channels of down": (
        "qwen3",
        reverse(-1, "layers", "mlp", "down_proj", "kernel"),
        "layers.0.mlp.down_proj",
        "channels",
    ),
    "gate and up swapped": (
        "qwen3",
        params(lambda p: swap(p["layers"]["mlp"], "gate_proj", "up_proj")),
        "layers.0.mlp.gate_proj",
        "the values of model.layers.0.mlp.up_proj.weight",
    ),
    "activation": ("qwen3", config(activation="gelu_tanh"), "layers.0.mlp", "with the activation silu, ours"),
    "embedding scale": ("gemma2", config(embedding_scale=1.0), "embed", "scale on the embeddings"),
    "residual scale": ("granite", config(residual_scale=1.0), "layers.0", "a factor"),
    "logit scale": ("granite", config(logit_scale=1.0), "lm_head", "factor on the logits"),
    "logit softcap": ("gemma2", config(logit_softcap=None), "lm_head", "softcap"),
    "norms with an offset": ("gemma2", config(norm_offset=False), "layers.0.input_norm", "offset"),
    "final norm": ("qwen3", scaled(1.2, "norm", "scale"), "norm", "were changed"),
    "expert order": (
        "qwen3-moe",
        params(
            lambda p: p["layers"]["mlp"].update(
                experts=jax.tree.map(lambda x: x[:, ::-1].copy(), p["layers"]["mlp"]["experts"])
            )
        ),
        "layers.0.mlp",
        "the order of the experts",
    ),
    "renormalisation": ("qwen3-moe", moe(renormalise=True), "layers.0.mlp", "renormalisation.* to 1 in ours"),
    "experts of a token": ("qwen3-moe", moe(experts_per_token=2), "layers.0.mlp", "3 in transformers, 2 in ours"),
    "experts' gate and up": (
        "qwen3-moe",
        params(lambda p: swap(p["layers"]["mlp"]["experts"], "gate_proj", "up_proj")),
        "layers.0.mlp",
        "transformers computes the experts with .*gate and up swapped",
    ),
    "no clamp": (
        "gpt-oss",
        config(moe=lambda m: dataclasses.replace(m, swiglu=dataclasses.replace(m.swiglu, limit=1e9))),
        "layers.0.mlp",
        "the clamp .* ours with the clamp of the config",
    ),
    "router's bias": (
        "gpt-oss",
        scaled(0.0, "layers", "mlp", "router", "bias"),
        "layers.0.mlp",
        "router|choice|weights",
    ),
}


@pytest.mark.parametrize("bug", LOCATED)
def test_is_located_with_its_cause(bug, loaded, monkeypatch):
    model, plant, where, cause = LOCATED[bug]
    subject, reference = loaded(model)
    place = locate(plant(subject, monkeypatch), reference, ids(subject), "float32")[1]
    assert place is not None and place.where.startswith(where), place
    assert re.search(cause, place.suspects), place


@pytest.mark.parametrize("model", MODELS)
def test_no_bug_is_found_where_none_is(model, loaded):
    subject, reference = loaded(model)
    assert locate(subject, reference, ids(subject), "float32")[1] is None
    checks = [norm_check(subject, reference, "float32"), rope_check(subject, reference, TOKENS)]
    checks += [packed_check(subject, reference, ids(subject)[0], "float32", LOGIT_TOLERANCE)]
    checks += [names_check(subject, reference)]
    assert all(check.passed for check in checks), checks
