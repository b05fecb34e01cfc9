"""Attention, MLP and norm of the decoder, replaced by import path (`model.modules`).

A class that replaces a module takes the same arguments as the default and may derive from it:

attention   `jaxtrain.nn.attention.Attention(config, rngs=, dtype=, lora=)`, called as
            `(x, inputs, kinds, kind, cache, keys, impl, mesh) -> (out [B, T, D], cache)`
mlp         `jaxtrain.nn.mlp.GatedMLP(config, rngs=, dtype=, lora=)`, called as `(x [B, T, D], keys) -> [B, T, D]`; or a
            subclass of `jaxtrain.nn.moe.SparseMLP`, which has a router
norm        `jaxtrain.nn.norm.RMSNorm(config, shape, axes, dtype=)`, called as `(x [..., *shape]) -> [..., *shape]`

Every parameter is an `nnx.Param` with `out_sharding=`: a logical axis name (or None) for each of its axes. Modules are
created once under `vmap` for all layers, so the parameters of a layer have the same shapes in all of them.

`matches_default = True` on the class states that it computes the same function of the same parameters as the default,
for example with another kernel. Only then is the exported Hugging Face folder the trained model.
"""

from typing import Any, Literal, get_args

from flax import nnx

from jaxtrain.named import load_named
from jaxtrain.nn.config import ModelConfig

ModuleName = Literal["attention", "mlp", "norm"]


def module_class(config: ModelConfig, role: ModuleName, default: type[nnx.Module]) -> Any:
    """The class that `config.modules` names for `role`, or `default`.

    Raises ValueError, naming the key, if the path does not name a subclass of `flax.nnx.Module`.
    """
    path = getattr(config.modules, role)
    if path is None:
        return default
    found = load_named(path, f"model.modules.{role}")
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise ValueError(f"model.modules.{role}={path} must name a subclass of flax.nnx.Module, not {found!r}")
    return found


def check_exportable(config: ModelConfig) -> None:
    """Raise ValueError if a replaced module may compute another function of its weights than transformers does."""
    for role in get_args(ModuleName):
        path = getattr(config.modules, role)
        if path is not None and not getattr(load_named(path, f"model.modules.{role}"), "matches_default", False):
            raise ValueError(
                f"model.modules.{role}={path}: transformers has no such module, so an exported folder would be another "
                "model; where the class computes the same function of the same parameters as the default, set "
                "`matches_default = True` on it"
            )
