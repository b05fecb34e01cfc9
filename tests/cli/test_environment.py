"""The command `env`."""

import json

from typer.testing import CliRunner

from jaxtrain.cli import app


def test_text_and_json_show_the_same():
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).output)
    text = CliRunner().invoke(app, ["env"]).output
    assert [line.strip(":") for line in text.splitlines() if not line.startswith(" ")] == list(found)
    assert found["packages"]["jax"] in text
