"""The time of a program for GPUs is that of its kernels, by hand: products, slices, attention, collectives."""

import pytest

from jaxtrain.observe.flops import peak_flops
from jaxtrain.plan.hlo import Module
from jaxtrain.plan.prices import GPUS, UnpricedCallError
from jaxtrain.plan.reading import Network, Setting
from jaxtrain.plan.reading_gpu import read_gpu

KIND = "NVIDIA H100 80GB HBM3"
GPU, PEAK = GPUS[KIND], peak_flops(KIND)
SPEED = GPU.bandwidth * GPU.stream

TEXT = """HloModule jit_step

%product (a: bf16[4096,4096], b: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  ROOT %dot = bf16[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%slice (stack: f32[36,1000000], at: s32[]) -> f32[1,1000000] {
  %stack = f32[36,1000000]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,1000000]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,1000000}
}

%layers (c: s32[]) -> s32[] {
  %w = bf16[4096,4096]{1,0} parameter(0)
  %part = bf16[512,4096]{1,0} parameter(1)
  %gather-start = (bf16[512,4096], bf16[4096,4096]) all-gather-start(%part), replica_groups={{0,1,2,3,4,5,6,7}}
  %y = bf16[4096,4096]{1,0} fusion(%w, %w), kind=kCustom, calls=%product
  %gather-done = bf16[4096,4096]{1,0} all-gather-done(%gather-start)
  %stack = f32[36,1000000]{1,0} parameter(2)
  %s = f32[1,1000000]{1,0} fusion(%stack, %c), kind=kLoop, calls=%slice
}

%until (c: s32[]) -> pred[] {
  %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: s32[]) -> s32[] {
  %loop = s32[] while(%p), condition=%until, body=%layers, backend_config={"known_trip_count":{"n":"36"}}
  %q = bf16[2,8192,16,128]{3,2,1,0} parameter(1)
  %o = (bf16[2,8192,16,128], u8[0]) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", KIND
}
"""


def read(text):
    network = Network({"data": 1, "fsdp": 8}, GPU.link * GPU.collective)
    return read_gpu(Module(text), Setting(GPU, PEAK, network, lambda place: None))


def test_kernels_take_the_longer_of_flops_and_bytes_and_a_launch():
    reading = read(TEXT.replace("KIND", "mask=CAUSAL"))
    product = 2 * 4096**3 / PEAK / GPU.matmul + GPU.launch
    sliced = (2 * 4e6 + 4) / SPEED + GPU.launch  # one row of the stack, and its number
    assert sum(part.seconds for part in reading.fusions) == pytest.approx(36 * (product + sliced))
    ((attention, part),) = reading.kernels
    assert attention.flops == pytest.approx(2 * 2 * 2 * 16 * 128 * 8192**2 / 2)
    assert part.seconds == pytest.approx(attention.flops / PEAK / GPU.attention_forward + GPU.launch)


def test_a_collective_is_exposed_where_it_outlasts_what_it_runs_beside():
    reading = read(TEXT.replace("KIND", "mask=CAUSAL"))
    product = 2 * 4096**3 / PEAK / GPU.matmul + GPU.launch
    gather = 7 * 512 * 4096 * 2 / (GPU.link * GPU.collective) + GPU.latency
    assert gather < product
    assert reading.exposed_seconds == 0
    assert reading.hidden_seconds == pytest.approx(36 * gather)
    late = read(TEXT.replace("KIND", "mask=CAUSAL").replace("bf16[512,4096]", "bf16[8192,4096]"))
    long = 7 * 8192 * 4096 * 2 / (GPU.link * GPU.collective) + GPU.latency
    assert late.exposed_seconds == pytest.approx(36 * (long - product))
    assert late.exposed_seconds + late.hidden_seconds == pytest.approx(36 * long)
    assert {(each.kind, each.axes, each.devices) for each in late.collectives} == {("all-gather", "fsdp", 8)}


def test_a_call_without_a_price_and_a_loop_without_a_number_are_errors():
    with pytest.raises(UnpricedCallError, match="the custom call mine"):
        read(TEXT.replace("__cudnn$fmhaSoftmax", "mine"))
    with pytest.raises(ValueError, match="number of trips that plan does not know"):
        read(TEXT.replace("known_trip_count", "other"))
