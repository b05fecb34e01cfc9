"""A reward that a random model can climb, the share of digits in what it wrote; and one that can be made slow."""

import time
from pathlib import Path


def digits(completions, **_):
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / 8 for text in texts]


def slow_digits(completions, folder, **columns):
    """`digits`; from a call on whose number is in the file `slow_from` of `folder`, after a minute."""
    folder = Path(folder)
    with (folder / "calls").open("a") as calls:
        calls.write("call\n")
    count = len((folder / "calls").read_text().splitlines())
    file = folder / "slow_from"
    if file.exists() and count >= int(file.read_text()):
        (folder / "waiting").touch()
        time.sleep(60)
    return digits(completions, **columns)
