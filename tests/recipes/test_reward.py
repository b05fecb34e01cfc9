"""Recipe reward: pairs and labels, the export in transformers, and its use as a reward in reinforcement learning."""

import json
from pathlib import Path

import numpy as np
import pytest
from recipe_runs import check_killed_copy_goes_on, prepare, train

from converters.tokenizer import load_tokenizer
from jaxtrain.config import ConfigError
from jaxtrain.session.export import export_run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("reward"), "reward")


@pytest.fixture(scope="module")
def whole(place):
    return train(place, "whole")


def test_the_export_scores_texts_as_transformers_does_and_the_metrics_are_those_of_its_scores(place, whole):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    export_run(place / "whole", place / "export")
    model = AutoModelForSequenceClassification.from_pretrained(place / "export")
    tokenizer = load_tokenizer(place / "export")
    rows = [json.loads(line) for line in (place / "eval.jsonl").read_text().splitlines()]
    scores = np.zeros((len(rows), 2))
    for number, row in enumerate(rows):
        for side, name in enumerate(("chosen", "rejected")):
            ids = tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False)
            with torch.no_grad():
                scores[number, side] = model(torch.tensor([ids])).logits.item()
    difference = scores[:, 0] - scores[:, 1]
    metrics = whole[-1]
    assert metrics["eval_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-difference))), abs=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(difference > 0))
    assert metrics["eval_margin"] == pytest.approx(difference.mean(), abs=1e-4)
    for name, value in (("min", scores.min()), ("mean", scores.mean()), ("max", scores.max())):
        assert metrics[f"eval_{name}_reward"] == pytest.approx(value, abs=1e-4)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = ((confidence - 0.5) * 20).astype(int).clip(0, 9)
    gaps = [abs(confidence[bins == b].sum() - (difference[bins == b] > 0).sum()) for b in range(10)]
    assert metrics["eval_calibration_error"] == pytest.approx(sum(gaps) / len(rows), abs=1e-4)


def test_texts_that_end_with_the_padding_token_have_equal_scores_in_transformers(place):
    """As those of SmolLM2, whose padding token ends texts: transformers reads the last token that is no padding."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = load_tokenizer(place / "tokenizer")
    end = tokenizer.eos_token
    tokenizer.pad_token = end
    tokenizer.save_pretrained(place / "padded tokenizer")
    pairs = [{"prompt": "Is it?", "chosen": " Yes, " + "it is. " * n, "rejected": " No"} for n in range(8)]
    (place / "plain.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lines = train(
        *(place, "plain", "data.prompt_format=plain", f"model.tokenizer={place / 'padded tokenizer'}"),
        *(f"data.train.path={place / 'plain.jsonl'}", f"data.eval.path={place / 'plain.jsonl'}", "train.steps=3"),
        f"model.config.pad_token_id={tokenizer.eos_token_id}",
    )
    export_run(place / "plain", place / "plain export")
    model = AutoModelForSequenceClassification.from_pretrained(place / "plain export")
    read = PreTrainedTokenizerFast.from_pretrained(place / "plain export")
    assert model.config.pad_token_id == read.pad_token_id != tokenizer.eos_token_id
    read.padding_side = "right"
    scores = []
    for side in ("chosen", "rejected"):
        texts = [pair["prompt"] + pair[side] + end for pair in pairs]
        with torch.no_grad():
            given = read(texts, padding=True, return_tensors="pt", add_special_tokens=False)
            scores.append(model(**given).logits[:, 0])
    assert lines[-1]["eval_margin"] == pytest.approx((scores[0] - scores[1]).mean().item(), abs=1e-4)


def test_labels_are_fitted(place):
    rows = [{"text": word * 3, "label": word == "good "} for word in ("good ", "bad ") * 16]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train.path={place / 'labels.jsonl'}"
    for kind in ("binary", "regression"):
        lines = train(place, kind, f"objective={{name: PointwiseReward, kind: {kind}}}", data, "data.eval=null")
        assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert "eval_calibration_error" not in lines[-1]


def test_a_killed_run_goes_on_exactly(place, whole):
    check_killed_copy_goes_on(place)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=DPO"], "DPO needs Logp, which model.head=scalar does not compute"),
        (["model.head=lm"], "BradleyTerry needs Reward, which model.head=lm does not compute"),
        (["eval.generate=5"], "recipe reward has no eval.generate: a reward model does not generate text"),
        (["reference.devices=2"], "`reference` has no effect with recipe reward"),
    ],
)
def test_what_does_not_fit_together_is_refused(place, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        train(place, "refused", *overrides)
