"""Bugs planted in tiny models, for tests of the verifier: functions `plant(subject, monkeypatch) -> subject`."""

from __future__ import annotations

import dataclasses
import functools

import hf_folders
import jax
import numpy as np
import pytest

from converters.reference import Reference
from jaxtrain.verify import load_subject

TOKENS, WINDOW = 24, 9
SMALL = {"num_hidden_layers": 2, "intermediate_size": 24}
MODELS = {
    "qwen3": (
        "qwen3",
        {
            "rms_norm_eps": 1e-6,
            "rope_parameters": {**hf_folders.LLAMA3, "original_max_position_embeddings": 16},
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma2": ("gemma2", {"sliding_window": WINDOW}),
    "granite": ("granite", {}),
    "gpt-oss": ("gpt-oss", {"sliding_window": WINDOW}),
    "qwen3-moe": ("qwen3-moe", {"moe_intermediate_size": 16}),
    "phi3": ("phi3-longrope-tied", {"original_max_position_embeddings": 16}),
}


def load(folder, model):
    """The imported model of MODELS and that of transformers, written to `folder`."""
    case, changes = MODELS[model]
    hf_folders.save(folder, case, **{**SMALL, **changes})
    return load_subject(folder), Reference(folder, "float32")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(model)`: the result of `load`, made once for each of MODELS."""
    return functools.cache(lambda model: load(tmp_path_factory.mktemp(model), model))


def ids(subject):
    return np.random.default_rng(1).integers(0, subject.config.vocab_size, (1, TOKENS)).astype(np.int32)


def config(**changes):
    """A change of fields of the config; a function changes the value that a field has."""

    def plant(subject, patch):
        new = {
            name: value(getattr(subject.config, name)) if callable(value) else value for name, value in changes.items()
        }
        return dataclasses.replace(subject, config=dataclasses.replace(subject.config, **new))

    return plant


def kinds(change):
    """A change of the kind of every layer, given its number."""
    return config(
        pattern=lambda pattern: tuple(dataclasses.replace(kind, **change(kind, i)) for i, kind in enumerate(pattern))
    )


def rope(change):
    return kinds(lambda kind, layer: {"rope": kind.rope and change(kind.rope)})


def moe(**changes):
    return config(moe=lambda each: dataclasses.replace(each, **changes))


def params(change):
    """A change of a copy of the parameters, in place."""

    def plant(subject, patch):
        copied = jax.tree.map(np.array, subject.params)
        change(copied)
        return dataclasses.replace(subject, params=copied)

    return plant


def code(owner, name, wrap):
    """Another implementation: `wrap(old)`."""

    def plant(subject, patch):
        patch.setattr(owner, name, wrap(getattr(owner, name)))
        return subject

    return plant


def swap(tree, one, other):
    tree[one], tree[other] = tree[other], tree[one]


def reverse(axis, *path):
    def change(tree):
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = np.flip(tree[path[-1]], axis).copy()

    return params(change)


def scaled(factor, *path, at=...):
    def change(tree):
        for key in path:
            tree = tree[key]
        tree[at] *= factor

    return params(change)
