"""A reward that a random model can increase (the share of digits in its text), a slow version, and an environment."""

import asyncio
import time
from pathlib import Path

from jaxtrain.rl.environments import Opening, Reply


def digits(completions, **_):
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / 8 for text in texts]


def slow_digits(completions, folder, **columns):
    """`digits`, which takes a minute from the call on whose number is in the file `slow_from` of `folder`."""
    folder = Path(folder)
    with (folder / "calls").open("a") as calls:
        calls.write("call\n")
    count = len((folder / "calls").read_text().splitlines())
    file = folder / "slow_from"
    if file.exists() and count >= int(file.read_text()):
        (folder / "waiting").touch()
        time.sleep(60)
    return digits(completions, **columns)


class MoreDigits:
    """Asks twice for digits, quotes the answer, and raises for some letters."""

    async def reset(self, row):
        self.turns = 0
        return Opening(row["prompt"])

    async def step(self, text):
        await asyncio.sleep(0.01 * (len(text) % 5))
        self.turns += 1
        reward = sum(character.isdigit() for character in text) / 8
        if set(text) & set("vwxyz"):
            raise RuntimeError("no such letters, please")
        return Reply([{"role": "user", "content": f"Not {text[:2]!a}."}] if self.turns < 2 else (), reward)
