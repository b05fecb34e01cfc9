"""Errors of checkpoints."""


class ConversionError(ValueError):
    """A Hugging Face folder that cannot be read or written. The message names the file, tensor or key."""
