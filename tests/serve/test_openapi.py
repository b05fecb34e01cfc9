"""The description of the endpoints."""

import json
import re

from jaxtrain.sample.requests import BOUNDS
from jaxtrain.serve.openapi import openapi
from jaxtrain.serve.schema import ChatCall, CompletionCall


def test_every_reference_is_defined_and_every_field_described():
    description = openapi()
    schemas = description["components"]["schemas"]
    used = set(re.findall("#/components/schemas/([A-Za-z]+)", json.dumps(description)))
    assert used <= schemas.keys() and {"ChatCall", "CompletionCall", "ErrorAnswer"} <= used
    for model in (ChatCall, CompletionCall):
        assert schemas[model.__name__]["properties"].keys() == model.model_fields.keys()


def test_bounds_are_those_of_sampling_parameters():
    temperature = openapi()["components"]["schemas"]["ChatCall"]["properties"]["temperature"]
    assert (temperature["minimum"], temperature["maximum"]) == (
        BOUNDS["temperature"].minimum,
        BOUNDS["temperature"].maximum,
    )
