"""The time of a program is the sum of its parts, by hand: fusions in loops, kernels, collectives."""

import math

import pytest

from jaxtrain.observe.flops import peak_flops
from jaxtrain.plan.hlo import Module
from jaxtrain.plan.prices import CHIPS, DCN, UnpricedCallError
from jaxtrain.plan.reading import Network, Setting, read_tpu, replica_group

KIND = "TPU v5"
CHIP = CHIPS[KIND]
AXES = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2}
HEAD = 'metadata={op_name="head" stack_frame_id=1}'

TEXT = """HloModule jit_step

FileNames
1 "/home/user/jaxtrain/ops/token_scores.py"

FunctionNames
1 "walk"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12}

StackFrames
1 {file_location_id=1}

%gathered (p: f32[4]) -> f32[16] {
  %gather = f32[16]{0} all-gather(%p), channel_id=5, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%layers (c: s32[]) -> s32[] {
  %a = f32[8]{0} fusion(%c), calls=%x, backend_config={"estimated_cycles":"1000"}
  %sum = f32[1000]{0} all-reduce(%c), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  %part = f32[8]{0} fusion(%c), calls=%gathered, backend_config={"estimated_cycles":"10"}
}

%count (c: s32[]) -> pred[] {
  %n = s32[] constant(36)
}

%chunks (c: s32[]) -> s32[] {
  %b = f32[8]{0} fusion(%c), calls=%y, backend_config={"estimated_cycles":"500"}
}

%until (c: s32[]) -> pred[] {
  %less = pred[] compare(%i, %n), direction=LT
}

%rare (c: s32[]) -> s32[] {
  %no = f32[8]{0} fusion(%c), calls=%z, backend_config={"estimated_cycles":"77"}
}

%often (c: s32[]) -> s32[] {
  %yes = f32[8]{0} fusion(%c), calls=%z, backend_config={"estimated_cycles":"7"}
}

ENTRY %main (p: s32[]) -> s32[] {
  %loop = s32[] while(%p), condition=%count, body=%layers
  %head = s32[] while(%p), condition=%until, body=%chunks, metadata={op_name="head" stack_frame_id=1}
  %if = s32[] conditional(%p, %a, %b), branch_computations={%rare, %often}
"""


def setting(trips=lambda place: 16 if "ops/token_scores.py" in place else None, never=frozenset(), grouped_rows=None):
    return Setting(CHIP, peak_flops(KIND), Network(AXES, 3 * CHIP.link), trips, never, grouped_rows)


def test_cycles_count_by_the_trips_of_their_loops():
    reading = read_tpu(Module(TEXT + "}\n"), setting())
    cycles = 36 * 1010 + 16 * 500 + 7
    assert reading.compute_seconds == pytest.approx(cycles / CHIP.clock)
    assert reading.dearest(1)[0].seconds == pytest.approx(36 * 1000 / CHIP.clock)


def test_collectives_by_axis_exposed_and_hidden():
    reading = read_tpu(Module(TEXT + "}\n"), setting())
    exposed, hidden = (next(c for c in reading.collectives if c.hidden is each) for each in (False, True))
    assert (exposed.kind, exposed.axes, exposed.devices, exposed.bytes) == ("all-reduce", "tensor", 2, 36 * 4000)
    share = math.log(2) / math.log(8)
    assert exposed.seconds == pytest.approx(36 * 2 * 4000 / 2 / (3 * CHIP.link * share))
    assert (hidden.kind, hidden.axes, hidden.devices, hidden.bytes) == ("all-gather", "fsdp", 4, 36 * 64)
    assert reading.seconds == pytest.approx(reading.compute_seconds + exposed.seconds)


def test_a_conditional_that_is_never_true_takes_its_first_branch():
    text = TEXT.replace("branch_computations={%rare, %often}", "branch_computations={%rare, %often}, " + HEAD) + "}\n"
    often, rare = (read_tpu(Module(text), setting(never=never)) for never in (frozenset(), frozenset({"walk"})))
    assert rare.compute_seconds - often.compute_seconds == pytest.approx(70 / CHIP.clock)


def test_a_loop_of_unknown_length_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"the loop at ops/token_scores.py:12 has a number of trips"):
        read_tpu(Module(TEXT + "}\n"), setting(lambda place: None))


def test_experts_exchange_rows_in_one_round():
    text = TEXT.replace("ops/token_scores.py", "nn/moe.py") + "}\n"
    reading = read_tpu(Module(text), setting())
    assert reading.compute_seconds == pytest.approx((36 * 1010 + 500 + 7) / CHIP.clock)


def test_an_exchange_sends_the_rows_that_a_device_has():
    line = "  %r = bf16[6,8,64]{2,1,0} ragged-all-to-all(%p), replica_groups={{0,2,4,6},{1,3,5,7}}\n}\n"
    seconds = [
        sum(each.seconds for each in read_tpu(Module(TEXT + line), setting(grouped_rows=rows)).collectives)
        - sum(each.seconds for each in read_tpu(Module(TEXT + "}\n"), setting()).collectives)
        for rows in (None, 32, 100)
    ]
    assert seconds[0] > 0
    assert seconds == pytest.approx([seconds[0], seconds[0] * 32 / 48, seconds[0]])


def test_what_leaves_a_slice_takes_the_network():
    recv = (
        "  %recv.1 = (bf16[96,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after), channel_id=7, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n}\n'
    )
    two_slices = setting()._replace(network=Network(AXES, 3 * CHIP.link, 2))
    before, after = (read_tpu(Module(TEXT + more), two_slices) for more in ("}\n", recv))
    found = after.collectives[-1]
    size = 96 * 8 * 128 * 2
    assert (found.kind, found.axes, found.bytes, found.hidden) == ("all-reduce", "data", size, False)
    assert after.seconds - before.seconds == pytest.approx(size / DCN)


ROWS = """%gathered_rows (p: f32[4]) -> bf16[100,64] {
  %rows = bf16[100,64]{1,0} gather(%table, %ids)
}

%scattered (p: f32[4]) -> f32[5000,64] {
  %updates = f32[10,64]{1,0} parameter(2)
  %sums = f32[5000,64]{1,0} scatter(%table, %ids, %updates), to_apply=%add
}

"""


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("bf16[100,64]{1,0} fusion(%p), calls=%gathered_rows", 2 * 12800),
        ("f32[5000,64]{1,0} fusion(%p), calls=%scattered", 3 * 2560),
    ],
)
def test_gathers_and_scatters_of_rows_without_an_estimate_cost_their_bytes(line, size):
    text = TEXT.replace("%layers (c", ROWS + "%layers (c")
    before, after = (read_tpu(Module(text + more), setting()) for more in ("}\n", f"  %rows.1 = {line}\n}}\n"))
    assert after.compute_seconds - before.compute_seconds == pytest.approx(size / CHIP.bandwidth, rel=1e-6)


@pytest.mark.parametrize("target", ["tpu_custom_call", "NewThing"])
def test_a_custom_call_without_a_price_raises_and_is_named(target):
    call = f'  %new.1 = f32[8]{{0}} custom-call(%p), custom_call_target="{target}", {HEAD}\n}}\n'
    with pytest.raises(UnpricedCallError, match=rf"{target}.*ops/token_scores.py:12.*plan/prices.py"):
        read_tpu(Module(TEXT + call), setting())


def test_a_call_with_the_compilers_estimate_needs_no_price():
    call = '  %k = f32[8]{0} custom-call(%p), custom_call_target="TopK", backend_config={"estimated_cycles":"93"}\n}\n'
    before, after = read_tpu(Module(TEXT + "}\n"), setting()), read_tpu(Module(TEXT + call), setting())
    assert after.compute_seconds - before.compute_seconds == pytest.approx(93 / CHIP.clock)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", (4, "fsdp")),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (4, "fsdp")),
        ("replica_groups=[4,2]<=[8]", (2, "tensor")),
        ("replica_groups=[1,8]<=[8]", (8, "fsdp+tensor")),
        ("replica_groups={}", (8, "fsdp+tensor")),
        ("replica_groups=mesh['data'=1,'fsdp'=4,'expert'=1,'tensor'=2] {'tensor'}", (2, "tensor")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}", (4, "fsdp")),
        ("source_target_pairs={{0,1},{1,0}}", (2, "tensor")),
    ],
)
def test_groups_name_their_axes(text, found):
    assert replica_group(text, AXES) == found
