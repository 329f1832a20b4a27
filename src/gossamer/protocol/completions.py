"""``/v1/completions``: its body, its answer, and the events of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import WithJsonSchema, field_validator, model_validator

from gossamer.chat import ChatFormat
from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.fields import ChoiceCount, Count
from gossamer.protocol.logprobs import (
    Step,
    finite,
    most_probable,
    prompt_logprobs,
    prompt_steps,
    steps_of,
    token_id_text,
    token_text,
)
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
        logprobs: log-probabilities of this many most probable tokens at each position, and of the chosen one.
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
    best_of: ChoiceCount | None = None
    logprobs: Count | None = None
    echo: bool = False
    add_special_tokens: bool = True  # those that the tokenizer puts around a text

    @field_validator("prompt", mode="plain")
    @classmethod
    def _as_prompts(cls, value: object) -> list[str | list[int]]:
        if isinstance(value, list) and len(value) > MAX_PROMPTS and not isinstance(value[0], int):
            raise ValueError(f"holds {len(value)} prompts; at most {MAX_PROMPTS} are answered together")
        prompts: list[Any] = [value] if isinstance(value, str) or _is_token_ids(value) else _as_list(value)
        all_text = all(isinstance(prompt, str) for prompt in prompts)
        if not prompts or not (all_text or all(_is_token_ids(prompt) for prompt in prompts)):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
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

    def engine_prompts(self) -> list[Json]:
        common = {
            "cache_salt": self.cache_salt,
            "add_special_tokens": self.add_special_tokens,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
        }
        return [
            {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, **common} for prompt in self.prompt
        ]

    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        choices: list[Json] = []
        for output in outputs:
            for completion in _best(output.outputs, self.n):
                prompt, steps = self.echoed(output, decode) if self.echo else ("", [])
                steps += steps_of(completion.token_ids, completion.logprobs, len(prompt))
                choice = {
                    "index": len(choices),  # = prompt index * n + completion index
                    "text": prompt + completion.text,
                    "logprobs": self.logprobs_of(steps),
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
                if self.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(output)
                if self.return_token_ids:
                    choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": completion.token_ids}
                choices.append(choice)
        return envelope(new_head("cmpl", "text_completion", model, self._fingerprint), choices, outputs)

    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        return _Events(self, new_head("cmpl", "text_completion", model, self._fingerprint), decode)

    def echoed(self, output: RequestOutput, decode: Decode) -> tuple[str, list[Step]]:
        """The text of the prompt, and its tokens if log-probabilities are asked for."""
        ids = output.prompt_token_ids
        text = output.prompt
        if text is None:
            text = decode(ids, skip_special_tokens=self.skip_special_tokens)
        if self.logprobs is None:
            return text, []
        return text, prompt_steps(output, text, decode(ids[:1], skip_special_tokens=False))

    def logprobs_of(self, steps: list[Step]) -> Json | None:
        """The log-probabilities that the body asks for, if it does."""
        if self.logprobs is None:
            return None
        return _logprobs(steps, self.logprobs, as_ids=self.return_tokens_as_token_ids)

    def _logprob_count(self) -> int | None:
        return 0 if self.logprobs is None and self.num_drawn > self.n else self.logprobs

    def _prompt_logprob_count(self) -> int | None:
        if self.echo and self.logprobs is not None:
            return max(self.prompt_logprobs or 0, self.logprobs)
        return self.prompt_logprobs


class _Events(StreamedAnswer):
    def __init__(self, body: CompletionRequest, head: Json, decode: Decode) -> None:
        super().__init__(head, **body.streaming)
        self._body = body
        self._decode = decode
        self._begin: dict[int, int] = {}  # where the completion of each choice begins: behind an echoed prompt

    def choices(self, index: int, news: News, output: RequestOutput) -> Iterator[Json]:
        text = news.text
        steps: list[Step] = []
        if news.first and self._body.echo:
            prompt, steps = self._body.echoed(output, self._decode)
            text, self._begin[index] = prompt + text, len(prompt)
        begin = self._begin.get(index, 0)
        steps += [replace(step, offset=step.offset + begin) for step in news.steps]
        if text or steps or news.finished:
            yield {"index": index, "text": text, "logprobs": self._body.logprobs_of(steps)} | news.ending


def _best(completions: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """The ``count`` completions whose tokens have the highest log-probability on average."""
    if count == len(completions):
        return completions

    def mean(completion: CompletionOutput) -> float:
        assert completion.cumulative_logprob is not None
        return completion.cumulative_logprob / max(len(completion.token_ids), 1)

    return sorted(completions, key=mean, reverse=True)[:count]


def _logprobs(steps: list[Step], count: int, *, as_ids: bool) -> Json:
    """OpenAI's older form: parallel lists. Offsets count characters from the start of the choice's ``text``."""
    return {
        "tokens": [token_id_text(step.token) if as_ids else step.text for step in steps],
        "token_logprobs": [_logprob(step) for step in steps],
        "top_logprobs": [None if step.candidates is None else _top(step, count, as_ids=as_ids) for step in steps],
        "text_offset": [step.offset for step in steps],
    }


def _logprob(step: Step) -> float | None:
    return None if step.candidates is None else finite(step.candidates[step.token].logprob)


def _top(step: Step, count: int, *, as_ids: bool) -> Json:
    """The most probable tokens and the chosen one, by text; of several with one text, the others by their ids."""
    ranked = most_probable(step, count)
    named: dict[str, int] = {}
    if not as_ids:
        texts = [(step.text, step.token), *((token_text(logprob), token) for token, logprob in ranked)]
        named = dict(reversed(texts))  # of one text, the chosen token has it, or the most probable one
    names = {token: text for text, token in named.items()}
    return {names.get(token, token_id_text(token)): finite(logprob.logprob) for token, logprob in ranked}


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
