"""What a refused or failed request gets instead of an answer."""

from __future__ import annotations

from typing import Any

from gossamer.errors import (
    EngineError,
    GossamerError,
    InvalidPromptError,
    MemoryBudgetError,
    PromptTooLongError,
    RequestError,
    ResponseNotFoundError,
    ServerBusyError,
)

_INVALID = "invalid_request_error"
# type and code, as in OpenAI's errors
_KINDS: tuple[tuple[type[GossamerError], str, str], ...] = (
    (PromptTooLongError, _INVALID, "context_length_exceeded"),
    (MemoryBudgetError, _INVALID, "memory_budget_exceeded"),
    (InvalidPromptError, _INVALID, "invalid_prompt"),
    (ResponseNotFoundError, _INVALID, "previous_response_not_found"),
    (ServerBusyError, "rate_limit_error", "server_busy"),
    (EngineError, "server_error", "engine_error"),
    (GossamerError, _INVALID, "invalid_value"),
)
MAX_MESSAGE = 1000  # characters; messages quote values, and those may be as long as a request


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """``text`` as messages may quote it: bounded, by leaving out its middle, and writable as UTF-8.

    >>> shortened("x" * 90, 20)
    'xxxxxxx ... xxxxxxxx'
    >>> shortened("half of a pair: \\ud800")
    'half of a pair: \\\\ud800'
    """
    text = text if len(text) <= limit else f"{text[: (limit - 5) // 2]} ... {text[-((limit - 4) // 2) :]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def error_body(error: Exception) -> dict[str, Any]:
    """What a refused or failed request gets instead of an answer.

    Args:
        error: what was not raised on purpose may hold anything, and is not told to strangers.

    >>> error_body(RequestError("top_p must be in (0, 1], got 2", param="top_p"))["error"]["param"]
    'top_p'
    """
    if not isinstance(error, GossamerError):
        body = {"message": "internal error", "type": "server_error", "param": None, "code": "internal_error"}
        return {"error": body}
    # The request knows which request it is: its id would only repeat that in the message.
    message, param = (error.message, error.param) if isinstance(error, RequestError) else (str(error), None)
    kind, code = next((kind, code) for each, kind, code in _KINDS if isinstance(error, each))
    param = None if param is None else shortened(param)
    return {"error": {"message": shortened(message), "type": kind, "param": param, "code": code}}


# Anthropic's types of errors, by the status of the response.
_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(body: dict[str, Any], status: int) -> dict[str, Any]:
    """An error body as Anthropic's API has it.

    >>> anthropic_error({"error": {"message": "No.", "type": "invalid_request_error"}}, 400)
    {'type': 'error', 'error': {'type': 'invalid_request_error', 'message': 'No.'}}
    """
    kind = _BY_STATUS.get(status, "api_error" if status >= 500 else _INVALID)
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}
