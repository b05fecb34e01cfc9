"""A sample follows its grammar, and does not change the others."""

import json
import re

import pytest
import tiny

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.grammar import guidance_tokenizer, json_schema_grammar, regex_grammar
from jaxtrain.sample.requests import EngineLimits, FieldError, Request, SamplingParams

pytest.importorskip("llguidance")
SIZES = {"num_layers": 1, "pattern": tiny.CONFIG.pattern[:1], "vocab_size": 259}
END = 258
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 20]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def guidance(tokenizer):
    return guidance_tokenizer(tokenizer, 259, (END,))


def test_samples_follow_their_grammars_beside_others_that_do_not_change(tokenizer, guidance):
    model = tiny.model(**SIZES)
    engine = Engine(
        model, tiny.random_params(model), slots=4, max_length=64, tokenizer=tokenizer, limits=EngineLimits(4)
    )
    plain = Request([5, 6], SamplingParams(max_tokens=20, seed=3, repetition_penalty=1.3))
    ((alone,),) = engine.generate([plain])
    regex, schema = regex_grammar(guidance, "(ab|c){3}[0-9]"), json_schema_grammar(guidance, SCHEMA)
    options = [{}, {"repetition_penalty": 1.2}, {"temperature": 0}]
    bound = [Request([5, 6], SamplingParams(grammar=regex, stop_ids=[END], **each)) for each in options]
    bound.append(Request([7], SamplingParams(grammar=schema, stop_ids=[END], n=3)))
    (same,), *texts, objects = engine.generate([plain, *bound])
    assert same.ids.tolist() == alone.ids.tolist()
    for (completion,) in texts:
        assert re.fullmatch("(ab|c){3}[0-9]", completion.text) and completion.finish_reason == "stop"
    assert {json.loads(each.text)["a"] for each in objects} <= {1, 20}


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (regex_grammar, "("),
        (json_schema_grammar, {"type": "x"}),
        (json_schema_grammar, {"$ref": "#/x"}),
    ],
)
def test_an_invalid_grammar_is_refused(guidance, make, value):
    with pytest.raises(ValueError):
        make(guidance, value)


def test_a_grammar_says_itself_where_a_sample_may_end(guidance):
    with pytest.raises(FieldError, match="min_tokens must be 0"):
        SamplingParams(grammar=regex_grammar(guidance, "a"), min_tokens=2)
