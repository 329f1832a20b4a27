"""``/v1/completions``: its body, its answer, and the events of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import WithJsonSchema, field_validator, model_validator

from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.fields import Count, PositiveCount
from gossamer.protocol.logprobs import Step, finite, most_probable, pair_steps, prompt_logprobs, token_text
from gossamer.protocol.responses import Decode, Json, envelope, new_head
from gossamer.protocol.streaming import News, StreamedAnswer

MAX_PROMPTS = 4096  # of one body
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}


class CompletionRequest(GeneratingBody):
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

    url: ClassVar[str] = "/v1/completions"
    description: ClassVar[str] = "Complete one or several prompts."
    prompt_field: ClassVar[str] = "prompt"
    openai_max_tokens: ClassVar[int | None] = 16

    prompt: Annotated[list[str | list[int]], WithJsonSchema(_PROMPT_SCHEMA)]
    best_of: PositiveCount | None = None
    logprobs: Count | None = None
    echo: bool = False

    @field_validator("prompt", mode="plain")
    @classmethod
    def _as_prompts(cls, value: object) -> list[str | list[int]]:
        if isinstance(value, list) and len(value) > MAX_PROMPTS and not isinstance(value[0], int):
            raise ValueError(f"holds {len(value)} prompts; at most {MAX_PROMPTS} are answered together")
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

    def prompts(self) -> list[Json]:
        return [
            {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "cache_salt": self.cache_salt}
            for prompt in self.prompt
        ]

    def answer(self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode) -> Json:
        choices: list[Json] = []
        for output in outputs:
            for completion in _best(output.outputs, self.n):
                text, steps = completion.text, pair_steps(completion.token_ids, completion.logprobs)
                if self.echo:
                    text, steps = _echoed(output, text, steps, decode)
                choice = {
                    "index": len(choices),  # = prompt index * n + completion index
                    "text": text,
                    "logprobs": None if self.logprobs is None else _logprobs(steps, self.logprobs, decode),
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
                if self.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(output)
                choices.append(choice)
        return envelope(new_head("cmpl", "text_completion", model), choices, outputs)

    def events(self, *, model: str, decode: Decode) -> StreamedAnswer:
        return _Events(self, new_head("cmpl", "text_completion", model), decode)

    def _logprob_count(self) -> int | None:
        return 0 if self.logprobs is None and self.num_drawn > self.n else self.logprobs

    def _prompt_logprob_count(self) -> int | None:
        if self.echo and self.logprobs is not None:
            return max(self.prompt_logprobs or 0, self.logprobs)
        return self.prompt_logprobs


class _Events(StreamedAnswer):
    def __init__(self, body: CompletionRequest, head: Json, decode: Decode) -> None:
        super().__init__(head, n=body.n, include_usage=body.include_usage)
        self._body = body
        self._decode = decode
        self._offsets: dict[int, int] = {}  # characters of the tokens' texts of each choice; logprobs tell it

    def choices(self, index: int, news: News, output: RequestOutput) -> Iterator[Json]:
        text, steps, logprobs = news.text, news.steps, None
        if news.first and self._body.echo:
            text, steps = _echoed(output, text, steps, self._decode)
        if self._body.logprobs is not None:
            offset = self._offsets.get(index, 0)
            logprobs = _logprobs(steps, self._body.logprobs, self._decode, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        if text or steps or news.finished:
            yield {"index": index, "text": text, "logprobs": logprobs} | news.ending


def _echoed(output: RequestOutput, text: str, steps: list[Step], decode: Decode) -> tuple[str, list[Step]]:
    """Text and steps with those of the prompt before them."""
    prompt = output.prompt if output.prompt is not None else decode(output.prompt_token_ids)
    return prompt + text, [*pair_steps(output.prompt_token_ids, output.prompt_logprobs), *steps]


def _best(completions: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """The ``count`` completions whose tokens have the highest log-probability on average."""
    if count == len(completions):
        return completions

    def mean(completion: CompletionOutput) -> float:
        assert completion.cumulative_logprob is not None
        return completion.cumulative_logprob / max(len(completion.token_ids), 1)

    return sorted(completions, key=mean, reverse=True)[:count]


def _logprobs(steps: list[Step], count: int, decode: Decode, offset: int = 0) -> Json:
    """OpenAI's older form: parallel lists. Offsets count characters from the start of ``text``."""
    form: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, candidates in steps:
        if candidates is None:  # the first token of an echoed prompt: nothing precedes it that could predict it
            text, logprob, top = decode([token]), None, None
        else:
            text, logprob = token_text(candidates[token]), finite(candidates[token].logprob)
            top = {token_text(candidate): finite(candidate.logprob) for candidate in most_probable(candidates, count)}
        form["tokens"].append(text)
        form["token_logprobs"].append(logprob)
        form["top_logprobs"].append(top)
        form["text_offset"].append(offset)
        offset += len(text)
    return form


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _has_lone_surrogate(text: str) -> bool:
    # JSON can spell what UTF-8 cannot encode ("\ud800"); a tokenizer would fail on it much later.
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
