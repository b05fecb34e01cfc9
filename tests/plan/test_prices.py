"""Kernels are priced by their FLOPs, by hand."""

import pytest

from jaxtrain.plan.hlo import Module
from jaxtrain.plan.prices import CHIPS, GROUPED_MATMUL, UnpricedCallError, call_price

CHIP, PEAK = CHIPS["TPU v5"], 459e12
ROWS, HEADS, KV_HEADS, TOKENS, WIDTH = 2, 32, 8, 8192, 128
PARTS = 4  # of a row, over devices: keys of all of it
ROW = f"bf16[{ROWS},{KV_HEADS},{PARTS * TOKENS},{WIDTH}]{{3,2,1,0}}"
QUERIES, KEYS = (f"bf16[{ROWS},{heads},{TOKENS},{WIDTH}]{{3,2,1,0}}" for heads in (HEADS, KV_HEADS))


def price(line: str, grouped_rows: int | None = None):
    text = f"""ENTRY %main (p: s32[]) -> s32[] {{
  %q = {QUERIES} parameter(0)
  %k = {KEYS} parameter(1)
  %row = {ROW} parameter(5)
  %blocks = s8[1,128,128]{{2,1,0}} parameter(6)
  %x = bf16[4096,512]{{1,0}} parameter(2)
  %w = bf16[16,512,768]{{2,1,0}} parameter(3)
  %y = bf16[4096,768]{{1,0}} parameter(4)
  %square = bf16[16,512,512]{{2,1,0}} parameter(5)
  %few = bf16[32,512]{{1,0}} parameter(6)
  {line}, custom_call_target="tpu_custom_call"
}}
"""
    module = Module(text)
    return call_price(module.computations["main"][-1], module, "main", CHIP, PEAK, grouped_rows)


@pytest.mark.parametrize(
    ("line", "products"),
    [
        (f"%splash_mha_fwd.1 = ({QUERIES}, f32[2,32,8192]{{2,1,0}}) custom-call(%q, %k, %k)", 2),
        (f"%splash_mha_dq.1 = {QUERIES} custom-call(%q, %k, %k, %q)", 3),
        (f"%splash_mha_dkv.1 = ({KEYS}, {KEYS}) custom-call(%q, %k, %k, %q)", 4),
        (f"%splash_mha_dkv.1 = ({QUERIES}, {KEYS}, {KEYS}) custom-call(%q, %k, %k, %q)", 5),  # dq too
    ],
)
def test_splash_attention_costs_its_causal_products(line, products):
    found = price("%name = " + line.split(" = ", 1)[1] + f', metadata={{op_name="{line.split(".")[0]}"}}')
    flops = products * 2 * ROWS * HEADS * TOKENS * TOKENS * WIDTH / 2
    assert found.flops == pytest.approx(flops)
    assert found.seconds == pytest.approx(flops / PEAK / 0.6)


def test_a_part_of_a_row_attends_to_half_of_the_keys_of_the_row():
    whole, part = (
        price(f'%n = {QUERIES} custom-call(%blocks, %q, {keys}, {keys}), metadata={{op_name="splash_mha_fwd"}}')
        for keys in ("%k", "%row")
    )
    assert part.flops == PARTS * whole.flops


@pytest.mark.parametrize(
    "line",
    ["%gmm.1 = bf16[4096,768]{1,0} custom-call(%x, %w)", "%tgmm.1 = bf16[16,512,768]{2,1,0} custom-call(%x, %y)"],
)
def test_a_grouped_matmul_multiplies_every_row_once(line):
    found = price("%n = " + line.split(" = ", 1)[1] + f', metadata={{op_name="{line.split(".")[0]}"}}')
    assert found.flops == 2 * 4096 * 512 * 768
    assert found.seconds == pytest.approx(found.flops / PEAK / GROUPED_MATMUL)


def test_a_grouped_matmul_by_square_matrices():
    assert price("%gmm.1 = bf16[4096,512]{1,0} custom-call(%x, %square)").flops == 2 * 4096 * 512 * 512


def test_rows_of_no_group_cost_nothing():
    line = "%gmm.1 = bf16[4096,768]{1,0} custom-call(%x, %w)"
    assert price(line, 3000).flops == price(line).flops * 3000 / 4096
    assert price(line, 5000) == price(line)


def test_a_grouped_matmul_of_few_rows_takes_as_long_as_its_matrices_to_read():
    found = price("%gmm.1 = bf16[32,768]{1,0} custom-call(%few, %w)")
    moved = 2 * (16 * 512 * 768 + 32 * 512 + 32 * 768)
    assert found.seconds == pytest.approx(moved / CHIP.bandwidth)
    assert found.seconds > found.flops / PEAK / GROUPED_MATMUL


def test_an_unknown_kernel_has_no_price():
    with pytest.raises(UnpricedCallError, match="no price"):
        price("%mystery = bf16[4096,768]{1,0} custom-call(%x)")
