"""MXFP4 is read exactly: every code and scale is the number that the standard says."""

import ml_dtypes
import numpy as np

from converters.mxfp4 import RUN, decode_mxfp4


def number(code: int) -> float:
    """A 4-bit float: a sign, two bits of exponent of bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def test_every_code_under_every_scale_of_bfloat16():
    codes = np.arange(RUN) % 16
    blocks = np.broadcast_to((codes[::2] | codes[1::2] << 4).astype(np.uint8), (1, 1, 16))
    for scale in range(3, 252):  # 2**-124 .. 2**124: every product is a normal bfloat16 number
        found = decode_mxfp4(blocks, np.full((1, 1), scale, np.uint8))
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            found[0].astype(np.float64), [number(int(code)) * 2.0 ** (scale - 127) for code in codes]
        )


def test_runs_follow_each_other_with_their_own_scales():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 4, 16), np.uint8)
    scales = rng.integers(100, 140, (2, 3, 4), np.uint8)
    found = decode_mxfp4(blocks, scales)
    assert found.shape == (2, 3, 4 * RUN)
    expert, row, run, place = 1, 2, 3, 5
    byte = int(blocks[expert, row, run, place])
    for half, code in enumerate((byte & 15, byte >> 4)):
        expected = number(code) * 2.0 ** (int(scales[expert, row, run]) - 127)
        assert float(found[expert, row, run * RUN + 2 * place + half]) == expected
