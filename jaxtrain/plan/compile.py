"""Compiles a program, or finds it in the cache: its HLO, the memory it needs, and how long it took."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from jaxtrain.remote import cache_home

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
_TOO_LARGE = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


@dataclass(frozen=True)
class Compiled:
    """A compiled program. Bytes are those of one device."""

    text: str  # HLO; empty where the compiler refused the program
    seconds: float  # of compilation
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    aliased: int = 0  # outputs that are in the memory of arguments
    code: int = 0
    peak: int = 0  # of arguments and temporaries; 0 where the compiler does not say
    refused: int = 0  # the memory that a program needs which the compiler refused for it

    @property
    def memory(self) -> int:
        """The most that it needs at a time."""
        needed = self.arguments + self.temporaries + self.outputs - self.aliased
        return self.refused or (self.peak or needed) + self.code


def compile_program(lowered: jax.stages.Lowered, target: str, options: Mapping[str, str]) -> Compiled:
    """Compile, unless it was compiled before: the cache is by the hash of the program, `target`, the `options` that the
    program was jitted with, flags, and the versions of jax and of the compiler.

    A program for which the memory of the device is too small is no error: `refused` is what it needs.
    """
    # The program with its source lines, which the HLO repeats.
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = [lowered.as_text(debug_info=True), target, repr(sorted(options.items())), *flags, *_versions()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    file = cache_home() / "plan" / f"{key}.json.gz"
    if file.is_file():
        return Compiled(**json.loads(gzip.decompress(file.read_bytes())))
    made = _compile(lowered, target.split()[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(gzip.compress(json.dumps(asdict(made)).encode(), 3))
    part.replace(file)
    return made


def save_program(compiled: Compiled, folder: Path, name: str, about: dict[str, object]) -> None:
    """Write `name`.hlo and `name`.json, whose fields beside the memory are `about`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.hlo").write_text(compiled.text)
    memory = {
        "compile_s": round(compiled.seconds, 1),
        "args": compiled.arguments,
        "temp": compiled.temporaries,
        "out": compiled.outputs,
        "alias": compiled.aliased,
        "code": compiled.code,
        "peak": compiled.peak or None,
    }
    (folder / f"{name}.json").write_text(json.dumps({**about, **memory}))


def _compile(lowered: jax.stages.Lowered, platform: str) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise
        return Compiled("", time.perf_counter() - start, refused=int(float(found[1]) * _UNITS[found[2]]))
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "the compiler gives no analysis of its program"
    return Compiled(
        text,
        seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        # XLA:CPU and XLA:GPU leave temporaries out of it.
        peak=0 if platform in ("cpu", "NVIDIA") else getattr(memory, "peak_memory_in_bytes", 0) or 0,
    )


def _versions() -> list[str]:
    found = []
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return found
