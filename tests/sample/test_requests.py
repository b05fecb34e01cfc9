"""Every field of a request has bounds, and errors name the field."""

import math
from typing import get_type_hints

import numpy as np
import pytest

from jaxtrain.sample.requests import BOUNDS, EngineLimits, FieldError, Request, SamplingParams, check_request
from jaxtrain.sample.trie import Trie

HUGE = int("9" * 400)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_outside_its_bounds_is_refused_by_name(name):
    bounds = BOUNDS[name]
    for value in (HUGE, -HUGE, 10**5000, math.nan, math.inf, "3", True, [1], 1e300, bounds.minimum - 1):
        with pytest.raises(FieldError, match=name) as error:
            SamplingParams(**{name: value})
        assert error.value.field == name and len(str(error.value)) < 200
    if bounds.kind is int:
        with pytest.raises(FieldError, match=f"{name} must be int, not 2.5"):
            SamplingParams(**{name: 2.5})
    for value in (bounds.minimum, bounds.maximum):
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_every_number_of_a_request_has_bounds():
    """A new field of `SamplingParams` that holds a number needs `Bounds` in its annotation."""
    numeric = {name for name, kind in get_type_hints(SamplingParams).items() if kind in (int, float, int | None)}
    assert numeric == set(BOUNDS)


@pytest.mark.parametrize("name", [name for name in BOUNDS if name not in ("max_tokens", "seed")])
def test_none_is_accepted_only_by_optional_fields(name):
    with pytest.raises(FieldError, match=name):
        SamplingParams(**{name: None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1e-320}, "temperature=1e-320 must be 0 or at least 1e-06"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty=1e-320 must be at least 1e-06"),
        ({"stop": "text"}, "stop='text' must be a list of strings"),
        ({"stop": ["a", ""]}, "what is in stop must be text, and not empty; there is ''"),
        ({"stop": [None]}, "what is in stop must be text"),
        ({"stop": ["a"] * 17}, "stop has 17 strings, and there may be up to 16"),
        ({"stop": ["a" * 1025]}, "a string in stop has 1025 characters"),
        ({"stop_ids": [None]}, "stop_ids must be a list of token ids: a token id must be int, not None"),
        ({"stop_ids": [1.5]}, "a token id must be int, not 1.5"),
        ({"stop_ids": [True]}, "a token id must be int, not True"),
        ({"stop_ids": [2**31]}, "a token id=2147483648 must be at most 2147483647"),
        ({"stop_ids": 5}, "stop_ids must be a list of token ids, not 5"),
        ({"stop_ids": np.array([1.5])}, "stop_ids must be a list of token ids, not float64"),
        ({"allowed_ids": np.array([2**40])}, "allowed_ids must be a list of token ids: a token id=1099511627776"),
        ({"allowed_ids": []}, "allowed_ids is empty"),
        ({"logit_bias": {5: 1e300}}, r"logit_bias of token 5=1e\+300 must be at most 1000000"),
        ({"logit_bias": {5: "much"}}, "logit_bias of token 5 must be a number, not 'much'"),
        ({"logit_bias": {2**70: 1}}, "logit_bias must be a list of token ids: a token id=an integer of 71 bits"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"trie": [[1, 2]]}, "trie must be a Trie"),
        ({"logprobs": 1}, "logprobs must be true or false, not 1"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(options, message):
    with pytest.raises(FieldError, match=message) as error:
        SamplingParams(**options)
    assert error.value.field in options


def test_numpy_numbers_are_accepted():
    params = SamplingParams(np.int32(4), np.float32(0.5), stop_ids=np.array([3]), seed=np.uint32(7), trie=Trie([[1]]))
    assert params.max_tokens == 4 and params.seed == 7
    assert SamplingParams(allowed_ids=np.arange(4), stop_ids=np.array([], float)).allowed_ids is not None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([2**31], "r: prompt_ids must be a list of token ids: a token id=2147483648 must be at most 2147483647"),
        ([1, True], "a token id must be int, not True"),
        ([1, None], "a token id must be int, not None"),
        ([[1], [2]], r"a token id must be int, not \[1\]"),
        ("ab", "prompt_ids must be a list of token ids, not 'ab'"),
        (np.ones((2, 2), int), r"prompt_ids must be a list of token ids, not int64 of shape \(2, 2\)"),
    ],
)
def test_a_prompt_of_anything_but_token_ids_is_refused(prompt, message):
    with pytest.raises(FieldError, match=message) as error:
        check_request(Request(prompt), vocab_size=9, max_length=9, limits=EngineLimits(), has_tokenizer=False, name="r")
    assert error.value.field == "prompt_ids"
