"""Options that are made of the fields of dataclasses."""

from dataclasses import fields

import pytest
import typer

from jaxtrain.cli import app
from jaxtrain.cli.options import NO_OPTIONS
from jaxtrain.sample.requests import SamplingParams


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_sampling_parameter_is_an_option_with_its_default_or_has_a_reason_not_to_be(command):
    options = {option.name: option for option in typer.main.get_command(app).commands[command].params}  # pyright: ignore
    without = {"n"} if command == "chat" else set()
    assert NO_OPTIONS.keys() <= {field.name for field in fields(SamplingParams)}
    for field in fields(SamplingParams):
        if field.name in NO_OPTIONS.keys() | without:
            assert field.name not in options
        else:
            assert options[field.name].default == (field.default or None if field.name == "stop" else field.default)
            assert options[field.name].help
