"""GPTQ, AWQ and bitsandbytes: matrices packed by their published layouts are read as the numbers that were packed."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.errors import ConversionError
from converters.safetensors_io import open_checkpoint

MODULE = "model.layers.0.self_attn.q_proj"
INPUTS, OUTPUTS, GROUP = 48, 32, 16
GROUPS = INPUTS // GROUP
RNG = np.random.default_rng(0)
RECTANGLE = (slice(5, 27), slice(11, 40))


def written(folder, tensors, **section):
    save_file({f"{MODULE}.{name}": torch.as_tensor(value) for name, value in tensors.items()}, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return folder


FILE = "model.safetensors"


def read(folder):
    """The matrix, after a check that a rectangle of it is that of the whole."""
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.entries) == {f"{MODULE}.weight"}
        whole, part = (checkpoint.read(f"{MODULE}.weight", index) for index in (None, RECTANGLE))
    assert whole.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(part, whole[RECTANGLE])
    return whole


def packed(numbers, bits, order):
    """Numbers [..., W * count] to words [..., W], one by one."""
    words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] * bits // 32), np.uint32)
    for word in range(words.shape[-1]):
        for place, index in enumerate(order):
            words[..., word] |= numbers[..., word * len(order) + index].astype(np.uint32) << np.uint32(place * bits)
    return words.view(np.int32).copy()


def problem(bits, group):
    """Numbers [I, O], zeros and scales [G, O] in float16, and the weights [O, I] that they encode."""
    numbers = RNG.integers(0, 2**bits, (INPUTS, OUTPUTS))
    zeros = RNG.integers(1, 2**bits, (GROUPS, OUTPUTS))
    scales = RNG.uniform(0.01, 0.1, (GROUPS, OUTPUTS)).astype(np.float16)
    weights = (numbers - zeros[group]) * scales[group].astype(np.float32)
    return numbers, zeros, scales, weights.T.astype(np.float32).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq(bits, version, desc_act, tmp_path):
    group = np.arange(INPUTS) // GROUP
    group = RNG.permutation(group) if desc_act else group
    numbers, zeros, scales, expected = problem(bits, group)
    order = range(32 // bits)
    tensors = {
        "qweight": packed(numbers.T, bits, order).T.copy(),
        "qzeros": packed(zeros - (version == "gptq"), bits, order),
        "scales": scales,
        **({"g_idx": group.astype(np.int32)} if desc_act else {}),
    }
    section = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    np.testing.assert_array_equal(read(written(tmp_path, tensors, **section)), expected)


def test_zeros_of_gptq_are_less_one_as_words(tmp_path):
    """As GPTQModel writes a zero of 0: it borrows from the next number of its word."""
    numbers, zeros, scales, _ = problem(4, np.arange(INPUTS) // GROUP)
    zeros[0, 3] = 0
    words = packed(zeros, 4, range(8)).view(np.uint32) - np.uint32(0x11111111)
    tensors = {"qweight": packed(numbers.T, 4, range(8)).T.copy(), "qzeros": words.view(np.int32), "scales": scales}
    weights = read(written(tmp_path, tensors, quant_method="gptq", bits=4, group_size=GROUP)).astype(np.float32)
    expected = (numbers[:GROUP, :8] - zeros[0, :8]) * scales[0, :8].astype(np.float32)
    np.testing.assert_array_equal(weights.T[:GROUP, :8], expected.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_awq(tmp_path):
    numbers, zeros, scales, expected = problem(4, np.arange(INPUTS) // GROUP)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": packed(numbers, 4, order), "qzeros": packed(zeros, 4, order), "scales": scales}
    section = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    np.testing.assert_array_equal(read(written(tmp_path, tensors, **section)), expected)


BLOCK = 8


def nf4(nested):
    """The tensors of bitsandbytes, and the weights that they encode."""
    table = np.sort(RNG.normal(size=16)).astype(np.float32)
    codes = RNG.integers(0, 16, OUTPUTS * INPUTS)
    absmax = RNG.uniform(0.1, 1, OUTPUTS * INPUTS // BLOCK).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [OUTPUTS, INPUTS]}
    tensors = {"weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None], "weight.quant_map": table}
    if nested:
        outer_table = np.linspace(-1, 1, 256).astype(np.float32)
        numbers = RNG.integers(0, 256, len(absmax)).astype(np.uint8)
        outer = RNG.uniform(0.1, 1, len(absmax) // 32).astype(np.float32)
        absmax = outer_table[numbers] * outer.repeat(32) + np.float32(0.5)
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.5}
        tensors |= {"weight.absmax": numbers, "weight.nested_absmax": outer, "weight.nested_quant_map": outer_table}
    else:
        tensors["weight.absmax"] = absmax
    tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    weights = (table[codes] * absmax.repeat(BLOCK)).reshape(OUTPUTS, INPUTS)
    return tensors, weights.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested, tmp_path):
    tensors, expected = nf4(nested)
    np.testing.assert_array_equal(read(written(tmp_path, tensors, quant_method="bitsandbytes")), expected)


def test_int8_of_bitsandbytes(tmp_path):
    numbers = RNG.integers(-127, 128, (OUTPUTS, INPUTS)).astype(np.int8)
    scales = RNG.uniform(1, 2, OUTPUTS).astype(np.float32)
    tensors = {"weight": numbers, "SCB": scales, "weight_format": np.zeros((), np.uint8)}
    expected = (numbers * (scales / np.float32(127))[:, None]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read(written(tmp_path, tensors, quant_method="bitsandbytes")), expected)


def test_what_does_not_fit_is_named(tmp_path):
    numbers, zeros, scales, _ = problem(4, np.arange(INPUTS) // GROUP)
    tensors = {"qweight": packed(numbers.T, 4, range(8)).T.copy(), "qzeros": packed(zeros, 4, range(8))}
    section = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    with pytest.raises(ConversionError, match=rf"{MODULE}\.qweight has no {MODULE}\.scales"):
        open_checkpoint(written(tmp_path, tensors, **section))
    tensors["scales"] = scales[:-1].copy()
    with pytest.raises(ConversionError, match=rf"{MODULE} does not fit quantization_config\.bits=4, group_size=16"):
        open_checkpoint(written(tmp_path, tensors, **section))
    good, _ = nf4(True)
    state = "weight.quant_state.bitsandbytes__nf4"
    for changed, message in (
        ({state: np.frombuffer(b'{"shape": 3}', np.uint8).copy()}, "quant_state of .* is not valid"),
        ({"weight.absmax": np.ones(3, np.uint8)}, r"weight\.absmax is U8 \[3\], must be U8 \[192\]"),
        ({"weight.nested_absmax": np.ones(6, np.float16)}, r"weight\.nested_absmax is F16 \[6\], must be F32 \[6\]"),
        ({"weight": np.ones((3, 1), np.uint8)}, "does not hold 1536 numbers of 4 bits"),
    ):
        with pytest.raises(ConversionError, match=message):
            open_checkpoint(written(tmp_path, good | changed, quant_method="bitsandbytes"))
