"""Request bodies of ``/v1/completions`` and ``/v1/chat/completions``.

The models forbid unknown fields: a field we cannot honour changes the answer, so it is refused by name, never dropped.
Values are not converted either: ``"temperature": "0.5"`` is refused. ``null`` means "not given", as in OpenAI's API.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from gossamer.errors import RequestError
from gossamer.sampling_params import SamplingParams

# Fields of OpenAI's API that Gossamer does not offer. Clients write them out as null; only a value is refused.
_NOT_OFFERED = frozenset(
    {"best_of", "suffix", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"}
    | {"response_format", "modalities", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"}
    | {"metadata", "store", "service_tier", "stream_options", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention"}
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


Strings = Annotated[list[str], BeforeValidator(_listed)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]


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

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: object) -> object:
        return _drop_nulls(body, _NOT_OFFERED | cls.model_fields.keys())

    @classmethod
    def parse(cls, body: object) -> Self:
        """Read a decoded JSON body.

        Raises:
            RequestError: a field is missing, unknown or of the wrong type; ``param`` names it.

        >>> CompletionRequest.parse({"prompt": "Once", "best_of": 4})
        Traceback (most recent call last):
        ...
        gossamer.errors.RequestError: best_of is not supported
        """
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise _as_request_error(error) from None

    def _token_limit(self) -> int | None:
        return self.max_tokens

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
            n=self.n,
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
        )


class CompletionRequest(_Body):
    """Body of ``POST /v1/completions``.

    Attributes:
        prompt: one or several prompts, each a string or a list of token ids; normalised to a list of prompts.
        logprobs: log-probabilities of this many most probable tokens at each position.
        echo: put the prompt (and its log-probabilities, if asked for) before the completion.

    >>> CompletionRequest.parse({"prompt": [1, 2, 3]}).prompt
    [[1, 2, 3]]
    >>> CompletionRequest.parse({"prompt": "Once"}).to_sampling_params().max_tokens
    16
    """

    openai_max_tokens: ClassVar[int | None] = 16

    prompt: list[str | list[int]]
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

    def engine_prompts(self) -> list[str | dict[str, list[int]]]:
        """The prompts in the form the engine takes."""
        return [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in self.prompt]

    def _logprob_count(self) -> int | None:
        return self.logprobs

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
        """The messages for a chat template. ``developer`` is OpenAI's later name of ``system``; templates know that."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        ]

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


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return RequestError(f"{param} is not supported", param=param)
    if first["type"] == "missing":
        return RequestError(f"{param} is missing", param=param)
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return RequestError(f"{param}: {reason}" if param else reason, param=param)
