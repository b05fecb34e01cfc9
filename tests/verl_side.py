"""Runs in an interpreter with verl: `python verl_side.py FILE`, for tests/rl/test_verl.py.

Advantages of `samples()`, and losses and gradients of the tokens in FILE, by the functions of
`verl.trainer.ppo.core_algos`, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

LENGTHS = (3, 7, 5, 1, 6)
GAMMA, LAM, CLIP, CLIP_VALUE, DUAL_CLIP = 0.9, 0.8, 0.2, 0.2, 3.0


def samples() -> dict[str, Any]:
    """Padded arrays [samples, tokens]. One sample has an environment's tokens in its middle."""
    rng = np.random.default_rng(0)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.float64)
    mask[1, 2:4] = 0
    values, penalties = rng.normal(size=(2, *mask.shape)) * mask
    return {"mask": mask, "values": values, "penalties": 0.1 * penalties, "rewards": rng.normal(size=len(LENGTHS))}


def main(path: str) -> None:
    import torch
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import (
        compute_gae_advantage_return,
        compute_policy_loss_vanilla,
        compute_reinforce_plus_plus_outcome_advantage,
        compute_value_loss,
    )
    from verl.workers.config import ActorConfig

    given = {name: torch.tensor(value) for name, value in samples().items()}
    rewards = -given["penalties"]
    for row, length in enumerate(LENGTHS):
        rewards[row, length - 1] += given["rewards"][row]
    advantages, returns = compute_gae_advantage_return(rewards, given["values"], given["mask"], GAMMA, LAM)
    found = {"gae": advantages.tolist(), "returns": returns.tolist()}
    advantages, _ = compute_reinforce_plus_plus_outcome_advantage(
        rewards, given["mask"], config=AlgoConfig(gamma=GAMMA)
    )
    found["reinforce++"] = advantages.tolist()

    with open(path) as file:
        tokens = {name: torch.tensor([values], dtype=torch.float64) for name, values in json.load(file).items()}
    ones = torch.ones_like(tokens["new"])
    settings = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=CLIP, clip_ratio_low=CLIP,
        clip_ratio_high=CLIP, clip_ratio_c=DUAL_CLIP,
    )  # fmt: skip
    new, values = (tokens[name].requires_grad_() for name in ("new", "new_values"))
    policy, _ = compute_policy_loss_vanilla(tokens["old"], new, tokens["advantages"], ones, config=settings)
    value, _ = compute_value_loss(values, tokens["returns"], tokens["values"], ones, CLIP_VALUE)
    (policy + value).backward()
    found |= {"policy": policy.item(), "value": value.item()}
    found |= {"policy_gradient": new.grad[0].tolist(), "value_gradient": values.grad[0].tolist()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
