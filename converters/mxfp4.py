"""MXFP4 (OCP Microscaling Formats 1.0), the format of the published GPT-OSS, read as bfloat16.

A matrix [E, I, O] is stored transposed, as `<name>_blocks` [E, O, I / 32, 16], two 4-bit floats per byte, lower half
first, and `<name>_scales` [E, O, I / 32], a power of two for each run of 32 along I. Their products are
bfloat16 numbers, so reading is exact. Writing would round, so a trained model is exported as bfloat16, never as MXFP4.
"""

import ml_dtypes
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
RUN = 32  # numbers that share a scale
_BIAS = 127
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # e2m1
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 blocks [..., runs, 16] and scales [..., runs] -> bfloat16 [..., runs * 32]."""
    numbers = np.stack([_VALUES[blocks & 15], _VALUES[blocks >> 4]], -1).reshape(*scales.shape, RUN)
    scaled = np.ldexp(numbers, scales.astype(np.int32)[..., None] - _BIAS)
    return scaled.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)
