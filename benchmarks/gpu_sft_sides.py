"""The sides of benchmarks/gpu_sft.py, each run in a separate process: the same packed rows, the same arithmetic.

Both keep parameters and AdamW's moments in float32, compute in bfloat16, take a row at a time, accumulate the gradients
of a step's rows, clip them and recompute nothing in the backward pass.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain.data.packing import BestFit, Example, make_row, stack_rows
from jaxtrain.types import Batch

MARK = "@@"
LEARNING_RATE, MAX_GRAD_NORM, WARM_UP = 1e-4, 1.0, 3
NO_LABEL = -100


def packed_rows(rows: int, length: int, vocab: int) -> Batch:
    """Rows [rows, length] of random tokens in conversations of log-normal lengths: median 150, at most length / 2."""
    random = np.random.default_rng(0)
    packer: BestFit[Example] = BestFit(length, 16)
    full: list[Batch] = []
    while len(full) < rows:
        size = int(np.clip(random.lognormal(math.log(150), 1.07), 2, length // 2))
        weights = np.ones(size, np.float32)
        weights[0] = 0
        row = packer.add(Example(random.integers(0, vocab, size, np.int32), weights), size)
        full += [make_row(row, length)] if row else []
    return stack_rows(full)


def jaxtrain(spec: dict[str, Any]) -> dict[str, Any]:
    import jax
    from trainer import Trainer

    from jaxtrain.observe.flops import peak_memory_bytes

    device = jax.devices()[0]
    if device.platform != spec["platform"]:
        raise SystemExit(f"no {spec['platform'].upper()} here: jax finds {device.device_kind}")
    trainer = Trainer(
        {
            "recipe": "sft",
            "model": {
                "config": spec["hf"],
                "tokenizer": "none",
                "compute_dtype": "bfloat16",
                "remat": "none",
                "attention": spec["attention"],
            },
            "data": {"train": {"path": "none"}},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            "train": {"batch_size": spec["rows"], "microbatches": spec["rows"], "max_grad_norm": MAX_GRAD_NORM},
            "mesh": {"fsdp": 1},
        }
    )
    batch = packed_rows(spec["rows"], spec["length"], spec["hf"]["vocab_size"])
    trainer.compile(batch)
    answer = timed(lambda: trainer.step(batch)[0], spec["steps"])
    return answer | {"peak_bytes": peak_memory_bytes(), "device": device.device_kind}


def torch(spec: dict[str, Any]) -> dict[str, Any]:
    """transformers' model, compiled; restarting positions mark the ends of conversations for its attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"gpu": "cuda", "cpu": "cpu"}[spec["platform"]]
    if where == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: torch finds no CUDA device")
    torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**spec["hf"]), attn_implementation=spec["attention"], dtype=torch.float32
    )
    model = model.to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    compiled = torch.compile(model)
    batch = packed_rows(spec["rows"], spec["length"], spec["hf"]["vocab_size"])
    labels = np.where(batch.loss_weights > 0, batch.tokens, NO_LABEL)
    ids, positions, labels = (
        torch.from_numpy(x).long().to(where).split(1) for x in (batch.tokens, batch.positions, labels)
    )
    scored = float(np.count_nonzero(batch.loss_weights))

    def step() -> float:
        total = torch.zeros((), device=where)
        for row in zip(ids, positions, labels, strict=True):
            with torch.autocast(where, torch.bfloat16):
                loss = compiled(
                    input_ids=row[0],
                    position_ids=row[1],
                    labels=row[2],
                    use_cache=False,
                    num_items_in_batch=scored,
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    answer = timed(step, spec["steps"])
    if where == "cpu":
        return answer | {"peak_bytes": 0, "device": "cpu"}
    return answer | {"peak_bytes": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}


def timed(step: Callable[[], float], steps: int) -> dict[str, float]:
    """The first loss and the median seconds of a step, after steps that warm up."""
    first, *_ = [step() for _ in range(WARM_UP)]
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"loss": first, "seconds": statistics.median(seconds)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(MARK + json.dumps({"jaxtrain": jaxtrain, "torch": torch}[given["side"]](given)), flush=True)
