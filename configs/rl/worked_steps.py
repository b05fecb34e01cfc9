"""A reward of one's own, in TRL's signature; configs name it `configs/rl/worked_steps.py:worked_steps`."""

import re


def worked_steps(completions, answer, **columns):
    """The share of the worked answer's statements (each column of digits, and the result) that a sample has too.

    It tells a sample with one slip from one that is all wrong, where the final number alone calls both wrong.
    """
    return [_share(sample[-1]["content"], right) for sample, right in zip(completions, answer, strict=True)]


def _share(sample, right):
    said, wanted = (re.split(r"[,.] ", text) for text in (sample, right))
    return sum(map(str.__eq__, said, wanted)) / len(wanted)
