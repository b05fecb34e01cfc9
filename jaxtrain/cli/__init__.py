"""The command line."""

from jaxtrain.cli.app import app, main

__all__ = ["app", "main"]
