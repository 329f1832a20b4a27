"""The lines of a batch's output, and the bodies in the lines of its input."""

from __future__ import annotations

import uuid
from typing import Any

from gossamer.batch.input_file import BatchLine, InvalidLine
from gossamer.errors import EngineError, GossamerError, RequestError
from gossamer.protocol import GeneratingBody, PoolingBody, all_bodies, error_body, shortened

Record = dict[str, Any]


def read_body(line: BatchLine) -> GeneratingBody | PoolingBody:
    """The body of a line.

    Raises:
        RequestError: it cannot be honoured.
    """
    body = all_bodies()[line.url].parse(line.body)
    if isinstance(body, GeneratingBody) and body.stream:
        raise RequestError("stream must be false in a batch", param="stream")
    return body


def answer_record(line: BatchLine, body: Record) -> Record:
    """A line was answered."""
    return _record(line.custom_id, response=_response(200, body))


def refusal_record(line: BatchLine, error: Exception) -> Record:
    """A line was refused, or failed, for whatever reason."""
    body = error_body(error)
    body["error"]["line"] = line.number
    ours = isinstance(error, EngineError) or not isinstance(error, GossamerError)
    return _record(line.custom_id, response=_response(500 if ours else 400, body))


def invalid_record(line: InvalidLine) -> Record:
    """A line was no request."""
    param = None if line.param is None else shortened(line.param)
    error = {"code": line.code, "message": shortened(line.message), "param": param, "line": line.number}
    return _record(line.custom_id, error=error)


def _record(custom_id: str | None, *, response: Record | None = None, error: Record | None = None) -> Record:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}


def _response(status_code: int, body: Record) -> Record:
    return {"status_code": status_code, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
