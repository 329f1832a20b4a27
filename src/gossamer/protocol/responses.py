"""What all answers share, as plain dictionaries ready for JSON.

Two fields of answers go beyond OpenAI's, with vLLM's names: ``stop_reason`` (which stop string or token ended the text)
and ``prompt_logprobs`` (only when asked for).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.outputs import RequestOutput

if TYPE_CHECKING:
    from gossamer.protocol.requests import ChatCompletionRequest, CompletionRequest

Json = dict[str, Any]
Decode = Callable[..., str]  # token ids, and by name skip_special_tokens -> text


def completion_response(
    request: CompletionRequest, outputs: Sequence[RequestOutput], *, model: str, decode: Decode
) -> Json:
    """The answer to a request for completions, from what the engine put out for each of its prompts."""
    return request.answer(outputs, model=model, decode=decode)


def chat_completion_response(request: ChatCompletionRequest, output: RequestOutput, *, model: str) -> Json:
    """The answer to a conversation, from what the engine put out for it."""
    return request.answer([output], model=model, decode=_never)


def _never(*_: Any, **__: Any) -> str:
    raise AssertionError("the answer to a conversation does not repeat the prompt")


def new_head(prefix: str, kind: str, model: str, fingerprint: str | None = None) -> Json:
    """The first fields of an answer, or of each of its events."""
    head: Json = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    return head if fingerprint is None else head | {"system_fingerprint": fingerprint}


def envelope(head: Json, choices: list[Json], outputs: Sequence[RequestOutput]) -> Json:
    """A whole answer."""
    return head | {"choices": choices, "usage": usage(outputs)}


def usage(outputs: Sequence[RequestOutput]) -> Json:
    """Tokens of an answer."""
    # A prompt is counted once, however many completions were drawn from it: it is also computed only once.
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completions = [completion for output in outputs for completion in output.outputs]
    completion_tokens = sum(len(each.token_ids) for each in completions)
    details = {
        "reasoning_tokens": sum(each.num_reasoning_tokens for each in completions),
        "accepted_prediction_tokens": sum(each.num_accepted_prediction_tokens for each in completions),
        "rejected_prediction_tokens": sum(each.num_rejected_prediction_tokens for each in completions),
    }
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens_details": details,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
