"""The bodies of calls as pydantic models: types, bounds and descriptions of every field that a client may send.

Fields that are sampling parameters are made of those of `SamplingParams`, so that the bounds are the same everywhere.
`/openapi.json` is made of these models.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model
from pydantic_core import from_json
from typing_extensions import Doc

from jaxtrain.sample.requests import (
    BIAS,
    BIAS_SLOTS,
    BOUNDS,
    INT32_MAX,
    STOP_CHARACTERS,
    STOP_SLOTS,
    STOP_STRINGS,
    TOKEN_ID,
    SamplingParams,
    ids_problem,
    shown,
)

ALTERNATIVES = 20  # the maximum of OpenAI's `top_logprobs`
_MAX_TOOLS = 128

OTHERWISE = {
    "stop": "it may be one string, too",
    "top_k": "-1 keeps all, too",
    "stop_ids": "vLLM's name is stop_token_ids",
    "alternatives": "OpenAI's names are logprobs and top_logprobs",
    "logprobs": "OpenAI's logprobs decides whether they are returned; the engine always computes them",
    "logit_bias": "its keys are text in JSON",
    "allowed_ids": "no API has it",
    "trie": "no API has it",
    "grammar": "OpenAI's name is response_format",
}
"""Fields of SamplingParams that are no fields of a body as they are, and why."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _sampling_fields() -> dict[str, Any]:
    hints = get_type_hints(SamplingParams, include_extras=True)
    made = {}
    for each in fields(SamplingParams):
        if each.name not in OTHERWISE:
            hint = hints[each.name]
            text = next((mark.documentation for mark in hint.__metadata__ if isinstance(mark, Doc)), None)
            made[each.name] = Annotated[hint, Field(description=text)], each.default
    return made


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt, or a list of them, as a list. Token ids are not checked by pydantic, which lists all faults of a
    list, however long it is."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a string, a list of token ids, or a list of prompts, not {shown(value)}")
    if all(isinstance(each, str) for each in value):
        return value
    if not any(isinstance(each, str | list) for each in value):
        value = [value]
    for each in value:
        if problem := ids_problem("a prompt", each):
            raise ValueError(f"must be a string, a list of token ids, or a list of one of them: {problem}")
    return value


_IDS = {"type": "array", "items": {"type": "integer", "minimum": TOKEN_ID.minimum, "maximum": TOKEN_ID.maximum}}
_TEXT = {"type": "string"}
_Prompts = Annotated[
    Any,
    AfterValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [_TEXT, _IDS, {"type": "array", "items": _TEXT}, {"type": "array", "items": _IDS}]},
        mode="validation",
    ),
]
_Stop = Annotated[str, MinLen(1), MaxLen(STOP_CHARACTERS)]
_TokenIdText = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
_Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class StreamOptions(_Strict):
    include_usage: bool = Field(False, description="end with an event that holds the usage")


class ToolFunction(_Strict):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="whether the arguments must follow the schema")


class Tool(_Strict):
    type: Literal["function"]
    function: ToolFunction


class FunctionName(_Strict):
    name: _Name


class NamedTool(_Strict):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Strict):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="accepted; the answer always follows the schema")


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(_Strict):
    type: Literal["regex"]
    pattern: str


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")]


class CalledFunction(_Strict):
    name: str
    arguments: str = Field(description="a JSON object")

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON, so they get the object.

        Raises ValueError if the arguments are not a JSON object.
        """
        arguments = from_json(self.arguments or "{}")
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of the tool call {self.name} must be a JSON object")
        return {"name": self.name, "arguments": arguments}


class MessageToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class GivenMessage(_Strict):
    """A message; fields that are not listed are given to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[MessageToolCall], MaxLen(_MAX_TOOLS)] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one string, because most chat templates support only strings.

        Raises ValueError for arguments of a tool call that are no JSON object."""
        message = {"role": self.role, **(self.model_extra or {})}
        if isinstance(self.content, str):
            message["content"] = self.content
        elif self.content is not None:
            message["content"] = "".join(part.text for part in self.content)
        if self.tool_calls:
            calls = [
                {"type": "function", "function": call.function.for_template(), **({"id": call.id} if call.id else {})}
                for call in self.tool_calls
            ]
            message |= {"tool_calls": calls, "content": message.get("content", "")}
        return message


Sampling: Any = create_model("Sampling", __base__=_Strict, **_sampling_fields())


class _Call(Sampling):
    model: str | None = Field(None, description="not read: there is one model")
    top_k: Annotated[int, Ge(-1), Le(INT32_MAX)] = Field(0, description="keep the k most probable; 0 or -1 keeps all")
    stop: _Stop | Annotated[list[_Stop], MaxLen(STOP_STRINGS)] = Field([], description="text that ends an answer")
    stop_token_ids: Annotated[list[Annotated[int, TOKEN_ID]], MaxLen(STOP_SLOTS)] = Field(
        [], description="tokens that end an answer"
    )
    logit_bias: Annotated[dict[_TokenIdText, Annotated[float, BIAS]], MaxLen(BIAS_SLOTS)] = Field(
        {}, description="what is added to the logits of token ids"
    )
    stream: bool = Field(False, description="answer with server-sent events")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="what each answer must follow")
    user: str | None = Field(None, description="not read")
    metadata: dict[str, Any] | None = Field(None, description="not read")


class ChatCall(_Call):
    """POST /v1/chat/completions"""

    messages: Annotated[list[GivenMessage], MinLen(1), Field(fail_fast=True)]
    max_completion_tokens: Annotated[int, BOUNDS["max_tokens"]] | None = Field(
        None, description="another name of max_tokens"
    )
    logprobs: bool = Field(False, description="answer the log-probability of each token")
    top_logprobs: Annotated[int, Ge(0), Le(ALTERNATIVES)] | None = Field(
        None, description="answer those of the most probable tokens, too"
    )
    tools: Annotated[list[Tool], MaxLen(_MAX_TOOLS)] = Field([], description="functions that the model may call")
    tool_choice: Literal["none", "auto", "required"] | NamedTool = Field(
        "auto", description="whether it may or must call one, or which one it must call"
    )
    parallel_tool_calls: bool | None = Field(None, description="not read: the model decides")
    chat_template_kwargs: dict[str, Any] = Field({}, description="arguments of the chat template")
    reasoning_effort: str | None = Field(None, description="the argument of the chat template of this name")
    store: Literal[False] = Field(False, description="only false")


class CompletionCall(_Call):
    """POST /v1/completions"""

    prompt: _Prompts = Field(description="text or token ids to continue, or a list of such prompts")
    logprobs: bool | Annotated[int, Ge(0), Le(ALTERNATIVES)] = Field(
        False, description="answer log-probabilities, and those of so many of the most probable tokens"
    )
    max_tokens: Annotated[int, Ge(0), Le(INT32_MAX)] | None = Field(
        None, description="new tokens; 0 needs echo; default: as many as max_length leaves"
    )
    echo: bool = Field(False, description="begin with the prompt, and with its log-probabilities if they are asked for")
    best_of: Annotated[int, Ge(1), Le(1)] = Field(1, description="only 1")
