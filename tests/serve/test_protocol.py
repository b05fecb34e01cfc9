"""Every body is converted to a call, or refused with the name of the field."""

import json

import pytest
from hf_folders import save

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.sample.requests import BOUNDS, EngineLimits, FieldError
from jaxtrain.serve.limits import Limits
from jaxtrain.serve.protocol import read_call
from jaxtrain.serve.schema import CompletionCall
from jaxtrain.serve.served import load_served

HUGE = "9" * 400
NUMBERS = [name for name in BOUNDS if name in CompletionCall.model_fields]
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("model") / "tiny", "llama", vocab_size=259, num_hidden_layers=1)
    write_byte_tokenizer(folder)
    return load_served(folder, dtype="float32", max_length=96, slots=8, limits=EngineLimits(alternatives=5))


def read(served, body, chat=False):
    raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return read_call(served, raw, chat=chat, limits=Limits())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, value)
            for name in BOUNDS
            if name in CompletionCall.model_fields
            for value in (HUGE, f"-{HUGE}", "1e999", '"3"')
        ),
        *((name, value) for name in BOUNDS if name in CompletionCall.model_fields for value in ("true", "[1]", "{}")),
        ("top_k", "1000000000000"),
        ("top_k", "2.5"),
        ("logprobs", "2.5"),
        ("logprobs", "-1"),
        ("logprobs", "21"),
        ("logprobs", HUGE),
        ("prompt", "[2147483648]"),
        ("prompt", f"[{HUGE}]"),
        ("prompt", "[1, 1.5]"),
        ("prompt", "[true]"),
        ("prompt", "[null]"),
        ("prompt", "[-1]"),
        ("prompt", "[259]"),
        ("prompt", "5"),
        ("stop", '[""]'),
        ("stop", "{}"),
        ("stop", json.dumps(["a"] * 17)),
        ("stop", json.dumps("a" * 1025)),
        ("stop_token_ids", "[null]"),
        ("stop_token_ids", "[1.5, true]"),
        ("stop_token_ids", "[2147483648]"),
        ("stop_token_ids", "[259]"),
        ("stop_token_ids", "7"),
        ("stop_token_ids", "[1, 2, 3, 4, 5, 6, 7, 8, 9]"),
        ("logit_bias", '{"5": 1e300}'),
        ("logit_bias", f'{{"5": {HUGE}}}'),
        ("logit_bias", '{"5": null}'),
        ("logit_bias", '{"5": true}'),
        ("logit_bias", '{"five": 1}'),
        ("logit_bias", '{"05": 1}'),
        ("logit_bias", '{"1_0": 1}'),
        ("logit_bias", f'{{"{"9" * 5000}": 1}}'),
        ("logit_bias", '{"9999999999": 1}'),
        ("logit_bias", "[[5, 1]]"),
        ("logit_bias", json.dumps({str(token): 1 for token in range(65)})),
        ("repetition_penalty", "1e-320"),
        ("temperature", "1e-320"),
        ("n", "3000000"),
        ("n", "257"),
        ("n", "0"),
        ("max_tokens", "95"),
        ("stream", '"no"'),
        ("stream", "1"),
        ("stream_options", '{"include_usage": true}'),
        ("model", "5"),
        ("metadata", "[]"),
        ("store", "true"),
        ("store", "0"),
        ("best_of", "true"),
        ("top_logprobs", "2"),
        ("messages", "[]"),
        ("wanted", "1"),
    ],
)
def test_a_field_is_refused_by_name(served, field, value):
    body = "{" + ('"prompt": "hi", ' if field != "prompt" else "") + f'"{field}": {value}}}'
    with pytest.raises(FieldError) as error:
        read(served, body)
    assert error.value.field == field
    assert field in error.value.problem and len(error.value.problem) < 300
    error.value.problem.encode()  # it can be sent


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 2.5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options"),
        ({"stream": True, "stream_options": {"wanted": 1}}, "stream_options"),
        ({"prompt": "hi"}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"role": 5, "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, "messages"),
    ],
)
def test_a_field_of_a_chat_is_refused_by_name(served, change, field):
    with pytest.raises(FieldError) as error:
        read(served, CHAT | change, chat=True)
    assert error.value.field == field
    error.value.problem.encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (DEEP, "not JSON in UTF-8: recursion limit exceeded"),
        (DEEP.replace("prompt", "messages"), "not JSON in UTF-8: recursion limit exceeded"),
        ("[]", "must be a JSON object"),
        (f'{{"prompt": {"9" * 5000}}}', "not JSON in UTF-8: number out of range"),
        (json.dumps({"prompt": "a\ud800"}), "not JSON in UTF-8"),
        (json.dumps({"messages": [{"role": "user", "content": "\udfff\ud83d"}]}), "not JSON in UTF-8"),
        (json.dumps({f"unknown{number}": 1 for number in range(1000)}), "has 100[01] invalid values"),
        (b'{"prompt": "\xed\xa0\x80"}', "not JSON in UTF-8"),
        ("", "not JSON in UTF-8: EOF"),
        ('{"prompt": "hi"', "not JSON in UTF-8"),
        ('{"\\ud800": 1, "prompt": "hi"}', "not JSON in UTF-8"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_a_body_that_is_not_an_object_is_refused(served, body, message, chat):
    with pytest.raises(ValueError, match=message) as error:
        read(served, body, chat)
    str(error.value).encode()


@pytest.mark.parametrize("depth", [150, 300, 990])
def test_deep_nesting_is_refused(served, depth):
    """Otherwise repr() in a message, or the template, may exceed the recursion limit."""
    deep = "[" * depth + "]" * depth
    for body in (f'{{"prompt": {deep}}}', f'{{"prompt": "hi", "stop": {deep}}}', f'{{"prompt": "hi", "n": {deep}}}'):
        with pytest.raises(ValueError, match=r"prompt|stop|n must|recursion limit"):
            read(served, body)


def test_request_fields_reach_the_sampling_params(served):
    options = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2}
    options |= {"min_tokens": 2}
    options |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    body = options | {"stop": "x", "stop_token_ids": [7], "logit_bias": {"5": -1}, "logprobs": 3, "prompt": "ab"}
    call = read(served, body | {"user": "me", "seed": 3, "best_of": 1, "stream": None})
    (request,) = call.requests
    params = request.params
    assert {name: getattr(params, name) for name in options} == options
    assert params.stop == ("x",) and params.logit_bias == {5: -1} and params.alternatives == 3
    assert params.stop_ids == [7, *served.stop_ids] and call.logprobs and not call.body.stream
    assert request.prompt_ids.tolist() == served.tokenizer.encode("ab")


def test_a_pair_of_surrogates_is_a_character(served):
    call = read(served, '{"prompt": "\\ud83d\\ude00", "stop": "\\u00e9"}')
    assert call.requests[0].prompt_ids.tolist() == served.tokenizer.encode("\U0001f600")


@pytest.mark.parametrize(
    ("value", "chat", "expected"),
    [(0, False, (True, 0)), (False, False, (False, 0)), (True, False, (True, 0)), (True, True, (True, 0))],
)
def test_log_probabilities_without_alternatives(served, value, chat, expected):
    call = read(served, (CHAT if chat else {"prompt": "hi"}) | {"logprobs": value}, chat)
    assert (call.logprobs, call.requests[0].params.alternatives) == expected


def test_every_prompt_of_a_list_is_a_request(served):
    for prompt in (["ab", "c"], [[1, 2], [3]]):
        call = read(served, {"prompt": prompt, "n": 2})
        expected = [served.tokenizer.encode(each) if isinstance(each, str) else each for each in prompt]
        assert [request.prompt_ids.tolist() for request in call.requests] == expected and call.samples == 4
    with pytest.raises(FieldError, match="n=200 of 2 prompts must be at most 256 samples"):
        read(served, {"prompt": ["a", "b"], "n": 200})


def test_a_response_of_too_many_log_probabilities_is_refused(served):
    body = {"prompt": "a", "n": 10, "max_tokens": 50, "logprobs": 3}
    raw = json.dumps(body).encode()
    assert read_call(served, raw, chat=False, limits=Limits(max_logprobs=2000)).samples == 10
    with pytest.raises(FieldError, match="500 tokens with 3 alternatives each are 2000 values"):
        read_call(served, raw, chat=False, limits=Limits(max_logprobs=1999))


def test_all_top_k_are_asked_for_with_minus_one(served):
    assert read(served, {"prompt": "a", "top_k": -1}).requests[0].params.top_k == 0
