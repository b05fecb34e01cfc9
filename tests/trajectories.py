"""Random trajectories for the tests."""

import numpy as np

from jaxtrain.rl.rollouts import Prompt, Trajectory


def trajectory(prompt_length=3, length=4, *, number=0, sample=0, reward=0.0, seed=0, vocab_size=101, **changes):
    """A sample of random ids and log-probabilities, all of them sampled by the model."""
    rng = np.random.default_rng([seed, number, sample])
    prompt = Prompt(number, np.random.default_rng([seed, number]).integers(0, vocab_size, prompt_length, np.int32), {})
    made = Trajectory(
        prompt,
        sample,
        completion_ids=rng.integers(0, vocab_size, length, np.int32),
        loss_mask=np.ones(length, bool),
        sampler_logps=-rng.random(length).astype(np.float32) - 0.1,
        raw_logps=-rng.random(length).astype(np.float32) - 0.1,
        versions=np.zeros(length, np.int32),
        text=f"sample {sample}",
        finish_reason="stop",
        rewards={"right": reward},
        reward=reward,
    )
    return made._replace(**changes)
