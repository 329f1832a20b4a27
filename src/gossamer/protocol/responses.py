"""Response bodies of ``/v1/completions`` and ``/v1/chat/completions``, as plain dictionaries ready for JSON.

Two fields go beyond OpenAI's, with vLLM's names: ``stop_reason`` (which stop string or token ended the text) and
``prompt_logprobs`` (only when asked for).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gossamer.errors import (
    EngineError,
    GossamerError,
    InvalidPromptError,
    MemoryBudgetError,
    PromptTooLongError,
    RequestError,
    ServerBusyError,
)
from gossamer.outputs import CompletionOutput, Logprob, RequestOutput
from gossamer.protocol.requests import ChatCompletionRequest, CompletionRequest

Json = dict[str, Any]

_INVALID = "invalid_request_error"
# type and code, as in OpenAI's errors
_KINDS: tuple[tuple[type[GossamerError], str, str], ...] = (
    (PromptTooLongError, _INVALID, "context_length_exceeded"),
    (MemoryBudgetError, _INVALID, "memory_budget_exceeded"),
    (InvalidPromptError, _INVALID, "invalid_prompt"),
    (ServerBusyError, "rate_limit_error", "server_busy"),
    (EngineError, "server_error", "engine_error"),
    (GossamerError, _INVALID, "invalid_value"),
)


def error_body(error: GossamerError, prompt_field: str = "prompt") -> Json:
    """What a refused or failed request gets instead of an answer.

    Args:
        prompt_field: the field of the body that the prompt was made from; the engine does not know it.

    >>> error_body(RequestError("top_p must be in (0, 1], got 2", param="top_p"))["error"]["param"]
    'top_p'
    """
    # The request knows which request it is: its id would only repeat that in the message.
    message, param = (error.message, error.param) if isinstance(error, RequestError) else (str(error), None)
    if param in ("prompt", "prompt_token_ids"):
        param = prompt_field
    kind, code = next((kind, code) for each, kind, code in _KINDS if isinstance(error, each))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def completion_response(
    request: CompletionRequest,
    outputs: Sequence[RequestOutput],
    *,
    model: str,
    decode: Callable[[list[int]], str],
) -> Json:
    """Answer to a completion request.

    Args:
        outputs: one per prompt, in the order of ``request.prompt``.
        model: the name of the model that answered.
        decode: token ids -> text; used for ``echo`` of a prompt.
    """
    choices: list[Json] = []
    for output in outputs:
        for completion in _best(output.outputs, request.n):
            text, logprobs = completion.text, None
            steps = pair_steps(completion.token_ids, completion.logprobs)
            if request.echo:
                prompt = output.prompt if output.prompt is not None else decode(output.prompt_token_ids)
                text = prompt + text
                steps = [*pair_steps(output.prompt_token_ids, output.prompt_logprobs), *steps]
            if request.logprobs is not None:
                logprobs = completion_logprobs(steps, request.logprobs, decode)
            choices.append(
                {
                    "index": len(choices),  # = prompt index * n + completion index
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
                | ({"prompt_logprobs": _prompt_logprobs(output)} if request.prompt_logprobs is not None else {})
            )
    return _envelope("cmpl", "text_completion", model, choices, outputs)


def chat_completion_response(request: ChatCompletionRequest, output: RequestOutput, *, model: str) -> Json:
    """Answer to a chat request."""
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": _chat_logprobs(completion, request),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        for completion in output.outputs
    ]
    body = _envelope("chatcmpl", "chat.completion", model, choices, [output])
    if request.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_logprobs(output)
    return body


def _chat_logprobs(completion: CompletionOutput, request: ChatCompletionRequest) -> Json | None:
    if not request.logprobs:
        return None
    return chat_logprobs(pair_steps(completion.token_ids, completion.logprobs), request.top_logprobs)


def _envelope(prefix: str, kind: str, model: str, choices: list[Json], outputs: Sequence[RequestOutput]) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage(outputs),
    }


def usage(outputs: Sequence[RequestOutput]) -> Json:
    """Tokens of an answer."""
    # A prompt is counted once, however many completions were drawn from it: it is also computed only once.
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def _best(completions: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """The ``count`` completions whose tokens have the highest log-probability on average."""
    if count == len(completions):
        return completions

    def mean(completion: CompletionOutput) -> float:
        assert completion.cumulative_logprob is not None
        return completion.cumulative_logprob / max(len(completion.token_ids), 1)

    return sorted(completions, key=mean, reverse=True)[:count]


Step = tuple[int, dict[int, Logprob] | None]


def pair_steps(token_ids: list[int], logprobs: Sequence[dict[int, Logprob] | None] | None) -> list[Step]:
    """Pair each chosen token with the log-probabilities at its position (None for the first token of a prompt)."""
    return list(zip(token_ids, logprobs, strict=True)) if logprobs is not None else []


def _most_probable(candidates: dict[int, Logprob], count: int) -> Iterable[Logprob]:
    # The chosen token is among the candidates even when its rank is beyond ``count``.
    return sorted((c for c in candidates.values() if c.rank <= count), key=lambda c: c.rank)


def _text(logprob: Logprob) -> str:
    return logprob.decoded_token or ""


def _finite(logprob: float) -> float:
    # JSON has no -inf; OpenAI writes the log-probability of an impossible token so.
    return max(-9999.0, logprob)


def completion_logprobs(steps: list[Step], count: int, decode: Callable[[list[int]], str], offset: int = 0) -> Json:
    """OpenAI's older form: parallel lists. Offsets count characters from the start of ``text``."""
    form: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, candidates in steps:
        if candidates is None:  # the first token of an echoed prompt: nothing precedes it that could predict it
            text, logprob, top = decode([token]), None, None
        else:
            text, logprob = _text(candidates[token]), _finite(candidates[token].logprob)
            top = {_text(candidate): _finite(candidate.logprob) for candidate in _most_probable(candidates, count)}
        form["tokens"].append(text)
        form["token_logprobs"].append(logprob)
        form["top_logprobs"].append(top)
        form["text_offset"].append(offset)
        offset += len(text)
    return form


def chat_logprobs(steps: list[Step], count: int) -> Json:
    """OpenAI's newer form: an object per token."""
    content = [
        _chat_token(candidates[token])
        | {"top_logprobs": [_chat_token(candidate) for candidate in _most_probable(candidates, count)]}
        for token, candidates in steps
        if candidates is not None
    ]
    return {"content": content, "refusal": None}


def _chat_token(logprob: Logprob) -> Json:
    text = _text(logprob)
    # A token may hold only part of a character; its text is then a replacement sign, whose bytes would be wrong.
    exact = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": _finite(logprob.logprob), "bytes": list(text.encode()) if exact else None}


def _prompt_logprobs(output: RequestOutput) -> list[Json | None]:
    return [
        None
        if candidates is None
        else {
            str(token): {"logprob": _finite(c.logprob), "rank": c.rank, "decoded_token": c.decoded_token}
            for token, c in candidates.items()
        }
        for candidates in output.prompt_logprobs or []
    ]
