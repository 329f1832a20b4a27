"""Errors as responses, in the endpoint's form: mostly OpenAI's, ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gossamer.errors import EngineError, GossamerError, ServerBusyError, ShuttingDownError
from gossamer.protocol import BODIES, error_body, shortened


class HttpError(GossamerError):
    """Something about a request that only HTTP knows of.

    Attributes:
        status: of the response.
        type, code, param: as in OpenAI's errors.
        headers: that the response has besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.headers = headers or {}


def not_found(message: str, param: str | None = None, code: str = "not_found") -> HttpError:
    """What a request names does not exist."""
    return HttpError(404, message, code=code, param=param)


def unavailable(message: str, retry_after: int = 1) -> HttpError:
    """The server cannot answer now."""
    headers = {"retry-after": str(retry_after)}
    return HttpError(503, message, code="unavailable", type="server_error", headers=headers)


def no_space(error: OSError) -> HttpError:
    """The disk does not take what a request brings."""
    message = f"the server cannot store this: {error.strerror}"
    return HttpError(507, message, code="insufficient_storage", type="server_error")


def timed_out(seconds: float) -> HttpError:
    """An answer took too long. OpenAI's clients would try the same again; the header tells them not to."""
    return HttpError(
        504,
        f"the answer was not complete after {seconds:g} seconds",
        code="timeout",
        type="server_error",
        headers={"x-should-retry": "false"},
    )


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error. What we did not raise on purpose is not told to strangers."""
    if isinstance(error, HttpError):
        param = None if error.param is None else shortened(error.param)
        body = {"message": shortened(str(error)), "type": error.type, "param": param, "code": error.code}
        return error.status, {"error": body}, error.headers
    status, headers = 400, {}
    if isinstance(error, ServerBusyError):
        status, headers = 429, {"retry-after": str(error.retry_after)}
    elif not isinstance(error, GossamerError):
        status = 500
    elif isinstance(error, EngineError):
        status = 503 if isinstance(error, ShuttingDownError) else 500
    return status, error_body(error), headers


class ErrorResponse(Response):
    """The response for an error, in the form of the endpoint that the request is for."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        super().__init__(status_code=status)
        self._body, self._more_headers = body, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = (each for url, each in BODIES.items() if f"{scope.get('path')}/".startswith(f"{url}/"))
        kind = next(found, None)
        body = self._body if kind is None else kind.error(self._body, self.status_code)
        await JSONResponse(body, self.status_code, self._more_headers)(scope, receive, send)


def error_response(error: Exception) -> Response:
    """The response for an error."""
    return ErrorResponse(*describe(error))
