"""Request bodies of ``/v1/completions`` and ``/v1/chat/completions``.

The models forbid unknown fields: a field we cannot honour changes the answer, so it is refused by name, never dropped.
Values are not converted either: ``"temperature": "0.5"`` is refused. ``null`` means "not given", as in OpenAI's API.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from gossamer.errors import RequestError
from gossamer.sampling_params import SamplingParams, StructuredOutputsParams

# Fields of OpenAI's API that Gossamer does not offer. Clients write them out as null; only a value is refused.
_NOT_OFFERED = frozenset(
    {"suffix", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"}
    | {"modalities", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"}
    | {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# The same for messages: answers that are sent back as history carry these as null.
_NOT_OFFERED_IN_MESSAGES = frozenset({"name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio"})


def _drop_nulls(body: object, known: frozenset[str]) -> object:
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if value is not None or name not in known}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _joined_parts(content: object) -> object:
    """Content may be a list of typed parts; chat templates of text models take one string."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise ValueError('a content part must be {"type": "text", "text": ...}; other types are not supported')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a content part must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}
Strings = Annotated[list[str], BeforeValidator(_listed)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    """``include_usage``: one more event at the end of a stream, with the usage."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema with OpenAI's wrapping. The name and the description are for readers."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # an answer is always valid under the schema


class ResponseFormat(BaseModel):
    """OpenAI's ``response_format``: plain text, any JSON object, or JSON that is valid under a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to type "json_schema", and that needs it')
        return self


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``: one of these forms."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None


class _Body(BaseModel):
    """What both request bodies share: sampling, stopping, and the extensions that vLLM's clients know."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: What OpenAI generates at most when neither the body nor the user says anything; None is up to the context's end.
    openai_max_tokens: ClassVar[int | None] = None

    model: str | None = None
    n: PositiveCount = 1
    max_tokens: PositiveCount | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Strings = []
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # OpenAI's tag for the end user; by definition it does not influence the answer

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: Count = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: Count | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: object) -> object:
        return _drop_nulls(body, _NOT_OFFERED | cls.model_fields.keys())

    @classmethod
    def parse(cls, body: object) -> Self:
        """Read a decoded JSON body.

        Raises:
            RequestError: a field is missing, unknown or of the wrong type; ``param`` names it.

        >>> CompletionRequest.parse({"prompt": "Once", "suffix": "end"})
        Traceback (most recent call last):
        ...
        gossamer.errors.RequestError: suffix is not supported
        """
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise as_request_error(error) from None

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not available with stream: true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs mean the same; give one of them")
        return self

    @property
    def num_drawn(self) -> int:
        """Completions that are generated for each prompt."""
        return self.n

    def _token_limit(self) -> int | None:
        return self.max_tokens

    def _form(self) -> StructuredOutputsParams | None:
        """What the completion must look like."""
        given, wanted = self.response_format, self.structured_outputs
        if given is not None and given.type != "text":
            schema = None if given.json_schema is None else given.json_schema.schema_
            return StructuredOutputsParams(json=schema, json_object=schema is None)
        if wanted is not None:
            return StructuredOutputsParams(
                json=wanted.json_, json_object=wanted.json_object, regex=wanted.regex, choice=wanted.choice
            )
        return None

    @abstractmethod
    def _logprob_count(self) -> int | None:
        """Log-probabilities to ask the sampler for at each generated token."""

    def _prompt_logprob_count(self) -> int | None:
        return self.prompt_logprobs

    def to_sampling_params(self, default_max_tokens: int | None = None) -> SamplingParams:
        """The request in the engine's terms.

        Args:
            default_max_tokens: the limit for bodies that give none; ``None`` is OpenAI's own default.

        Raises:
            InvalidSamplingParamsError: a value is out of its range.
        """
        limit = self._token_limit() or default_max_tokens or self.openai_max_tokens
        return SamplingParams(
            n=self.num_drawn,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            # SamplingParams turns the keys into integers: in JSON they can only be strings.
            logit_bias=self.logit_bias,  # type: ignore[arg-type]
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            max_tokens=limit,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self._logprob_count(),
            prompt_logprobs=self._prompt_logprob_count(),
            structured_outputs=self._form(),
        )


class CompletionRequest(_Body):
    """Body of ``POST /v1/completions``.

    Attributes:
        prompt: one or several prompts, each a string or a list of token ids; normalised to a list of prompts.
        best_of: generate this many completions, and return the ``n`` whose tokens are most probable on average.
        logprobs: log-probabilities of this many most probable tokens at each position.
        echo: put the prompt (and its log-probabilities, if asked for) before the completion.

    >>> CompletionRequest.parse({"prompt": [1, 2, 3]}).prompt
    [[1, 2, 3]]
    >>> CompletionRequest.parse({"prompt": "Once"}).to_sampling_params().max_tokens
    16
    """

    openai_max_tokens: ClassVar[int | None] = 16

    prompt: Annotated[list[str | list[int]], WithJsonSchema(_PROMPT_SCHEMA)]
    best_of: PositiveCount | None = None
    logprobs: Count | None = None
    echo: bool = False

    @field_validator("prompt", mode="plain")
    @classmethod
    def _as_prompts(cls, value: object) -> list[str | list[int]]:
        prompts: list[Any] = [value] if isinstance(value, str) or _is_token_ids(value) else _as_list(value)
        all_text = all(isinstance(prompt, str) for prompt in prompts)
        if not prompts or not (all_text or all(_is_token_ids(prompt) for prompt in prompts)):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
        if all_text and any(_has_lone_surrogate(prompt) for prompt in prompts):
            raise ValueError("holds half of a surrogate pair, which is no character")
        return prompts

    @model_validator(mode="after")
    def _best_of_is_possible(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}; it must be at least n, which is {self.n}")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of is not available with stream: true: the best is known at the end only")
        return self

    @property
    def num_drawn(self) -> int:
        return self.best_of or self.n

    def engine_prompts(self) -> list[str | dict[str, Any]]:
        """The prompts in the form the engine takes."""
        prompts: list[str | dict[str, Any]] = []
        for prompt in self.prompt:
            if isinstance(prompt, str) and self.cache_salt is None:
                prompts.append(prompt)
            else:
                name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
                prompts.append({name: prompt, "cache_salt": self.cache_salt})
        return prompts

    def _logprob_count(self) -> int | None:
        return 0 if self.logprobs is None and self.num_drawn > self.n else self.logprobs

    def _prompt_logprob_count(self) -> int | None:
        if self.echo and self.logprobs is not None:
            return max(self.prompt_logprobs or 0, self.logprobs)
        return self.prompt_logprobs


class ChatMessage(BaseModel):
    """One turn of a conversation, text only."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, message: object) -> object:
        return _drop_nulls(message, _NOT_OFFERED_IN_MESSAGES)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages for a chat template. ``developer`` is OpenAI's later name of ``system``; templates know that."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]


class ChatCompletionRequest(_Body):
    """Body of ``POST /v1/chat/completions``.

    Attributes:
        max_completion_tokens: OpenAI's present name of ``max_tokens``; a body may use either.
        logprobs: return log-probabilities of the chosen tokens.
        top_logprobs: and of this many most probable ones at each position.

    >>> ChatCompletionRequest.parse({"messages": [{"role": "user", "content": "Hi"}]}).chat_messages()
    [{'role': 'user', 'content': 'Hi'}]
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool = False
    top_logprobs: Count = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens and self.max_tokens and self.max_completion_tokens != self.max_tokens:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        return self

    def chat_messages(self) -> list[dict[str, str]]:
        """The messages for a chat template."""
        return template_messages(self.messages)

    def _token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def _logprob_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _has_lone_surrogate(text: str) -> bool:
    # JSON can spell what UTF-8 cannot encode ("\ud800"); a tokenizer would fail on it much later.
    return any("\ud800" <= character <= "\udfff" for character in text)


def as_request_error(error: ValidationError) -> RequestError:
    """The first thing that is wrong with a body, by name."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return RequestError(f"{param} is not supported", param=param)
    if first["type"] == "missing":
        return RequestError(f"{param} is missing", param=param)
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return RequestError(f"{param}: {reason}" if param else reason, param=param)
