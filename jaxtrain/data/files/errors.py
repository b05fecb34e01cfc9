"""Errors of data, and suggestions of similar names."""

import difflib


class DataError(ValueError):
    """Data that cannot be trained on. The message names the file and, where there is one, the line."""


def suggest(name: str, known: list[str]) -> str:
    """`; did you mean ...?` with the most similar name, or a list of all."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(map(repr, known))}"
