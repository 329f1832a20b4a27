"""What all bodies of generating endpoints share: sampling, stopping, and the extensions that vLLM's clients know.

A body class is all there is to an endpoint: its url, how a body is read, what the engine is asked, and how the answer
looks. `bodies` lists the classes; the server and batch files take any of them.

The models forbid unknown fields: a field we cannot honour changes the answer, so it is refused by name, never dropped.
Fields that only advise, or file the answer away, are taken and listed in ``ignored``. Values are not converted:
``"temperature": "0.5"`` is refused. ``null`` means "not given", as in OpenAI's API.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from gossamer.chat import ChatFormat, ToolUse
from gossamer.errors import RequestError
from gossamer.outputs import RequestOutput
from gossamer.protocol.field_names import FieldNames
from gossamer.protocol.fields import (
    REFUSED,
    ChoiceCount,
    Count,
    Fields,
    PositiveCount,
    Prediction,
    ResponseFormat,
    Stops,
    StreamOptions,
    StructuredOutputs,
    TokenBias,
    TokenIds,
    parse_fields,
)
from gossamer.protocol.response_store import OwnedResponses
from gossamer.protocol.responses import Decode, Json
from gossamer.protocol.streaming import DONE, StreamedAnswer, event
from gossamer.sampling_params import ReasoningParams, SamplingParams, StructuredOutputsParams

# Fields that the authors of a model may advise about.
_NEUTRAL: tuple[object, ...] = (False, "", [], {})  # and 0, which is equal to False
_ADVISABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class GeneratingBody(Fields, BaseModel):  # BaseModel for ruff, which would take the defaults for shared ones
    """Body of an endpoint that generates text."""

    #: The path of the endpoint, in batch files as well.
    url: ClassVar[str]
    #: One sentence for the OpenAPI document.
    description: ClassVar[str]
    #: The field that the prompts are made from.
    prompt_field: ClassVar[str]
    #: What OpenAI generates at most when neither the body nor the user says anything; None is up to the context's end.
    openai_max_tokens: ClassVar[int | None] = None
    #: Fields that are taken without an effect, and told: what they ask for is not done.
    advisory: ClassVar[tuple[str, ...]] = (
        *("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "verbosity"),
    )
    #: Fields that are taken without an effect, and change no answer anywhere.
    neutral: ClassVar[tuple[str, ...]] = ("user", "modalities")
    #: Fields of other endpoints, which answers of this one have no place for.
    refuses: ClassVar[tuple[str, ...]] = ()
    #: First names of fields, which bodies may still have.
    first_names: ClassVar[tuple[str, ...]] = ()

    model: str | None = None
    n: ChoiceCount = 1
    max_tokens: Count | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Stops = []
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: TokenBias = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # OpenAI's tag for the end user; by definition it does not influence the answer

    # What OpenAI does with these changes no answer; they are those of `advisory`.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    verbosity: Any = None
    modalities: list[Literal["text"]] | None = None

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    min_tokens: Count = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: Count | None = None
    structured_outputs: StructuredOutputs | None = None
    return_tokens_as_token_ids: bool = False  # in log-probabilities: "token_id:N" instead of texts
    return_token_ids: bool = False  # of the prompt and of each choice, beside the texts
    truncate_prompt_tokens: PositiveCount | None = None  # the last so many of each prompt are what is answered
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    prediction: Prediction | None = None  # what agrees with it comes several tokens at a time
    speculation: bool = True  # False: one token at a time, whatever could be drafted

    _draw: int | None = PrivateAttr(None)
    _usage: Json | None = PrivateAttr(None)
    _fingerprint: str | None = PrivateAttr(None)
    _sampling: dict[str, Any] = PrivateAttr({})  # what was not given, too, once it is known

    @property
    def draw(self) -> int | None:
        """Which random stream a request without a seed has; ``None`` leaves it to the order of arrival."""
        return self._draw

    def drawn_from(self, draw: int) -> None:
        """Give a request without a seed a random stream of its own: sent twice, it has the same answer."""
        self._draw = draw

    @property
    def usage(self) -> Json | None:
        """The tokens that the answer has taken so far, in OpenAI's form; ``None`` before there were any."""
        return self._usage

    def has_used(self, usage: Json) -> None:
        """Note the tokens that the answer has taken."""
        self._usage = usage

    def answered_by(self, fingerprint: str) -> None:
        """Name what answers: the ``system_fingerprint`` of OpenAI's answers, the same while answers can be repeated."""
        self._fingerprint = fingerprint

    @classmethod
    def parse(cls, body: object) -> Self:
        """Read a decoded JSON body.

        Raises:
            RequestError: a field is missing, unknown or of the wrong type; ``param`` names it.

        >>> from gossamer.protocol import CompletionRequest
        >>> CompletionRequest.parse({"prompt": "Once", "suffix": "end"})
        Traceback (most recent call last):
        ...
        gossamer.errors.RequestError: suffix is not supported
        """
        if isinstance(body, dict):  # at such a value, what cannot be honoured changes nothing
            body = {name: value for name, value in body.items() if name not in REFUSED or value not in _NEUTRAL}
        return parse_fields(cls, body)

    @model_validator(mode="before")
    @classmethod
    def _has_no_place_for(cls, body: object) -> object:
        given = body if isinstance(body, dict) else {}
        for name in cls.refuses:
            if given.get(name) is not None:
                raise RequestError(f"{name} is not supported", param=name)
        return body

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not available with stream: true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs mean the same; give one of them")
        return self

    def adapter_among(self, adapters: Collection[str]) -> str | None:
        """The adapter that the body asks for by its ``model``; ``None`` for the model itself."""
        return self.model if self.model in adapters else None

    def tool_use(self) -> ToolUse | None:
        """What the answer may do with tools; ``None`` if there are none.

        Raises:
            RequestError: a tool cannot be one, or the choice names another.
        """
        return None

    def remember(self, responses: OwnedResponses) -> None:
        """Where answers are kept: an endpoint whose requests may go on from one looks there, and puts its own there.

        Raises:
            RequestError: the body goes on from an answer that is not there.
        """
        return None

    @property
    def field_names(self) -> FieldNames:
        """What the engine's fields are called in this body: errors tell these names, see :func:`naming`."""
        form = "structured_outputs" if self.response_format is None else "response_format"
        form = form if self.tool_use() is None else "tools"
        return {"prompt": self.prompt_field, "prompt_token_ids": self.prompt_field, "structured_outputs": form}

    @property
    def foreign_calls(self) -> dict[str, str]:
        """Calls in the history of tools that are not offered: the path of the name in the body -> the name.

        Agents hand conversations over to others that have other tools, so there may be some.
        """
        return {}

    @classmethod
    def error(cls, error: Json, status: int) -> Json:
        """The body of a response of the endpoint that is an error; ``error`` has OpenAI's form."""
        return error

    @classmethod
    def broken(cls, error: Json, status: int, told: int) -> bytes:
        """The last events of a stream whose server is gone after ``told`` events; ``error`` as in :meth:`error`."""
        return event(error) + DONE

    @property
    def ignored(self) -> list[str]:
        """Fields that were given and do nothing here."""
        return [name for name in self.advisory if getattr(self, name) is not None]

    @abstractmethod
    def engine_prompts(self) -> list[Json]:
        """The prompts in the form the engine takes, each with the body's ``cache_salt``.

        A conversation is ``{"messages": ...}``, still to be written with the chat template; it may have ``tools``,
        ``template_kwargs``, ``add_generation_prompt`` and ``continue_final_message``. Other prompts may have
        ``add_special_tokens``, and all ``truncate_prompt_tokens``.
        """

    @abstractmethod
    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        """The whole answer.

        Args:
            outputs: one per prompt, in the order of ``engine_prompts()``.
            model: the name of the model that answered.
            decode: token ids -> text; takes ``skip_special_tokens`` by name.
            chat: how the model writes calls and thoughts; ``None`` for one that is not made for conversations.
        """

    @abstractmethod
    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        """What turns outputs into the events of a streamed answer; the arguments are those of ``answer``."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def streaming(self) -> dict[str, Any]:
        """What a :class:`StreamedAnswer` is told of the body, by name."""
        return {
            "n": self.n,
            "include_usage": self.include_usage,
            "continuous_usage": self.stream_options is not None and self.stream_options.continuous_usage_stats,
            "token_ids": self.return_token_ids,
        }

    @property
    def num_drawn(self) -> int:
        """Completions that are generated for each prompt."""
        return self.n

    def _token_limit(self) -> int | None:
        return self.max_tokens

    def _form(self, chat: ChatFormat | None) -> StructuredOutputsParams | None:
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

    def _reasoning(self, chat: ChatFormat | None) -> ReasoningParams | None:
        """What marks the thoughts of the answer, if there may be some."""
        return None

    def _shows_special_tokens(self, chat: ChatFormat | None) -> bool:
        """Whether the text of the answer needs its special tokens, whatever is asked for."""
        return False

    def to_sampling_params(
        self,
        default_max_tokens: int | None = None,
        advised: Mapping[str, float] | None = None,
        chat: ChatFormat | None = None,
    ) -> SamplingParams:
        """The request in the engine's terms.

        Args:
            default_max_tokens: the limit for bodies that give none; ``None`` is OpenAI's own default.
            advised: what the model's authors advise, such as a ``temperature``, for what the body does not say.
            chat: how the model writes calls and thoughts.

        Raises:
            InvalidSamplingParamsError: a value is out of its range.
        """
        limits = (self._token_limit(), default_max_tokens, self.openai_max_tokens)
        limit = next((each for each in limits if each is not None), None)
        unsaid = {name: value for name, value in (advised or {}).items() if name not in self.model_fields_set}
        sampling = self._sampling = {name: unsaid.get(name, getattr(self, name)) for name in _ADVISABLE}
        return SamplingParams(
            n=self.num_drawn,
            **sampling,
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
            skip_special_tokens=self.skip_special_tokens and not self._shows_special_tokens(chat),
            logprobs=self._logprob_count(),
            prompt_logprobs=self._prompt_logprob_count(),
            structured_outputs=self._form(chat),
            reasoning=self._reasoning(chat),
            prediction=None if self.prediction is None else self.prediction.text,
            speculation=self.speculation,
        )
