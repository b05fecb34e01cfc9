"""The description of the endpoints in OpenAPI, made of the models of `schema` and `answers`."""

from typing import Any

from pydantic.json_schema import models_json_schema

from jaxtrain.serve.answers import ChatCompletion, ErrorAnswer, ModelInfo, ModelList, TextCompletion
from jaxtrain.serve.schema import ChatCall, CompletionCall

_REFUSALS = {
    "400": "a field is invalid: param names it",
    "401": "the API key is missing or wrong",
    "408": "the body was not sent in time",
    "413": "the body is too long",
    "429": "this client has too many running and waiting calls",
    "500": "the engine failed",
    "503": "the server has too many running and waiting calls",
    "504": "the call took too long",
}


def openapi() -> dict[str, Any]:
    """The description, a JSON object."""
    bodies, answers = (ChatCall, CompletionCall), (ChatCompletion, TextCompletion, ModelList, ModelInfo, ErrorAnswer)
    refs, definitions = models_json_schema(
        [*((each, "validation") for each in bodies), *((each, "serialization") for each in answers)],
        ref_template="#/components/schemas/{model}",
    )

    def content(model: type) -> dict[str, Any]:
        schema = next(ref for (each, _), ref in refs.items() if each is model)
        return {"application/json": {"schema": schema}}

    def operation(summary: str, answer: type, body: type | None = None, **more: Any) -> dict[str, Any]:
        refusals = {
            status: {"description": text, "content": content(ErrorAnswer)} for status, text in _REFUSALS.items()
        }
        found = {"description": "the answer", "content": content(answer)}
        made = {"summary": summary, "responses": {"200": found, **refusals}, **more}
        return made if body is None else {**made, "requestBody": {"required": True, "content": content(body)}}

    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    missing = {"description": "there is no such model", "content": content(ErrorAnswer)}
    one_model = operation("The model of this name", ModelInfo, parameters=[name])
    one_model["responses"]["404"] = missing
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxtrain", "version": "1", "description": "OpenAI's API; with stream, answers are events."},
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/chat/completions": {"post": operation("Answer a conversation", ChatCompletion, ChatCall)},
            "/v1/completions": {"post": operation("Continue texts", TextCompletion, CompletionCall)},
            "/v1/models": {"get": operation("The models that are served", ModelList)},
            "/v1/models/{model}": {"get": one_model},
        },
    }
