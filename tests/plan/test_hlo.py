"""Compiled text is read: computations, shapes, operands and source lines."""

import jax
import jax.numpy as jnp

from jaxtrain.plan.hlo import Module, array_sizes, shape_bytes

TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/jaxtrain/nn/mlp.py"
2 "/usr/lib/jax/scan.py"
3 "/home/user/jaxtrain/nn/decoder.py"

FunctionNames
1 "GatedMLP.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=3}
2 {file_name_id=2 function_name_id=1 line=99}
3 {file_name_id=3 function_name_id=1 line=34}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p0: bf16[8,128]) -> (f32[8], s32[]) {
  %p0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %pair = (f32[8]{0}, s32[]) custom-call(%p0, %p1), custom_call_target="x", metadata={op_name="dot" stack_frame_id=3}
  ROOT %fusion.1 = f32[8]{0} fusion(%p0, %pair), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"500"}
}
"""


def test_the_parts_of_an_instruction():
    module = Module(TEXT)
    assert module.entry == "main"
    _, pair, fusion = module.computations["main"]
    assert (pair.opcode, pair.shape, pair.target) == ("custom-call", "(f32[8]{0}, s32[])", "x")
    assert pair.operands == ["p0", "p1"]
    assert (fusion.cycles, fusion.called("calls"), fusion.operands) == (500, "fused", ["p0", "pair"])
    assert module.constants("condition") == [36]


def test_source_lines_are_ours_innermost_first():
    module = Module(TEXT)
    pair = module.computations["main"][1]
    assert module.where(pair) == "nn/mlp.py:12 < nn/decoder.py:34"
    assert module.function(pair) == "__call__"


def test_bytes_and_sizes_of_a_shape():
    assert shape_bytes("(f32[8]{0}, bf16[2,3]{1,0:T(8,128)(2,1)}, pred[])") == 32 + 12 + 1
    assert array_sizes("(f32[8]{0}, bf16[2,3]{1,0})") == [(8,), (2, 3)]


def test_what_this_compiler_writes_is_read():
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ x), x)).lower(jnp.ones((64, 64)))
    module = Module(compiled.compile().as_text())
    loops = [each for lines in module.computations.values() for each in lines if each.opcode == "while"]
    (loop,) = loops
    condition = loop.called("condition")
    assert condition in module.computations
    assert array_sizes(module.shape(module.entry, loop.operands[0]))[1] == (64, 64)
