"""FLOPs of a batch, peak FLOP/s of devices, MFU, and peak memory.

MFU (model FLOPs utilisation) is defined in PaLM, appendix B (https://arxiv.org/abs/2204.02311): FLOPs that the model
needs for its tokens, divided by the time times the peak of the hardware. Other work is not counted: recomputation by
remat, padding tokens, padded vocabulary rows, element-wise operations. PaLM counts 6 FLOPs per token and parameter, and
12 L N H T for attention. Here each operation is counted separately:

    a matrix [i, o]     2 i o per token forward, 2 i o for the gradient of its input, and 2 i o for its own gradient,
                        unless it is frozen (LoRA)
    an adapter          the same for its two factors [i, r] and [r, o]
    attention           4 N H per layer and visible (query, key) pair forward, 8 N H backward; a token attends to itself
                        and the tokens before it, in its segment, within the layer's window
    experts             the matrices of the selected experts, and the router
    the head            a matrix [D, V], counted only for tokens with a loss weight
    the embedding       0, a lookup

The count does not depend on the loss. It is computed on the host from a packed batch in less than a millisecond.
"""

import resource
import sys

import jax
import numpy as np
from jaxtyping import Float, Integer

from jaxtrain.nn.config import Latent, LayerKind, Lora, ModelConfig
from jaxtrain.types import Array

# Dense bf16 FLOP/s of one chip: the usual reference of MFU, for any compute dtype.
_PEAK_FLOPS = {
    # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of each version. Keys: jax's device_kind.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # A chip has two cores, which are separate devices in JAX: half of the chip's 2307e12.
    "TPU7x": 1153.5e12,
    # https://www.nvidia.com/en-us/data-center/a100/, h100/, h200/, dgx-b200/; values with sparsity are halved.
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
    config: ModelConfig,
    segment_ids: Integer[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    lora: Lora | None = None,
    positions: Integer[Array, "B T"] | None = None,
) -> float:
    """FLOPs of one forward and backward pass over packed rows. With `lora` the base weights are frozen,
    except for its `full_paths`. `positions` are needed for rows with segments that continue others."""
    lengths = segment_lengths(segment_ids)
    scored = np.count_nonzero(loss_weights[:, 1:])  # nothing predicts the first token of a row
    per_token = sum(
        count * _matrix_flops(f"layers.{name}.kernel", i, o, lora)
        for kind in config.pattern
        for name, (count, i, o) in _layer_matrices(config, kind).items()
    )
    if config.delta is not None:
        # Of each head, three products with the state: what it holds for the key, its change, and the output.
        state = config.delta.value_heads * config.delta.key_width * config.delta.value_width
        per_token += len(config.layers_of("delta")) * 3 * 6 * state
    head_path = "embed.weight" if config.tied else "lm_head.kernel"
    head = _matrix_flops(head_path, config.hidden_size, config.vocab_size, lora)
    windows = {kind.window for kind in config.pattern}
    if positions is None:
        pairs = {window: visible_pairs(lengths, window) for window in windows}
    else:
        seen = np.asarray(positions)[np.asarray(segment_ids) > 0].astype(np.int64) + 1
        pairs = {window: int(np.minimum(seen, window or seen).sum()) for window in windows}
    attention = sum(_pair_flops(config, kind) * pairs[kind.window] for kind in config.pattern if kind.mixer != "delta")
    if config.per_layer_width is not None:
        inputs = config.num_layers * config.per_layer_width
        per_token += _matrix_flops("per_layer.proj.kernel", config.hidden_size, inputs, lora)
    return float(int(lengths.sum()) * per_token + scored * head + attention)


def _pair_flops(config: ModelConfig, kind: LayerKind) -> int:
    """Of a query and a key in a layer with attention, forward and backward."""
    width = config.heads_of(kind)[1]
    value_width = width if config.latent is None else config.latent.value_width
    return 6 * config.num_heads * (width + value_width)


def segment_lengths(segment_ids: Integer[Array, "B T"]) -> Integer[np.ndarray, " segments"]:
    """Lengths of all segments of all rows, in order, without padding (segment 0)."""
    segment_ids = np.asarray(segment_ids)
    ids = int(segment_ids.max(initial=0)) + 1
    flat = segment_ids + ids * np.arange(len(segment_ids), dtype=segment_ids.dtype)[:, None]
    counts = np.bincount(flat.ravel(), minlength=ids * len(segment_ids)).reshape(-1, ids)[:, 1:]
    return counts[counts > 0]


def visible_pairs(lengths: Integer[np.ndarray, " segments"], window: int | None) -> int:
    """The number of (query, key) pairs of causal attention in segments of these lengths."""
    n = lengths.astype(np.int64)
    first = n if window is None else np.minimum(n, window)
    # The first tokens attend to 1, 2, .. tokens, those after them to a full window.
    return int((first * (first + 1) // 2 + (n - first) * first).sum())


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device; None if the vendor states none (CPUs) or the table lacks it."""
    if device_kind in _PEAK_FLOPS:
        return _PEAK_FLOPS[device_kind]
    # The kind of a GPU has a suffix, e.g. `NVIDIA A100-SXM4-80GB`; the longest matching entry is the most specific.
    matches = [known for known in _PEAK_FLOPS if known.startswith("NVIDIA") and device_kind.startswith(known)]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


def mfu(flops: float, seconds: float) -> float | None:
    """MFU: `flops` of this process's rows, over `seconds` times the peak of its devices; None if a peak is unknown."""
    peaks = [peak_flops(device.device_kind) for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return flops / (seconds * sum(known)) if known and len(known) == len(peaks) else None


def peak_memory_bytes() -> int:
    """The peak memory of any device of this process; the peak resident set of the process if devices report none."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return max(peaks)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # KiB on Linux


def _layer_matrices(config: ModelConfig, kind: LayerKind) -> dict[str, tuple[int, int, int]]:
    """Name -> (count per token, in, out) of the matrices of a layer of this kind."""
    d, moe = config.hidden_size, None if kind.dense else config.moe
    others = _delta_matrices(config) if kind.mixer == "delta" else _attention_matrices(config, kind)
    if config.per_layer_width is not None:
        width = config.per_layer_width
        others |= {"per_layer.gate_proj": (1, d, width), "per_layer.out_proj": (1, width, d)}
    if moe is None or kind.beside:
        name = next(part for part in ("dense_mlp", "wide_mlp", "mlp") if part not in kind.absent)
        mlp = _mlp_matrices(name, 1, d, config.intermediate_size * (2 if kind.wide else 1))
        others |= {name: sizes for name, sizes in mlp.items() if config.mlp_gate or not name.endswith(".gate_proj")}
    if moe is None:
        return others
    return {
        **others,
        "mlp.router": (1, d, moe.num_experts),
        **_mlp_matrices("mlp.experts", moe.experts_per_token, d, moe.intermediate_size),
        **(_mlp_matrices("mlp.shared", 1, d, moe.shared_size) if moe.shared_size else {}),
        **({"mlp.shared_gate": (1, d, 1)} if moe.shared_gate else {}),
    }


def _attention_matrices(config: ModelConfig, kind: LayerKind) -> dict[str, tuple[int, int, int]]:
    if config.latent is not None:
        return _latent_matrices(config, config.latent)
    d, at, (count, width) = config.hidden_size, kind.mixer_part, config.heads_of(kind)
    heads, kv_heads, sizes = config.num_heads * width, count * width, config.global_attention
    only_keys = kind.mixer == "global" and sizes is not None and sizes.values_are_keys
    return {
        f"{at}.q_proj": (1, d, heads),
        **({} if kind.reuses else {f"{at}.k_proj": (1, d, kv_heads)}),
        **({} if kind.reuses or only_keys else {f"{at}.v_proj": (1, d, kv_heads)}),
        f"{at}.o_proj": (1, heads, d),
        **({f"{at}.gate_proj": (1, d, heads)} if config.attention_gate else {}),
    }


def _latent_matrices(config: ModelConfig, sizes: Latent) -> dict[str, tuple[int, int, int]]:
    d, heads = config.hidden_size, config.num_heads
    queries = {"attn.q_proj": (1, d, heads * config.head_dim)}
    if sizes.query_rank is not None:
        queries = {
            "attn.q_down": (1, d, sizes.query_rank),
            "attn.q_up": (1, sizes.query_rank, heads * config.head_dim),
        }
    return {
        **queries,
        "attn.kv_down": (1, d, sizes.rank),
        "attn.k_rope": (1, d, sizes.rope_width),
        "attn.k_up": (1, sizes.rank, heads * sizes.plain_width),
        "attn.v_up": (1, sizes.rank, heads * sizes.value_width),
        "attn.o_proj": (1, heads * sizes.value_width, d),
    }


def _delta_matrices(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    assert config.delta is not None
    d, heads = config.hidden_size, config.delta.value_heads
    keys, values = config.delta.key_heads * config.delta.key_width, heads * config.delta.value_width
    outputs = {"q": keys, "k": keys, "v": values, "gate": values, "beta": heads, "decay": heads}
    return {f"delta.{name}_proj": (1, d, size) for name, size in outputs.items()} | {"delta.o_proj": (1, values, d)}


def _mlp_matrices(path: str, count: int, d: int, f: int) -> dict[str, tuple[int, int, int]]:
    return {
        f"{path}.gate_proj": (count, d, f),
        f"{path}.up_proj": (count, d, f),
        f"{path}.down_proj": (count, f, d),
    }


def _matrix_flops(path: str, i: int, o: int, lora: Lora | None) -> int:
    """Forward and backward, per token."""
    if lora is None or path in lora.full_paths:
        return 6 * i * o
    linear = path.removeprefix("layers.").removesuffix(".kernel")
    adapter = 6 * lora.rank * (i + o) if path != linear and linear != "lm_head" and lora.covers(linear) else 0
    return 4 * i * o + adapter
