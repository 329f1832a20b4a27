"""What the fields of request bodies are made of, and what is said about a field that is wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from gossamer.errors import RequestError
from gossamer.surrogates import find_lone_surrogate

M = TypeVar("M", bound=BaseModel)


class Fields(BaseModel):
    """An object of a body. Unknown fields and values of another type are refused; null means "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, value: object) -> object:
        return drop_nulls(value)


_FORM = "say `structured_outputs` or `response_format`"
#: Fields that others know and that would change the answer; what to do instead, if there is something.
REFUSED = {
    "allowed_token_ids": "bias the others with `logit_bias`",
    "audio": "",
    "background": "use a batch",
    "bad_words": "",
    "chat_template": "`gossamer serve --chat-template` takes one at the start",
    "conversation": "send its items, or `previous_response_id`",
    "documents": "write them into a message",
    "early_stopping": "",
    "guided_choice": _FORM,
    "guided_decoding_backend": _FORM,
    "guided_grammar": _FORM,
    "guided_json": _FORM,
    "guided_regex": _FORM,
    "length_penalty": "beam search is in Python: `LLM.beam_search`",
    "logits_processors": "",
    "mm_processor_kwargs": "",
    "moderation": "",
    "priority": "",
    "prompt_embeds": "",
    "suffix": "",
    "thinking_token_budget": "say `max_reasoning_tokens`",
    "use_beam_search": "beam search is in Python: `LLM.beam_search`",
    "web_search_options": "",
}


def drop_nulls(value: object) -> object:
    """An object without the fields that are null."""
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


# Every token of an answer is compared with each stop string, and every step adds each bias: these bound that work.
MAX_STOPS = 128
MAX_TOKEN_IDS = 4096
MAX_CHOICES = 16_384
MAX_PARTS = 1024

Stops = Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_listed)]
TokenIds = Annotated[list[int], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
TokenBias = Annotated[dict[str, float], Field(max_length=MAX_TOKEN_IDS)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
ChoiceCount = Annotated[int, Field(ge=1, le=1024)]  # each is a sequence, and some objects, before anything is computed


class StreamOptions(Fields):
    """``include_usage``: a stream has one more event, with the usage. ``continuous_usage_stats``: each event has it.

    ``include_obfuscation`` asks OpenAI to make events of one length; it changes no text, and nothing here.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(Fields):
    """A schema with OpenAI's wrapping. The name and the description are for readers."""

    model_config = ConfigDict(populate_by_name=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # an answer is always valid under the schema


class ResponseFormat(Fields):
    """OpenAI's ``response_format``: plain text, any JSON object, or JSON that is valid under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to type "json_schema", and that needs it')
        return self


class StructuredOutputs(Fields):
    """vLLM's ``structured_outputs``: one of these forms."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True)] | None = None


class PredictedText(Fields):
    """A part of a prediction."""

    type: Literal["text"]
    text: str


class Prediction(Fields):
    """OpenAI's ``prediction``: a text that the answer is expected to be, more or less."""

    type: Literal["content"]
    content: str | Annotated[list[PredictedText], Field(max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def parse_fields(model: type[M], body: object) -> M:
    """Read a decoded JSON body.

    Raises:
        RequestError: a field is missing, unknown or of the wrong type, or a text is none; ``param`` names it.
    """
    found = find_lone_surrogate(body, "")
    if found is not None:
        raise RequestError(found.reason, param=found.where)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise as_request_error(error, body) from None


def as_request_error(error: ValidationError, body: object) -> RequestError:
    """The first thing that is wrong with a body, by name."""
    found = [(_path(each, body), each) for each in error.errors(include_url=False)]
    # A field that may have several types has an error for each of them; the one deepest within it says most.
    path, first = max(found, key=lambda each: len(each[0]) if each[0].startswith(found[0][0]) else -1)
    param = path or None
    if first["type"] == "extra_forbidden":
        advice = REFUSED.get(param or "", "")
        return RequestError(f"{param} is not supported{advice and '; '}{advice}", param=param)
    if first["type"] == "missing":
        return RequestError(f"{param} is missing", param=param)
    cause = first["ctx"]["error"] if first["type"] == "value_error" else None
    if isinstance(cause, RequestError):
        return RequestError(cause.message, param=cause.param)
    reason = first["msg"] if cause is None else str(cause)
    return RequestError(f"{param}: {reason}" if param else reason, param=param)


def _path(error: ErrorDetails, body: object) -> str:
    """Where in a body the error is. Pydantic's own path also has names of types, where there are several."""
    steps, last = [], len(error["loc"]) - 1
    for place, step in enumerate(error["loc"]):
        inside = isinstance(body, dict) and step in body
        inside = inside or (isinstance(body, list) and isinstance(step, int) and step < len(body))
        if inside:
            body = body[step]  # type: ignore[index]  # it has just been found there
            steps.append(str(step))
        elif error["type"] == "missing" and place == last:
            steps.append(str(step))
    return ".".join(steps or map(str, error["loc"]))  # none of it is there where a field has a first name
