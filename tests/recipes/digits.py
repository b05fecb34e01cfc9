"""A reward that a random model can increase (the share of digits in its text), and a slow version."""

import time
from pathlib import Path


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
