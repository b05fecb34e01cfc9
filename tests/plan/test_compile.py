"""A program is compiled once: the cache goes by the program, the target and the options."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.plan import compile as module
from jaxtrain.plan.compile import Compiled, compile_program, save_program


def lowered(scale: float):
    return jax.jit(lambda x: jnp.sin(x) * scale).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32))


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """The programs that were compiled, and not found in the cache."""
    seen = []
    compile = module._compile
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_compile", lambda *given: seen.append(given) or compile(*given))
    return seen


def test_the_same_program_is_compiled_once(compilations):
    first, second = (compile_program(lowered(2.0), "cpu cpu:1 1", {}) for _ in range(2))
    assert first == second
    assert first.arguments == first.outputs == 8 * 16 * 4
    assert "sine" in first.text
    assert len(compilations) == 1


def test_another_program_target_or_option_is_compiled_again(compilations):
    compile_program(lowered(2.0), "cpu cpu:1 1", {})
    compile_program(lowered(3.0), "cpu cpu:1 1", {})
    compile_program(lowered(2.0), "cpu cpu:2 1", {})
    compile_program(lowered(2.0), "cpu cpu:1 1", {"option": "1"})
    assert len(compilations) == 4


def test_a_program_that_is_too_large_says_what_it_needs():
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("Ran out of memory in memory space hbm. Used 111.50G of 95.74G hbm.")

    made = module._compile(Refused(), "TPU")
    assert made.memory == made.refused == int(111.5 * 2**30)


def test_other_errors_of_the_compiler_are_raised():
    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")

    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic failed"):
        module._compile(Broken(), "TPU")


def test_a_saved_program_is_its_text_and_what_is_known_of_it(tmp_path):
    save_program(Compiled("HloModule x", 2.34, arguments=5, peak=7), tmp_path / "out", "update", {"n": 8})
    assert (tmp_path / "out/update.hlo").read_text() == "HloModule x"
    about = json.loads((tmp_path / "out/update.json").read_text())
    assert about["args"] == 5
    assert about["peak"] == 7
    assert about["compile_s"] == 2.3
    assert about["n"] == 8
