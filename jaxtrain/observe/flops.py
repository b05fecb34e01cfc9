"""How much arithmetic a batch needs, how much a device could do, and how much memory was used.

MFU (model FLOPs utilisation) is defined in PaLM, appendix B (https://arxiv.org/abs/2204.02311): FLOPs that the model
needs for the tokens it saw, over the seconds they took times the peak of the hardware. What a run does besides is not
counted: recomputation by remat, padding tokens, padded vocabulary rows, element-wise work. PaLM charges every token
6 FLOPs per parameter and 12 L N H T for attention. Here everything is charged for what it is:

    a matrix [i, o]     2 i o per token forward, 2 i o for the gradient of its input, and 2 i o for its own gradient,
                        which a frozen matrix (LoRA) does not have
    an adapter          the same for its two factors [i, r] and [r, o]
    attention           4 N H per layer and visible (query, key) pair forward, 8 N H backward; a token sees those before
                        it and itself, in its own segment, within the layer's window
    experts             the matrices of those that a token chose, and the router; never those of the others
    the head            a matrix [D, V], charged only for tokens that carry a loss weight
    the embedding       a look-up: nothing

The loss makes no difference to any of it. Computed on the host from a packed batch in well under a millisecond.
"""

from __future__ import annotations

import resource
import sys

import jax
import numpy as np

from jaxtrain.nn.config import Lora, ModelConfig

# Dense bf16 FLOP/s of one chip: the peak that everybody's MFU refers to, whatever the run's compute dtype.
_PEAK_FLOPS = {
    # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of each version. Keys: jax's device_kind.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # A chip has two cores, and jax shows each as a device of its own: half of the chip's 2307e12.
    "TPU7x": 1153.5e12,
    # https://www.nvidia.com/en-us/data-center/a100/, h100/, h200/, dgx-b200/; sheets with sparsity halved.
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def train_flops(
    config: ModelConfig, segment_ids: np.ndarray, loss_weights: np.ndarray, lora: Lora | None = None
) -> float:
    """FLOPs of one forward and backward pass over packed rows.

    segment_ids [B, T] int, 0 is padding; loss_weights [B, T]. With `lora` the base weights are frozen.
    """
    lengths = segment_lengths(segment_ids)
    scored = np.count_nonzero(loss_weights[:, 1:])  # nothing predicts the first token of a row
    per_token = config.num_layers * sum(
        many * _matrix_flops(name, i, o, lora) for name, (many, i, o) in _layer_matrices(config).items()
    )
    head = _matrix_flops("lm_head", config.hidden_size, config.vocab_size, lora)
    pairs = {window: visible_pairs(lengths, window) for window in {kind.window for kind in config.pattern}}
    attention = 12 * config.num_heads * config.head_dim * sum(pairs[kind.window] for kind in config.pattern)
    return float(int(lengths.sum()) * per_token + scored * head + attention)


def segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Lengths [S] of all segments of all rows [B, T], in order; padding (0) is none."""
    most = int(segment_ids.max(initial=0)) + 1
    flat = segment_ids + most * np.arange(len(segment_ids), dtype=segment_ids.dtype)[:, None]
    counts = np.bincount(flat.ravel(), minlength=most * len(segment_ids)).reshape(-1, most)[:, 1:]
    return counts[counts > 0]


def visible_pairs(lengths: np.ndarray, window: int | None) -> int:
    """(query, key) pairs that causal attention computes in segments of these lengths."""
    n = lengths.astype(np.int64)
    seen = n if window is None else np.minimum(n, window)
    # The first `seen` tokens see 1, 2, .. `seen`; the others see a whole window.
    return int((seen * (seen + 1) // 2 + (n - seen) * seen).sum())


def packing_density(segment_ids: np.ndarray) -> float:
    """Share of the tokens [B, T] that are no padding."""
    return np.count_nonzero(segment_ids) / segment_ids.size


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None where nobody states it (CPUs) or the table does not know it."""
    if device_kind in _PEAK_FLOPS:
        return _PEAK_FLOPS[device_kind]
    # A GPU's kind goes on, e.g. `NVIDIA A100-SXM4-80GB`; the longest entry that fits is the most particular one.
    fits = [known for known in _PEAK_FLOPS if known.startswith("NVIDIA") and device_kind.startswith(known)]
    return _PEAK_FLOPS[max(fits, key=len)] if fits else None


def mfu(flops: float, seconds: float) -> float | None:
    """Share of the peak of this process's devices, for `flops` of this process's rows; None where no peak is known."""
    peaks = [peak_flops(device.device_kind) for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return flops / (seconds * sum(known)) if known and len(known) == len(peaks) else None


def peak_memory_bytes() -> int:
    """The most that any device of this process held so far; where devices do not tell, the process's resident peak."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return max(peaks)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB


def _layer_matrices(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Name -> (how many of them a token meets, in, out)."""
    d, h, moe = config.hidden_size, config.head_dim, config.moe
    many, f = (moe.experts_per_token, moe.intermediate_size) if moe else (1, config.intermediate_size)
    mlp = "mlp.experts" if moe else "mlp"
    return {
        "attn.q_proj": (1, d, config.num_heads * h),
        "attn.k_proj": (1, d, config.num_kv_heads * h),
        "attn.v_proj": (1, d, config.num_kv_heads * h),
        "attn.o_proj": (1, config.num_heads * h, d),
        **({"mlp.router": (1, d, moe.num_experts)} if moe else {}),
        f"{mlp}.gate_proj": (many, d, f),
        f"{mlp}.up_proj": (many, d, f),
        f"{mlp}.down_proj": (many, f, d),
    }


def _matrix_flops(name: str, i: int, o: int, lora: Lora | None) -> int:
    """Forward and backward, per token."""
    if lora is None:
        return 6 * i * o
    adapter = 6 * lora.rank * (i + o) if name != "lm_head" and lora.covers(name) else 0
    return 4 * i * o + adapter
