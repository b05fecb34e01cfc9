"""What each optimisation of the training step brings, one at a time, as predicted by `jaxtrain plan`.

Usage: python benchmarks/ablation.py [STUDY ...] [--python PYTHON]

Each study plans one config with its defaults, and then with one setting changed at a time. Nothing is run and no
accelerator is needed, but a compilation takes minutes; compiled programs are cached, so that a repetition is quick.
`--python`: an interpreter whose environment has JAX's CUDA plugin, for the studies on GPUs. Writes its section of
benchmarks/RESULTS.md for each study.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from results import machine, write_section

ROOT = Path(__file__).parents[1]
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA31 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_ASYNC = ", ".join(
    f"{name}: true"
    for name in (
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
        "xla_enable_async_all_gather",
    )
)
_KEPT = "{qkv: keep, attention: keep, attention_out: keep}"


class Study(NamedTuple):
    """A config on devices, and settings of which each is compared with the config alone."""

    title: str
    config: str
    on: str
    model: dict
    settings: dict[str, tuple[str, ...]]  # name -> overrides


_TPU = {
    "splash attention with two backward kernels": ("model.splash.fused_backward=false",),
    "qkv and attention_out kept as well": (f"model.remat={_KEPT}",),
    "attention recomputed (`remat: {}`)": ("model.remat={}",),
    "chunks of the head of 512 tokens": ("model.head_chunk=512",),
    "tensor parallelism over 2": ("mesh.preset=fsdp_tensor", "mesh.tensor=2"),
}
_GATHERS = {
    "v5p": {"synchronous gathers": ("model.compiler_options={}",)},
    "v6e": {"asynchronous gathers": (f"model.compiler_options={{{_ASYNC}}}",)},
}
_GPU = {
    "attention by XLA, with remat full": ("model.attention=xla", "model.remat=full"),
    "remat full": ("model.remat=full",),
    "remat {}": ("model.remat={}",),
    "chunks of the head of 512 tokens": ("model.head_chunk=512",),
}
STUDIES = {
    "v5p": Study(
        "Qwen3-8B, 16 rows of 8192 tokens, v5p:2x2x2",
        "tpu/qwen3_8b_v5p8.yaml",
        "v5p:2x2x2",
        _QWEN3,
        _TPU | _GATHERS["v5p"],
    ),
    "v6e": Study(
        "Llama-3.1-8B, 16 rows of 8192 tokens, v6e:4x4",
        "tpu/llama31_8b_v6e16.yaml",
        "v6e:4x4",
        _LLAMA31,
        _TPU | _GATHERS["v6e"],
    ),
    "h100": Study("Qwen3-8B, 8 rows of 8192 tokens, h100:8", "gpu/qwen3_8b_h100x8.yaml", "h100:8", _QWEN3, _GPU),
    "lora": Study(
        "LoRA of Llama-3.1-8B, 2 rows of 4096 tokens, h100:1",
        "gpu/llama31_8b_lora_h100.yaml",
        "h100:1",
        _LLAMA31,
        _GPU,
    ),
}


def planned(study: Study, overrides: tuple[str, ...], folder: Path, python: str) -> dict | str:
    """The JSON of `jaxtrain plan`, or its error."""
    (folder / "config.json").write_text(json.dumps(study.model))
    command = [python, "-m", "jaxtrain.cli", "plan", str(ROOT / "configs" / study.config), "--on", study.on, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command += [f"model.path={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def row(name: str, made: dict | str, alone: dict | None) -> str:
    if isinstance(made, str):
        return f"| {name} | {made} | | | | |"
    seconds = made["step_seconds"]
    change = "" if alone is None else f"{100 * (seconds / alone['step_seconds'] - 1):+.1f} %"
    fits = "" if made["fits"] else " (does not fit)"
    used = f"{made['used'] / 1e9:.1f}{fits}"
    rate = made["tokens_per_second_per_chip"]
    return f"| {name} | {seconds:.3f} | {change} | {100 * made['mfu']:.1f} | {rate:,.0f} | {used} |"


def run(key: str, python: str) -> None:
    """Plan a study, and write its section after each setting."""
    study = STUDIES[key]
    lines = [
        "| setting | s per step | change | MFU % | tokens/s/chip | GB a device |",
        "|---|---|---|---|---|---|",
    ]
    alone = None
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in {"the config": (), **study.settings}.items():
            made = planned(study, overrides, Path(folder), python)
            lines.append(row(name, made, alone))
            print(lines[-1], flush=True)
            if alone is None and isinstance(made, dict):
                alone = made
            note = (
                f"Predictions of `jaxtrain plan configs/{study.config} --on {study.on}`, not measurements; one setting "
                f"changed at a time. {machine('jax')}."
            )
            write_section(f"ablation_{key}", f"Ablation: {study.title}", "\n".join([*lines, "", note]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    for each in given.studies or STUDIES:
        if each not in STUDIES:
            parser.error(f"unknown study {each!r}: {', '.join(STUDIES)}")
        run(each, given.python)
