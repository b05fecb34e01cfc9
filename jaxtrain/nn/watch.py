"""What the sub-modules of a decoder are given and give, seen from outside: the forward maths knows nothing of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
from flax import nnx

from jaxtrain.nn.decoder import Decoder
from jaxtrain.types import Array

Side = Literal["in", "out"]
See = Callable[[str, Side, Array], None]
"""Called with a sub-module's path (`layers.3.attn.q_proj`), and the first array it was given, or gave."""


@contextmanager
def watched(decoder: Decoder, see: See) -> Iterator[None]:
    """Tell `see` of every call of a sub-module within the block, in the order in which values come to be.

    Calls are seen at the modules' classes, since stacked layers are put together anew for every call; the n-th call of
    a block is taken for layer n. Meant for `jax.disable_jit()`: then a scan is a loop, and every value a real one.
    """
    fixed = _paths(decoder, "")
    layer: dict[int, str] = {}  # of the layer that runs, by the identity of its modules
    numbers = itertools.count()
    running: list[Any] = []

    def path_of(module: Any) -> str | None:
        if isinstance(module, type(decoder.layers)):
            # A new one every time: the identities of the last one's modules may be in use again.
            layer.clear()
            layer.update(_paths(module, f"layers.{next(numbers)}"))
        return fixed.get(id(module), layer.get(id(module)))

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = path_of(module)
            if path is None or any(module is other for other in running):  # a class that calls its parent's
                return call(module, *args, **kwargs)
            see(path, "in", args[0])
            running.append(module)
            try:
                result = call(module, *args, **kwargs)
            finally:
                running.pop()
            see(path, "out", jax.tree.leaves(result)[0])
            return result

        return watching

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
