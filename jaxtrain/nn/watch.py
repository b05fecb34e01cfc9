"""Inputs and outputs of the submodules of a decoder, observed without changes to the forward pass."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
from flax import nnx

from jaxtrain.nn.decoder import Decoder
from jaxtrain.types import Array

Side = Literal["in", "out"]
Observer = Callable[[str, Side, Array], None]
"""Called with the path of a submodule (`layers.3.attn.q_proj`) and its first input, or its first output."""


@contextmanager
def watched(decoder: Decoder, observer: Observer) -> Iterator[None]:
    """Call `observer` at every call of a submodule within the block, in the order in which values are computed.

    The `__call__` of the modules' classes is wrapped, because stacked layers are rebuilt at every call; the n-th call
    of a block is counted as layer n. Use it under `jax.disable_jit()`: a scan is then a loop over concrete values.
    """
    fixed = _paths(decoder, "")
    layer: dict[int, str] = {}  # paths in the running layer, by the id of its modules
    numbers = itertools.count()
    running: list[Any] = []

    def path_of(module: Any) -> str | None:
        if isinstance(module, type(decoder.layers)):
            # Each layer is a new object: ids of the previous one's modules may have been reused.
            layer.clear()
            layer.update(_paths(module, f"layers.{next(numbers)}"))
        return fixed.get(id(module), layer.get(id(module)))

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def observed(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = path_of(module)
            if path is None or any(module is other for other in running):  # a `__call__` that calls its base class's
                return call(module, *args, **kwargs)
            observer(path, "in", args[0])
            running.append(module)
            try:
                result = call(module, *args, **kwargs)
            finally:
                running.pop()
            observer(path, "out", jax.tree.leaves(result)[0])
            return result

        return observed

    classes = {base for _, module in nnx.iter_modules(decoder) for base in type(module).__mro__}
    calls = {each: vars(each)["__call__"] for each in classes if "__call__" in vars(each)}
    try:
        for each, call in calls.items():
            each.__call__ = wrap(call)
        yield
    finally:
        for each, call in calls.items():
            each.__call__ = call


def _paths(module: nnx.Module, prefix: str) -> dict[int, str]:
    return {id(each): ".".join(map(str, filter(None, (prefix, *path)))) for path, each in nnx.iter_modules(module)}
