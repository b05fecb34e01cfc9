"""Commands on models."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jaxtrain.cli import main
from jaxtrain.sample.requests import SamplingParams


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ([], {}),
        (["--max-tokens", "5", "--seed", "3", "--n", "2"], {"max_tokens": 5, "seed": 3, "n": 2}),
        (["--temperature", "0", "--top-k", "4", "--top-p", "0.5"], {"temperature": 0.0, "top_k": 4, "top_p": 0.5}),
        (["--stop", "a", "--stop", "b", "--frequency-penalty", "1"], {"stop": ["a", "b"], "frequency_penalty": 1.0}),
    ],
)
def test_options_are_the_sampling_parameters(tmp_path, monkeypatch, options, given):
    import jaxtrain.recipes.generate
    import jaxtrain.serve.served

    calls = []
    served = SimpleNamespace(engine=SimpleNamespace(slots=1))
    monkeypatch.setattr(jaxtrain.serve.served, "load_served", lambda *_, **__: served)
    monkeypatch.setattr(jaxtrain.recipes.generate, "generate_file", lambda *arguments: calls.append(arguments) or 0)
    files = ["--prompts", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["jaxtrain", "generate", "model", *files, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert calls[0][3] == replace(SamplingParams(), **given)
